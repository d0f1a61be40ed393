"""The batch job without a model: groups, the store, resuming, recomputing."""

import json
import math
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pars_fast.batch import cli
from pars_fast.batch.groups import Task, length_groups
from pars_fast.batch.job import Limits, Piece, Report, run_job
from pars_fast.batch.lengths import UNKNOWN_TOKENS, Perception
from pars_fast.batch.store import Completion, CompletionStore
from pars_fast.cli import main
from pars_fast.collect import read_prompt_lines
from pars_fast.errors import DataError

LIMITS = Limits(max_tokens=200, batch_tokens=1000, max_batch=5)


class Numbers:
    """An engine: to `5 words`, the answer is `0 1 2 3 4`. Ends without a word after `dies_after` answers."""

    max_model_len = 1000

    def __init__(self, dies_after: float = math.inf, says: str | None = None) -> None:
        self.batches: list[list[Piece]] = []
        self._left, self._says = dies_after, says

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [len(prompt.split()) for prompt in prompts]

    def generate(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, Completion]]:
        self.batches.append(list(pieces))
        for piece in sorted(pieces, key=length_of):  # the shortest finishes first
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            if self._says is not None:
                yield piece.number, Completion(self._says, 4, "stop")
                continue
            made = min(length_of(piece), piece.max_tokens)
            reason = "stop" if made == length_of(piece) else "length"
            yield piece.number, Completion(" ".join(map(str, range(made))), made, reason)


def length_of(piece: Piece) -> int:
    return int(piece.prompt.split()[0])


def right_text(prompt: str) -> str:
    return " ".join(map(str, range(min(int(prompt.split()[0]), LIMITS.max_tokens))))


def run(
    tmp_path: Path, prompts: list[str], engine: Numbers, lengths: object = None, settings: str = "s"
) -> Report:
    with closing(CompletionStore(tmp_path / "s.sqlite", settings, prompts)) as store:
        report = run_job(prompts, store, engine, LIMITS, lengths)  # type: ignore[arg-type]
        store.export(tmp_path / "out.jsonl")
    return report


def written(tmp_path: Path) -> list[tuple[str, str]]:
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    return [(row["prompt"], row["text"]) for row in map(json.loads, lines)]


def truth(prompts: Sequence[str]) -> list[float]:
    return [float(prompt.split()[0]) for prompt in prompts]


def too_short(prompts: Sequence[str]) -> list[float]:
    return [1.0] * len(prompts)


PROMPTS = [f"{length} words" for length in (30, 3, 150, 80, 3, 7, 500, 33, 1, 64, 65, 90)]


@pytest.mark.parametrize("lengths", [None, truth, too_short])
def test_every_prompt_is_completed_in_order_with_the_right_text(tmp_path: Path, lengths: object) -> None:
    report = run(tmp_path, PROMPTS, Numbers(), lengths)
    assert written(tmp_path) == [(prompt, right_text(prompt)) for prompt in PROMPTS]
    assert (report.wanted, report.already, report.completed) == (12, 0, 12)
    assert report.output_tokens == sum(min(int(prompt.split()[0]), 200) for prompt in PROMPTS)


def test_answers_that_stop_short_are_computed_again_in_one_last_batch(tmp_path: Path) -> None:
    engine = Numbers()
    report = run(tmp_path, PROMPTS, engine, too_short)  # they stop at 32 tokens
    longer = [prompt for prompt in PROMPTS if int(prompt.split()[0]) > 32]
    assert report.recomputed == len(longer)
    assert sorted(piece.prompt for piece in engine.batches[-1]) == sorted(longer)
    assert report.wasted_tokens == 32 * len(longer)


def test_known_lengths_waste_nothing(tmp_path: Path) -> None:
    engine = Numbers()
    report = run(tmp_path, PROMPTS, engine, truth)
    assert (report.recomputed, report.wasted_tokens) == (0, 0)
    assert report.batches == len(engine.batches) > 2


