"""What a study may use again of the runs it finds, and what not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pars_fast import training_runs
from pars_fast.data import LengthFile, read_length_file
from pars_fast.errors import ParsFastError
from pars_fast.training import Recipe
from pars_fast.training_runs import trained_once

WriteLengths = Callable[..., Path]


@pytest.fixture
def files(write_lengths: WriteLengths) -> list[LengthFile]:
    """Two files that differ in one length."""
    return [
        read_length_file(write_lengths([("train", "a", {"m": length})], f"lengths_{length}.jsonl"))
        for length in (3, 4)
    ]


@pytest.fixture
def encoder(tiny_encoder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of runs that were started; nothing is trained there."""
    runs: list[Path] = []

    def train(_: Any, __: str, ___: Recipe, out: Path, **____: Any) -> None:
        out.mkdir(parents=True, exist_ok=True)
        runs.append(out)

    monkeypatch.setattr(training_runs, "train", train)
    return runs


def test_the_same_run_is_found_again(
    files: list[LengthFile], encoder: Path, tiny_encoder: Path, started: list[Path], tmp_path: Path
) -> None:
    for init in (encoder, tiny_encoder):  # one encoder, wherever it lies
        run = trained_once(tmp_path / "run", files[:1], str(init), Recipe(), exclude=files[1:])
    assert started == [run]


@pytest.mark.parametrize("change", ["recipe", "init", "data", "exclude", "earlier version"])
def test_a_run_that_came_from_something_else_is_refused(
    files: list[LengthFile], encoder: Path, started: list[Path], tmp_path: Path, change: str
) -> None:
    run = trained_once(tmp_path / "run", files[:1], str(encoder), Recipe())
    recipe, training, exclude = Recipe(), files[:1], files[:0]
    if change == "recipe":
        recipe = Recipe(epochs=4)
    elif change == "init":
        weights = load_file(encoder / "model.safetensors")
        name = next(iter(weights))
        save_file({**weights, name: torch.zeros_like(weights[name])}, encoder / "model.safetensors")
    elif change == "data":
        training = files[1:]
    elif change == "exclude":
        exclude = files[1:]
    else:
        (run / "done").write_text("")
    with pytest.raises(ParsFastError, match=r"run is of a run with another recipe.*; give another --out"):
        trained_once(run, training, str(encoder), recipe, exclude=exclude)
    assert started == [run]
