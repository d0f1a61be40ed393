import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pars_fast import Ranker
from pars_fast.data import read_length_file
from pars_fast.evaluation import evaluate
from pars_fast.metrics import ranking_quality

WriteLengths = Callable[..., Path]
MEASURES = ("kendall_tau", "ci95", "pair_accuracy", "impact_accuracy")
PROMPTS = [f"write {letter} story" for letter in "abcdefghijkl"]


def test_every_column_is_measured_on_its_own_rows(tiny_ranker: Ranker, write_lengths: WriteLengths) -> None:
    lengths = [{"all": 10 + n, "even": 400 - n} if n % 2 == 0 else {"all": 10 + n} for n in range(12)]
    rows = [("test", prompt, row) for prompt, row in zip(PROMPTS, lengths, strict=True)]
    result = evaluate(
        tiny_ranker, read_length_file(write_lengths([*rows, ("train", "x", {"all": 1})])), "test"
    )
    scores = tiny_ranker.score(PROMPTS).numpy()
    expected = {
        "all": ranking_quality(scores, np.arange(10.0, 22)),
        "even": ranking_quality(scores[::2], 400.0 - np.arange(0, 12, 2)),
    }
    for model, quality in expected.items():
        column = result["models"][model]
        assert column["n"] == quality.n
        for measure in MEASURES:
            assert column[measure] == pytest.approx(getattr(quality, measure))
    taus = [quality.kendall_tau for quality in expected.values()]
    assert result["mean_kendall_tau"] == pytest.approx(np.mean(taus))
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("prompts", "lengths", "reason"),
    [
        ([], [], "the val split has 0 rows"),
        (["a"], [5], "the val split has 1 rows"),
        (["a", "write b", "c"], [5, 5, 5], "all lengths are equal"),
        (["a", "a", "a"], [5, 6, 7], "all scores are equal"),
    ],
    ids=["empty split", "one row", "constant lengths", "constant scores"],
)
def test_a_column_that_cannot_be_ranked_is_null_with_its_reason(
    tiny_ranker: Ranker, write_lengths: WriteLengths, prompts: list[str], lengths: list[int], reason: str
) -> None:
    rows = [("val", prompt, {"m": length}) for prompt, length in zip(prompts, lengths, strict=True)]
    file = read_length_file(write_lengths([*rows, ("train", "other", {"m": 9})]))
    result = evaluate(tiny_ranker, file, "val")
    assert result["models"]["m"] == {"n": len(rows), **dict.fromkeys(MEASURES), "reason": reason}
    assert result["mean_kendall_tau"] is None


def test_a_null_column_is_left_out_of_the_mean(tiny_ranker: Ranker, write_lengths: WriteLengths) -> None:
    rows = [("test", prompt, {"flat": 7, "m": n + 1}) for n, prompt in enumerate(PROMPTS)]
    result = evaluate(tiny_ranker, read_length_file(write_lengths(rows)), "all")
    assert result["models"]["flat"]["reason"] == "all lengths are equal"
    assert result["mean_kendall_tau"] == result["models"]["m"]["kendall_tau"]


def test_lengths_too_close_for_the_filter_have_a_tau_and_no_accuracy(
    tiny_ranker: Ranker, write_lengths: WriteLengths
) -> None:
    rows = [("test", prompt, {"m": 100 + n}) for n, prompt in enumerate(PROMPTS)]
    column = evaluate(tiny_ranker, read_length_file(write_lengths(rows)), "test")["models"]["m"]
    assert column["kendall_tau"] is not None
    assert (column["pair_accuracy"], column["impact_accuracy"]) == (None, None)