def test_no_lengths_is_one_batch(tmp_path: Path) -> None:
    engine = Numbers()
    assert run(tmp_path, PROMPTS, engine).batches == 1
    assert [piece.prompt for piece in engine.batches[0]] == PROMPTS


@pytest.mark.parametrize("lengths", [None, truth, too_short])
@pytest.mark.parametrize("dies_after", range(0, 17, 4))
def test_a_job_that_dies_goes_on_where_it_was(tmp_path: Path, lengths: object, dies_after: int) -> None:
    first = Numbers(dies_after)
    try:
        run(tmp_path, PROMPTS, first, lengths)
    except KeyboardInterrupt:
        assert not (tmp_path / "out.jsonl").exists()
    kept = sqlite3.connect(tmp_path / "s.sqlite").execute("SELECT count(*) FROM completions").fetchone()[0]
    second = Numbers()
    report = run(tmp_path, PROMPTS, second, lengths)
    assert written(tmp_path) == [(prompt, right_text(prompt)) for prompt in PROMPTS]
    assert (report.already, report.completed) == (kept, 12 - kept)
    asked = {piece.number for batch in second.batches for piece in batch}
    assert len(asked) == 12 - kept
    assert kept <= dies_after


def test_the_input_may_grow_and_change_its_order(tmp_path: Path) -> None:
    run(tmp_path, PROMPTS, Numbers())
    engine = Numbers()
    grown = ["9 words", *reversed(PROMPTS), "3 words"]  # which occurs twice already
    assert run(tmp_path, grown, engine).already == 12
    assert [piece.prompt for piece in engine.batches[0]] == ["9 words", "3 words"]
    assert [prompt for prompt, _ in written(tmp_path)] == grown


def test_other_settings_are_another_job(tmp_path: Path) -> None:
    run(tmp_path, PROMPTS, Numbers())
    assert run(tmp_path, PROMPTS, Numbers(), settings="other").already == 0
    engine = Numbers()
    assert run(tmp_path, PROMPTS, engine).already == 12
    assert not engine.batches


