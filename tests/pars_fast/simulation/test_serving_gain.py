"""What predictors are worth in serving: the ends of the scale, and that all see the same requests."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pars_fast.calibration import TokenMap
from pars_fast.cli import main
from pars_fast.data import LengthFile, read_length_file
from pars_fast.errors import DataError
from pars_fast.simulation.serving_gain import GUARDS, MIXED, PERFECT, serving_gain
from pars_fast.simulation.study import read_table
from pars_fast.simulation.workload import Workload, make_workload


class Knows:
    """Scores a prompt by a function of it."""

    token_map: TokenMap | None = None

    def __init__(self, score: Callable[[str], float]) -> None:
        self._score = score

    def score(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([self._score(prompt) for prompt in prompts], dtype=torch.float32)

    def save_pretrained(self, path: str | Path) -> None:
        raise AssertionError("nobody is to save it")


def make_file(folder: Path, name: str, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    path = folder / f"lengths_{name}.jsonl"
    rows = [{"split": "test", "prompt": f"{name} {index} {tokens}", "output_tokens": {"m": tokens}}
            for index, tokens in enumerate(rng.geometric(1 / 150, 60).tolist())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[LengthFile]:
    return [read_length_file(make_file(tmp_path, name, seed)) for seed, name in enumerate(("one", "two"))]


@pytest.fixture
def trace() -> Workload:
    rng = np.random.default_rng(0)
    return make_workload("trace", np.cumsum(rng.exponential(1, 900)), np.ones(900), np.ones(900))


def test_the_scale_runs_from_a_reversed_order_to_a_perfect_one(
        files: list[LengthFile], trace: Workload) -> None:
    right = Knows(lambda prompt: float(np.log(int(prompt.split()[-1]))))
    wrong = Knows(lambda prompt: -float(np.log(int(prompt.split()[-1]))))
    rows = serving_gain(files, {"right": right, "wrong": wrong}, [trace], loads=(2.0,), seeds=(0, 1),
                        requests=900)
    cells = {(row["workload"], row["predictor"], row["guard"]): row for row in rows}
    assert {row["workload"] for row in rows} == {"one", "two", MIXED}
    guarded, free = GUARDS
    for workload in ("one", "two", MIXED):
        best, known = cells[workload, PERFECT, free], cells[workload, "right", free]
        assert best["runs"] == 2
        assert best["gain_captured"] == pytest.approx(1)
        assert known["tau"] == pytest.approx(1, abs=1e-3)
        for gain in ("gain_captured", "gain_captured_e2e"):  # not all: a prompt is scored once it has to wait
            assert 0.85 < known[gain] < 1.02
        assert cells[workload, PERFECT, guarded]["gain_captured"] < 1
        reversed_order = cells[workload, "wrong", free]
        assert reversed_order["tau"] == pytest.approx(-1, abs=1e-3)
        assert reversed_order["gain_captured"] < 0
        assert cells[workload, "fcfs", free]["gain_captured"] == 0


def test_nothing_to_rank_is_said(tmp_path: Path, trace: Workload) -> None:
    path = tmp_path / "lengths_same.jsonl"
    rows = [{"split": "test", "prompt": str(index), "output_tokens": {"m": 7}} for index in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="no file has"):
        serving_gain([read_length_file(path)], {"x": Knows(len)}, [trace])


def test_the_command(tmp_path: Path, files: list[LengthFile], trace: Workload,
                     capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{time:.3f},5,5\n" for time in trace.arrival_s]
    (tmp_path / "trace_x.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(lines))
    where = ["--data-dir", str(tmp_path), "--traces", str(tmp_path), "--csv", str(tmp_path / "out.csv")]
    few = ["--ranker", "prompt_length", "--seeds", "1", "--requests", "600"]
    assert main(["serving-gain", *where, *few]) == 0
    rows = read_table(tmp_path / "out.csv")
    assert {row["predictor"] for row in rows} == {"fcfs", PERFECT, "prompt_length"}
    assert "all files mixed" in capsys.readouterr().out
    (tmp_path / "trace_x.csv").unlink()
    assert main(["serving-gain", *where]) == 2
    assert "no trace_" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seeds", "--requests", "--max-prompts-per-file"])
def test_numbers_that_leave_nothing_to_measure_are_refused(
        option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--traces", str(tmp_path), "--csv", str(tmp_path / "out.csv")]
    assert main(["serving-gain", *where, option, "0"]) == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err
