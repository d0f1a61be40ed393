import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pars_fast import Ranker
from pars_fast.baselines import load_predictor
from pars_fast.benchmark import CEILING, benchmark, held_out_rows, mean_tau, read_length_files
from pars_fast.data import read_length_file
from pars_fast.distribution import LengthDistribution
from pars_fast.errors import DataError
from pars_fast.metrics import kendall_tau

WriteLengths = Callable[..., Path]
PROMPTS = [" ".join("abcdefghij"[: 1 + n % 9]) + " z" * n for n in range(40)]


class Exact:
    """Scores a prompt by what it is told."""

    token_map = None

    def __init__(self, score: Callable[[str], float]) -> None:
        self._score = score

    def score(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([self._score(prompt) for prompt in prompts])

    def save_pretrained(self, path: str | Path) -> None:
        raise AssertionError("nobody is to save it")


def results(files: Any, predictors: Any, most: int | None = None) -> dict[str, Any]:
    return dict(benchmark(files, predictors, max_prompts_per_file=most, resamples=50))


@pytest.fixture
def file(write_lengths: WriteLengths) -> Any:
    """Model m answers as long as the prompt is; n and o do too, with noise; `few` answered five prompts."""
    rng = np.random.default_rng(0)
    rows = []
    for index, prompt in enumerate(PROMPTS):
        noisy = [max(1, round(len(prompt) * float(rng.lognormal(0, 0.3)))) for _ in range(2)]
        lengths = {"m": len(prompt), "n": noisy[0], "o": noisy[1]} | ({"few": 3 + index} if index < 5 else {})
        rows.append(("test", prompt, lengths))
    return read_length_file(
        write_lengths([*rows, ("train", "other", {"m": 3})], "lengths_arena_hard_v0.1.jsonl")
    )


def test_a_perfect_order_beats_a_reversed_one(file: Any) -> None:
    both = {"right": [Exact(len)], "wrong": [Exact(lambda prompt: -len(prompt))]}
    result = results([file], both)
    columns = result["arena_hard_v0.1"]["predictors"]
    assert set(columns["right"]["models"]) == {"m", "n", "o"}
    assert columns["right"]["models"]["m"]["kendall_tau"] == pytest.approx(1, abs=1e-6)
    assert columns["wrong"]["models"]["m"]["pair_accuracy"] == pytest.approx(0, abs=1e-6)
    mean = np.mean([columns["right"]["models"][model]["kendall_tau"] for model in "mno"])
    assert columns["right"]["kendall_tau"]["mean"] == pytest.approx(mean)
    difference = result["all"]["predictors"]["wrong"]["ours_minus_this"]
    assert difference["mean"] == pytest.approx(2 * columns["right"]["kendall_tau"]["mean"], abs=1e-6)
    assert difference["p_value"] < 0.05
    assert result["all"]["tau_by_domain"] == {
        "chat": {
            "right": pytest.approx(mean, abs=1e-6),
            "wrong": pytest.approx(-mean, abs=1e-6),
        }
    }
    assert len(columns["right"]["tau_by_prompt_length"]) == 3
    json.dumps(result, allow_nan=False)


def test_the_ceiling_is_the_order_of_the_other_models(file: Any) -> None:
    ceiling = results([file], {"x": [Exact(len)]})["arena_hard_v0.1"]["predictors"][CEILING]
    logs = np.log([[row.output_tokens[m] for m in "mno"] for row in file.select("test").rows])
    centred = logs - logs.mean(axis=0)
    # `few` is another model too, on the five prompts that it answered
    few = np.log([row.output_tokens.get("few", np.nan) for row in file.select("test").rows])
    others = np.nanmean(np.column_stack([centred[:, 1:], few - np.nanmean(few)]), axis=1)
    assert ceiling["models"]["m"]["kendall_tau"] == pytest.approx(kendall_tau(others, logs[:, 0]), abs=1e-6)


def test_seeds_are_averaged_and_their_spread_is_given(file: Any) -> None:
    seeds = {"x": [Exact(len), Exact(lambda prompt: -len(prompt))]}
    measures = results([file], seeds)["arena_hard_v0.1"]["predictors"]["x"]
    assert measures["seeds"] == 2
    assert measures["kendall_tau"]["mean"] == pytest.approx(0, abs=1e-6)
    assert measures["tau_std_over_seeds"] > 1


def test_a_ranker_with_a_distribution_has_its_coverage_measured(file: Any, tiny_ranker: Ranker) -> None:
    tiny_ranker.distribution = LengthDistribution((0.0,), (3.0,), (50.0,), 5.0)  # so wide that all are inside
    both = {"ours": [tiny_ranker], "prompt_length": [load_predictor("prompt_length")]}
    columns = results([file], both)["arena_hard_v0.1"]["predictors"]
    assert columns["ours"]["coverage"] == {"0.5": 1, "0.8": 1, "0.95": 1}
    assert columns["prompt_length"]["coverage"] is None


def test_a_sample_of_a_large_file(file: Any) -> None:
    result = results([file], {"x": [Exact(len)]}, most=25)["arena_hard_v0.1"]
    assert result["n"] == result["predictors"]["x"]["models"]["m"]["n"] == 25


def test_the_mean_tau_is_over_models_with_enough_answers(file: Any) -> None:
    rows, _ = held_out_rows(file)
    scores = np.array([float(len(row.prompt)) for row in rows])
    columns = {model: np.array([row.output_tokens[model] for row in rows]) for model in "mno"}
    expected = np.mean([kendall_tau(scores, lengths) for lengths in columns.values()])
    assert mean_tau(scores, rows, ["m", "n", "o", "few"]) == pytest.approx(expected)
    assert np.isnan(mean_tau(scores, rows, ["few"]))


def test_val_stands_in_for_a_missing_test_split(write_lengths: WriteLengths) -> None:
    rows = [("val", "a", {"m": 3}), ("train", "b", {"m": 3}), ("val", "a", {"m": 9})]
    kept, split = held_out_rows(read_length_file(write_lengths(rows)))
    assert split == "val"
    assert [row.output_tokens for row in kept] == [{"m": 9}]


def test_a_folder_without_files_and_files_without_lengths(
    tmp_path: Path, write_lengths: WriteLengths
) -> None:
    with pytest.raises(DataError, match=r"no lengths_\*\.jsonl"):
        read_length_files(tmp_path)
    file = read_length_file(write_lengths([("test", "a", {"m": 3})]))
    with pytest.raises(DataError, match="no file has a test or val split with lengths to rank"):
        results([file], {"x": [Exact(len)]})