def test_other_arguments_of_the_engine_are_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model answers otherwise in bf16; in which order the arguments are given is the same to it."""
    engines: list[Numbers] = []

    def start(_: object) -> Numbers:
        engines.append(Numbers())
        return engines[-1]

    monkeypatch.setattr(cli, "_engine", start)
    monkeypatch.setattr(cli, "require_extra", lambda *_: None)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    files = ["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "o.jsonl")]
    first, reordered, other = (
        '{"dtype": "float32", "seed": 3}',
        '{"seed": 3, "dtype": "float32"}',
        '{"dtype": "bfloat16", "seed": 3}',
    )
    for settings, started in ((first, 1), (reordered, 1), (other, 2), (first, 2)):
        assert main(["batch", *files, "--model", "m", "--lengths", "none", "--engine", settings]) == 0
        assert len(engines) == started


def test_an_answer_is_cut_where_the_model_ends(tmp_path: Path) -> None:
    prompt = "150 " + "x " * 899  # leaves room for 100 tokens
    run(tmp_path, [prompt], Numbers(), truth)
    assert written(tmp_path)[0][1] == " ".join(map(str, range(100)))


# --- Groups -------------------------------------------------------------------------------------------------

TASKS = st.lists(st.tuples(st.integers(1, 400), st.floats(0.5, 500)), min_size=1, max_size=60)


@given(
    columns=TASKS,
    max_tokens=st.integers(1, 300),
    batch_tokens=st.integers(1, 3000),
    max_batch=st.integers(1, 9),
)
def test_groups_hold_every_task_once_within_the_limits(
    columns: list[tuple[int, float]], max_tokens: int, batch_tokens: int, max_batch: int
) -> None:
    tasks = [Task(number, *column) for number, column in enumerate(columns)]
    groups = length_groups(tasks, max_tokens=max_tokens, batch_tokens=batch_tokens, max_batch=max_batch)
    grouped = [task for group in groups for task in group.tasks]
    assert sorted(task.number for task in grouped) == list(range(len(tasks)))
    assert [task.expected_tokens for task in grouped] == sorted(task.expected_tokens for task in tasks)
    for group in groups:
        assert 1 <= len(group.tasks) <= max_batch
        assert (
            min(max_tokens, max(task.expected_tokens for task in group.tasks))
            <= group.max_tokens
            <= max_tokens
        )
        held = len(group.tasks) * (max(task.prompt_tokens for task in group.tasks) + group.max_tokens)
        assert held <= batch_tokens or len(group.tasks) == 1


def test_batches_of_short_answers_are_larger() -> None:
    tasks = [Task(number, 10, 10.0 if number < 40 else 300.0) for number in range(80)]
    sizes = [
        len(group.tasks) for group in length_groups(tasks, max_tokens=500, batch_tokens=2000, max_batch=64)
    ]
    assert sizes[0] > 5 * sizes[-2]


# --- Perception ---------------------------------------------------------------------------------------------


def test_the_models_own_estimate_is_read_and_counted() -> None:
    perception = Perception(Numbers(says="about 120 tokens"))
    assert perception(["1 a", "2 b"]) == [120.0, 120.0]
    assert (perception.output_tokens, perception.unknown) == (8, 0)


def test_an_estimate_without_a_number_is_the_median() -> None:
    perception = Perception(Numbers(says="no idea"))
    assert perception(["1 a", "2 b"]) == [UNKNOWN_TOKENS] * 2
    assert perception.unknown == 2


def test_a_prompt_without_room_for_the_question_is_not_asked_about() -> None:
    engine = Numbers(says="50")
    assert Perception(engine)(["1 " + "x " * 950, "2 b"]) == [50.0, 50.0]
    assert len(engine.batches[0]) == 1


# --- Bad input ----------------------------------------------------------------------------------------------


def test_prompts_keep_their_lines_and_repeat(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\n\n b \r\na\n")
    assert read_prompt_lines(path) == [(1, "a"), (3, "b"), (4, "a")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.jsonl",
            '{"prompt": "a"}\n\n{"text": "b"}\n',
            r'p\.jsonl:3: expected a JSON object with a "prompt"',
        ),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ""}\n', r'p\.jsonl:2: "prompt" must be a non-empty string'),
        ("p.txt", "\n \n", r"p\.txt: no prompts there"),
    ],
)
def test_bad_input_names_file_and_line(
    tmp_path: Path, name: str, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompt_lines(path)
    command = ["batch", "--prompts", str(path), "--out", str(tmp_path / "o.jsonl"), "--model", "none"]
    assert main(command) == 2
    assert name in capsys.readouterr().err


def test_options_out_of_range_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["batch", "--prompts", "p", "--out", str(tmp_path / "o"), "--model", "m"]
    assert main([*command, "--max-batch", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err
    for temperature in ("-1", "nan", "inf"):
        assert main([*command, "--temperature", temperature]) == 2
        assert "--temperature must be a number >= 0" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]"])
def test_settings_of_the_engine_that_are_no_object_are_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["batch", "--prompts", "p.txt", "--out", "o.jsonl", "--model", "m", "--engine", text])
    assert "--engine" in capsys.readouterr().err


def test_a_store_that_is_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    path.write_text("not a database, but long enough to be looked at by SQLite, which reads 100 bytes" * 3)
    with pytest.raises(DataError, match=r"s\.sqlite: not a file of completions"):
        CompletionStore(path, "s", PROMPTS)


def test_a_store_that_breaks_under_way_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with closing(CompletionStore(path, "s", PROMPTS)) as store:
        with closing(sqlite3.connect(path)) as other:  # what another program may do
            other.execute("DROP TABLE completions")
        uses: list[Callable[[], object]] = [
            lambda: store.add(0, Completion("", 1, "stop")),
            lambda: store.get(0),
            store.missing,
            lambda: store.export(tmp_path / "out.jsonl"),
        ]
        for use in uses:
            with pytest.raises(DataError, match=r"s\.sqlite: .* \(no such table: completions\); give"):
                use()
