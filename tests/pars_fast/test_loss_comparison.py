import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pars_fast import loss_comparison, training_runs
from pars_fast.cli import main
from pars_fast.data import read_length_file
from pars_fast.errors import ParsFastError
from pars_fast.loss_comparison import Comparison, compare_losses, standings
from pars_fast.training import Recipe

pytest.importorskip("accelerate")

WriteLengths = Callable[..., Path]
QUICK = Recipe(pooling="cls", epochs=1, batch_prompts=16, max_tokens=32, layers=1)


@pytest.fixture
def toy(write_lengths: WriteLengths) -> Path:
    rng = np.random.default_rng(0)
    rows = {}
    for index in range(120):
        letters = " ".join(rng.choice(list("abcdefghij"), size=rng.integers(1, 25)))
        rows[letters] = (["train", "val", "test"][index % 3], letters, {"m": 3 * len(letters)})
    return write_lengths(rows.values())


def test_each_loss_and_seed_is_trained_once_and_measured(
    toy: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = read_length_file(toy)
    comparison = Comparison(
        [file],
        init=str(tiny_encoder),
        budget=QUICK,
        learning_rates=(1e-5, 3e-3),
        losses=("margin", "huber"),
        seeds=(0, 1),
    )
    started: list[str] = []
    rows = compare_losses(comparison, [file], tmp_path / "runs", on_run=started.append)
    assert len(rows) == 4
    assert len(started) == len(set(started)) == 6  # both rates with the first seed, then the chosen one
    assert {(row["loss"], row["seed"]) for row in rows} == {
        (loss, seed) for loss in ("margin", "huber") for seed in (0, 1)
    }
    assert len({row["learning_rate"] for row in rows if row["loss"] == "huber"}) == 1

    monkeypatch.setattr(training_runs, "train", lambda *_, **__: pytest.fail("a run is repeated"))
    assert compare_losses(comparison, [file], tmp_path / "runs") == rows


def test_the_command_compares_what_it_is_told_to(
    toy: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_comparison, "BUDGET", QUICK)
    table = tmp_path / "losses.csv"
    files = ["--data", str(toy), "--data-dir", str(toy.parent)]
    made = ["--init", str(tiny_encoder), "--out", str(tmp_path / "runs"), "--csv", str(table)]
    asked = ["--losses", "huber", "margin", "--learning-rates", "3e-3", "--layers", "1"]
    assert main(["losses", *files, *made, *asked, "--max-prompts-per-file", "20", "--seeds", "2"]) == 0
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["loss"] for row in rows] == ["huber", "margin"] * 2
    assert {(row["layers"], row["max_prompts_per_file"], row["learning_rate"]) for row in rows} == {
        ("1", "20", "0.003")
    }
    assert {run.name for run in (tmp_path / "runs").iterdir()} == {
        f"{loss}-0.003-{seed}" for loss in ("huber", "margin") for seed in (0, 1)
    }
    recipe = json.loads((tmp_path / "runs" / "huber-0.003-0" / "training.json").read_text())["recipe"]
    assert (recipe["layers"], recipe["max_prompts_per_file"]) == (1, 20)


def test_the_differences_are_paired_by_seed() -> None:
    levels = {0: 0.1, 1: 0.3, 2: 0.2}  # the seeds differ a lot, the losses by nearly the same in each
    gaps = {0: 0.05, 1: 0.06, 2: 0.04}
    rows = [
        {"loss": loss, "seed": seed, "file": file, "kendall_tau": level + (gaps[seed] if loss == "a" else 0)}
        for seed, level in levels.items()
        for loss in ("a", "b")
        for file in ("x", "y")
    ]
    found = standings([*rows, {**rows[0], "file": "other", "kendall_tau": 1.0}], ["x", "y"])
    assert found["a"].mean == pytest.approx(0.25)
    assert found["a"].difference is None
    assert found["b"].mean == pytest.approx(0.2)
    assert found["b"].half_width == pytest.approx(4.303 * 0.1 / np.sqrt(3), rel=1e-3)  # t of 2 degrees
    assert found["b"].difference == pytest.approx(0.05)
    assert found["b"].difference_half_width == pytest.approx(4.303 * 0.01 / np.sqrt(3), rel=1e-3)
    assert found["b"].p_value is not None
    assert found["b"].p_value < 0.02


@pytest.mark.parametrize("seeds", [0, 1])
def test_fewer_than_two_seeds_are_refused(
    capsys: pytest.CaptureFixture[str], toy: Path, tmp_path: Path, seeds: int
) -> None:
    with pytest.raises(ParsFastError, match="at least two seeds"):
        Comparison([read_length_file(toy)], seeds=range(seeds))
    files = ["--data", str(toy), "--data-dir", str(tmp_path)]
    out = ["--out", str(tmp_path / "runs"), "--csv", str(tmp_path / "losses.csv")]
    assert main(["losses", *files, *out, "--seeds", str(seeds)]) == 2
    assert "at least two seeds" in capsys.readouterr().err
