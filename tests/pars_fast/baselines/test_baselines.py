import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pars_fast import Ranker
from pars_fast.baselines import BASELINES, fit_baseline, load_predictor
from pars_fast.baselines.alise import Alise
from pars_fast.baselines.elis import Elis
from pars_fast.baselines.encoder import FrozenEncoder
from pars_fast.baselines.mlp import build_mlp, fit_mlp, mlp_from_tensors, mlp_tensors
from pars_fast.cli import main
from pars_fast.data import LengthFile, read_length_file
from pars_fast.errors import CheckpointError, ParsFastError, PromptError
from pars_fast.evaluation import evaluate

pytest.importorskip("sklearn")

WriteLengths = Callable[..., Path]


def rows(count: int, split: str, seed: int) -> Iterator[tuple[str, str, dict[str, int]]]:
    """A longer prompt has a longer answer; `yes` and `no` are short ones whatever their length."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        letters = rng.choice(list("abcdefghij"), size=rng.integers(2, 25))
        yield split, " ".join(letters), {"m": 6 * len(letters) + int(rng.integers(0, 4))}


@pytest.fixture
def lengths(write_lengths: WriteLengths) -> Path:
    every = [*rows(160, "train", 0), *rows(60, "val", 1), *rows(60, "test", 2)]
    return write_lengths({row[1]: row for row in every}.values())


@pytest.fixture
def file(lengths: Path) -> LengthFile:
    return read_length_file(lengths)


@pytest.mark.parametrize("name", BASELINES)
def test_it_learns_and_is_the_same_after_loading(
    name: str, file: LengthFile, tiny_encoder: Path, tmp_path: Path
) -> None:
    predictor = fit_baseline(name, [file], encoder=str(tiny_encoder))
    quality = evaluate(predictor, file, "test")["mean_kendall_tau"]
    assert quality > (0.3 if name == "elis" else 0.5)
    predictor.save_pretrained(tmp_path / "saved")
    loaded = load_predictor(tmp_path / "saved")
    prompts = [row.prompt for row in file.select("test").rows]
    torch.testing.assert_close(loaded.score(prompts), predictor.score(prompts), atol=2e-2, rtol=1e-2)
    assert loaded.score(prompts).dtype == torch.float32
    assert loaded.token_map == predictor.token_map is not None
    assert not {path.suffix for path in (tmp_path / "saved").iterdir()} - {".json", ".safetensors"}


@pytest.mark.parametrize("name", ["elis", "head_margin"])
def test_the_seed_decides(name: str, file: LengthFile, tiny_encoder: Path) -> None:
    first, again, other = (
        fit_baseline(name, [file], encoder=str(tiny_encoder), seed=seed).score(["a b c", "d e"])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_frozen_ridge_is_an_ordinary_ranker(file: LengthFile, tiny_encoder: Path, tmp_path: Path) -> None:
    fit_baseline("frozen_ridge", [file], encoder=str(tiny_encoder)).save_pretrained(tmp_path / "ridge")
    trained = Ranker.from_pretrained(tmp_path / "ridge", device="cpu")
    untrained = Ranker.from_encoder(tiny_encoder, pooling="mean", max_tokens=64)
    for name, weight in untrained.model.state_dict().items():
        if not name.startswith("score_head"):
            torch.testing.assert_close(trained.model.state_dict()[name], weight, atol=2e-3, rtol=2e-3)


class TestAlise:
    def fitted(self, encoder: Path) -> Alise:
        prompts = ["a b c", "d e f", *(f"{x} {y}" for x in "ghij" for y in "klmn")]
        log_lengths = np.linspace(1, 6, len(prompts))
        return Alise.fit(prompts, log_lengths, FrozenEncoder.of(str(encoder)), seed=0)

    def test_a_stored_prompt_recalls_the_lengths_near_it(
        self, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alise = self.fitted(tiny_encoder)
        monkeypatch.setattr("pars_fast.baselines.alise.MIN_SIMILARITY", 0.9999)
        assert alise.score(["a b c"]).item() == pytest.approx(1.0, abs=1e-3)

    def test_with_nothing_near_the_network_answers(
        self, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alise = self.fitted(tiny_encoder)
        monkeypatch.setattr("pars_fast.baselines.alise.MIN_SIMILARITY", 2.0)
        features = torch.from_numpy(FrozenEncoder.of(str(tiny_encoder)).embed(["z z z z"]))
        torch.testing.assert_close(alise.score(["z z z z"]), alise.network(features)[:, 0])


def test_a_network_is_the_same_after_its_tensors() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(5, 3, size=(200, 6)).astype(np.float32)
    model = fit_mlp(features, features @ rng.normal(size=6), (16, 8), seed=0)
    again = mlp_from_tensors({**mlp_tensors(model), "other": torch.zeros(1)})
    x = torch.from_numpy(features)
    assert torch.equal(model(x), again(x))
    assert np.corrcoef(model(x)[:, 0], features @ np.ones(6))[0, 1] != 0


def test_prompts_that_cannot_be_scored(tiny_encoder: Path) -> None:
    prompt_length = load_predictor("prompt_length")
    nothing: list[str] = []
    for prompts in (nothing, "one string"):
        with pytest.raises(PromptError, match="prompts must be a list of strings, at least one"):
            prompt_length.score(prompts)
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        FrozenEncoder.of(str(tiny_encoder)).embed(["a", " "])


def test_an_unknown_baseline_lists_those_there_are(file: LengthFile) -> None:
    with pytest.raises(
        ParsFastError, match=r"baseline must be one of prompt_length, tfidf_ridge, .*got 'magic'"
    ):
        fit_baseline("magic", [file])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model.safetensors").write_bytes(b"cut"), "damaged baseline elis"),
        (lambda d: (d / "model.safetensors").unlink(), "damaged baseline elis"),
        (lambda d: (d / "config.json").write_text('{"baseline": "magic"}'), "got 'magic'"),
        (lambda d: (d / "config.json").write_text('{"baseline": "elis"}'), "elis needs an encoder"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: cannot be read"),
    ],
    ids=["cut", "gone", "unknown", "no encoder", "no JSON"],
)
def test_a_damaged_directory_is_named(
    tiny_encoder: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    elis = Elis(build_mlp([32, 4, 1]), FrozenEncoder.of(str(tiny_encoder)))
    elis.save_pretrained(tmp_path / "elis")
    damage(tmp_path / "elis")
    with pytest.raises(CheckpointError, match=message):
        load_predictor(tmp_path / "elis")


def test_the_command_then_a_comparison_of_all(
    lengths: Path, tiny_encoder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "baselines", ["--data", str(lengths)]
    assert (
        main(["baseline", "tfidf_ridge", "alise", *data, "--out", str(out), "--encoder", str(tiny_encoder)])
        == 0
    )
    assert f"alise written to {out / 'alise'}" in capsys.readouterr().out
    result = tmp_path / "all.json"
    rankers = [
        str(checkpoint),
        str(out / "tfidf_ridge"),
        f"near={out / 'alise'},{out / 'alise'}",
        "prompt_length",
    ]
    command = [
        "evaluate",
        "--all",
        "--data-dir",
        str(lengths.parent),
        "--ranker",
        *rankers,
        "--json",
        str(result),
    ]
    assert main(command) == 0
    assert "paired bootstrap" in capsys.readouterr().out
    written = json.loads(result.read_text())
    assert set(written) == {"toy", "all"}
    assert set(written["all"]["predictors"]) == {"ranker", "tfidf_ridge", "near", "prompt_length"}
    assert written["toy"]["predictors"]["near"]["tau_std_over_seeds"] == 0
