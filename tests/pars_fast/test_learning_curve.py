"""The learning curve on toys: what each point trains on, that none is trained twice, and its command."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pars_fast import learning_curve as module
from pars_fast import training_runs
from pars_fast.cli import main
from pars_fast.data import LengthFile, read_length_file
from pars_fast.learning_curve import answered_by, learning_curve, points
from pars_fast.simulation.study import read_table
from pars_fast.training import Recipe

pytest.importorskip("accelerate")

WriteLengths = Callable[..., Path]
QUICK = Recipe(loss="huber", pooling="cls", epochs=1, batch_prompts=16, learning_rate=3e-3, max_tokens=32,
               max_prompts_per_file=30, layers=1)  # fmt: skip


@pytest.fixture
def toy(write_lengths: WriteLengths) -> Path:
    rng = np.random.default_rng(0)
    rows = {}
    for index in range(150):
        letters = " ".join(rng.choice(list("abcdefghij"), size=rng.integers(1, 25)))
        lengths = {model: 3 * len(letters) + int(rng.integers(0, 9)) for model in ("m", "n", "o")}
        rows[letters] = (["train", "val", "test"][index % 3], letters, lengths)
    return write_lengths(rows.values())


@pytest.fixture(autouse=True)
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in (("PROMPTS", (20, None)), ("MODELS", (1,)), ("LAYERS", (2,)), ("BUDGET", QUICK)):
        monkeypatch.setattr(module, name, values)


def test_one_thing_is_varied_at_a_time() -> None:
    found = [(p.axis, p.prompts, p.models, p.layers, p.seed) for p in points((0, 1), (0,))]
    assert found == [
        ("prompts", 20, None, 1, 0),
        ("prompts", None, None, 1, 0),
        ("models", 30, 1, 1, 0),
        ("prompts", 20, None, 1, 1),
        ("prompts", None, None, 1, 1),
        ("models", 30, 1, 1, 1),
        ("layers", 30, None, 2, 0),
    ]


def test_fewer_answers_are_a_sample_of_each_training_row(toy: Path) -> None:
    file = read_length_file(toy)
    assert answered_by(file, None, 0) is file
    few = answered_by(file, 1, 0)
    for before, after in zip(file.rows, few.rows, strict=True):
        assert len(after.output_tokens) == (1 if before.split == "train" else 3)
        assert after.output_tokens.items() <= before.output_tokens.items()
    assert set(few.select("train").models) == {"m", "n", "o"}
    assert answered_by(file, 1, 0).rows == few.rows
    assert answered_by(file, 1, 1).rows != few.rows


def test_each_point_is_trained_once_and_measured(
    toy: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[LengthFile] = [read_length_file(toy)]
    started: list[str] = []

    def curve() -> list[dict[str, object]]:
        runs = learning_curve(
            files, files, tmp_path / "runs", init=str(tiny_encoder), seeds=(0, 1), on_run=started.append
        )
        return list(runs)

    rows = curve()
    assert len(rows) == len(set(started)) == 7
    assert {row["split"] for row in rows} == {"test"}
    monkeypatch.setattr(training_runs, "train", lambda *_, **__: pytest.fail("a run is repeated"))
    assert curve() == rows


def test_the_command(
    toy: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tmp_path / "curve.csv"
    where = ["--data", str(toy), "--data-dir", str(tmp_path), "--out", str(tmp_path / "runs")]
    options = ["--init", str(tiny_encoder), "--seeds", "2", "--csv", str(csv)]
    assert main(["learning-curve", *where, *options]) == 0
    assert {row["axis"] for row in read_table(csv)} == {"prompts", "models", "layers"}
    printed = capsys.readouterr().out
    assert "by prompts" in printed
    assert "all" in printed


def test_a_curve_without_a_run_is_refused(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--data", str(toy), "--data-dir", str(tmp_path), "--csv", str(tmp_path / "curve.csv")]
    runs = ["--out", str(tmp_path / "runs"), "--seeds", "0", "--layer-seeds", "0"]
    assert main(["learning-curve", *files, *runs]) == 2
    assert "give --seeds or --layer-seeds of at least 1" in capsys.readouterr().err
