"""Recording: what is kept, what survives, and that it never blocks."""

import json
import resource
import threading
from pathlib import Path
from typing import Any

import pytest

from pars_fast.data import label_prompts, read_length_file, split_of
from pars_fast.errors import DataError
from pars_fast.integration import recorder as recorder_module
from pars_fast.integration.background import Background
from pars_fast.integration.metrics import CounterFile
from pars_fast.integration.prompt_window import MAX_IDS
from pars_fast.integration.recorder import Recorder
from pars_fast.live_calibration import Ending


def decode(ids: list[int], shared: int = 0) -> str:
    return " ".join(f"word{i}" for i in ids)


def make_recorder(path: Path, prompts: Any = "plain", counters: CounterFile | None = None) -> Recorder:
    return Recorder(path, prompts, "my-model", counters or CounterFile(None, 0), lambda: decode)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_plain_prompts_can_be_trained_on(tmp_path: Path) -> None:
    path, counters = tmp_path / "lengths_mine.jsonl", CounterFile(None, 0)
    recorder = make_recorder(path, counters=counters)
    for i in range(200):
        recorder.add([i], 10 + i, Ending.COMPLETE)
    recorder.add([7, 8], 99, Ending.CAPPED)
    recorder.add([], 5, Ending.COMPLETE)  # embeddings only
    recorder.add([9], 0, Ending.COMPLETE)  # pooling
    assert recorder.flush(20.0)
    file = read_length_file(path)
    assert (file.name, file.models, len(file.rows)) == ("mine", ["my-model"], 201)
    assert all(row.split == split_of(row.prompt) for row in file.rows)  # as `pars-fast collect` has it
    train = label_prompts([file], "train", "my-model")
    assert 100 < len(train.prompts) < 180
    assert rows(path)[-1] | {"id": "", "split": ""} == {
        "id": "",
        "split": "",
        "prompt": "word7 word8",
        "prompt_tokens": 2,
        "output_tokens": {"my-model": 99},
        "finish_reason": "length",
    }
    assert counters.values["pars_recorded"] == 201
    assert path.stat().st_mode & 0o077 == 0  # prompts are nobody else's business


def test_hashed_prompts_tell_equal_ones_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    recorder = make_recorder(path, "hashed")
    for ids in ([1, 2], [1, 2], [3]):
        recorder.add(ids, 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    first, same, other = rows(path)
    assert first == same
    assert first["prompt"] != other["prompt"]
    assert "word" not in path.read_text()
    with pytest.raises(DataError, match="PARS_RECORD_PROMPTS=plain"):
        read_length_file(path)


def test_of_a_long_prompt_as_much_is_kept_as_the_ranker_sees(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    recorder = make_recorder(path)
    recorder.add(list(range(100_000)), 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    (row,) = rows(path)
    assert (len(row["prompt"].split()), row["prompt_tokens"]) == (MAX_IDS, 100_000)


def test_a_line_that_a_kill_tore_is_cut_off_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text('{"prompt": "whole"}\n{"id": "0123", "prompt": "to')
    recorder = make_recorder(path)
    recorder.add([1], 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    assert [row["prompt"] for row in rows(path)] == ["whole", "word1"]


@pytest.mark.parametrize(
    "last",
    ["[DEFAULT]\nname = value", '{"prompt": "a file of somebody el', "x" * 2**21],
    ids=["ini", "json", "long"],
)
def test_a_file_that_ends_in_something_else_is_left_alone(
    tmp_path: Path, last: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, counters = tmp_path / "mine", CounterFile(None, 0)
    path.write_text(f"first\n{last}")
    recorder = make_recorder(path, counters=counters)
    for i in range(5):
        recorder.add([i], 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    assert path.read_text() == f"first\n{last}"
    assert counters.values["pars_record_dropped"] == 5
    (said,) = caplog.messages
    assert f"{path} ends in half a line" in said
    assert "name another file" in said


def test_a_last_line_without_its_end_is_ended(tmp_path: Path) -> None:
    """As other programs write it, and as a kill may leave ours."""
    path = tmp_path / "lengths.jsonl"
    path.write_text('{"prompt": "other"}')
    recorder = make_recorder(path)
    recorder.add([1], 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    assert [row["prompt"] for row in rows(path)] == ["other", "word1"]


def test_a_full_disk_ends_the_recording(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Said once, and everything that is not kept is counted."""
    path, counters = tmp_path / "lengths.jsonl", CounterFile(None, 0)
    path.symlink_to("/dev/full")
    recorder = make_recorder(path, counters=counters)
    for i in range(10):
        recorder.add([i], 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    recorder.add([11], 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    assert (counters.values["pars_recorded"], counters.values["pars_record_dropped"]) == (0, 11)
    (said,) = caplog.messages
    assert said.endswith(f"{path}: cannot be written (No space left on device)")


def test_a_write_that_is_cut_short_leaves_no_torn_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, counters = tmp_path / "lengths.jsonl", CounterFile(None, 0)
    recorder = make_recorder(path, counters=counters)
    recorder.add([1], 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    whole = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 20, hard))
    try:
        for i in range(5):
            recorder.add([i], 5, Ending.COMPLETE)
        assert recorder.flush(20.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == whole
    assert (counters.values["pars_recorded"], counters.values["pars_record_dropped"]) == (1, 5)
    assert sum("recording ends" in message for message in caplog.messages) == 1


def test_a_tokenizer_that_cannot_be_loaded_is_tried_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counters, tries = CounterFile(None, 0), []

    def load() -> Any:
        tries.append(1)
        raise OSError("no tokenizer there")

    recorder = Recorder(tmp_path / "lengths.jsonl", "plain", "my-model", counters, load)
    for i in range(5):
        recorder.add([i], 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    assert (len(tries), counters.values["pars_record_dropped"]) == (1, 5)
    assert caplog.messages == ["pars-fast: recording ends, serving goes on: no tokenizer there"]


@pytest.mark.parametrize("text", [" \n", "half a character \ud800", None], ids=["blank", "no text", "raises"])
def test_a_prompt_that_cannot_be_kept_harms_no_other(tmp_path: Path, text: str | None) -> None:
    def decode_or_not(ids: list[int], shared: int) -> str:
        if ids == [0] and text is None:
            raise ValueError("no such id")
        return text if ids == [0] and text is not None else decode(ids)

    path, counters = tmp_path / "lengths.jsonl", CounterFile(None, 0)
    recorder = Recorder(path, "plain", "my-model", counters, lambda: decode_or_not)
    for ids in ([0], [1]):
        recorder.add(ids, 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    assert [row.prompt for row in read_length_file(path).rows] == ["word1"]
    assert (counters.values["pars_recorded"], counters.values["pars_record_dropped"]) == (1, 1)


def test_engines_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    recorders = [make_recorder(path) for _ in range(3)]
    for i in range(300):
        recorders[i % 3].add([i], 5, Ending.COMPLETE)
    assert all(recorder.flush(20.0) for recorder in recorders)
    assert {row["prompt"] for row in rows(path)} == {decode([i]) for i in range(300)}


def test_it_never_blocks_and_counts_what_it_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "MAX_WAITING", 10)
    counters, disk = CounterFile(None, 0), threading.Event()
    recorder = make_recorder(tmp_path / "lengths.jsonl", counters=counters)

    def hang() -> None:
        disk.wait(20.0)

    recorder._background.submit(hang)  # the disk does
    for i in range(50):
        recorder.add([i], 5, Ending.COMPLETE)
    disk.set()
    assert recorder.flush(20.0)
    assert counters.values["pars_recorded"] + counters.values["pars_record_dropped"] == 50
    assert counters.values["pars_record_dropped"] >= 39
    assert len(rows(tmp_path / "lengths.jsonl")) == counters.values["pars_recorded"]


def test_a_file_that_is_full_ends_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder_module, "MAX_BYTES", 1000)
    path, counters = tmp_path / "lengths.jsonl", CounterFile(None, 0)
    recorder = make_recorder(path, counters=counters)
    for i in range(20):
        recorder.add([i], 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    assert 800 < path.stat().st_size <= 1000
    assert (
        0 < len(rows(path)) == counters.values["pars_recorded"] == 20 - counters.values["pars_record_dropped"]
    )
    assert sum("has reached 1000 bytes" in message for message in caplog.messages) == 1


def test_a_thread_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    background, done = Background("chores", max_jobs=10), []

    def no_room(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_room)
        assert not background.submit(lambda: done.append("refused"))
        assert background.drain(20.0)
    assert background.submit(lambda: done.append("taken"))
    assert background.drain(20.0)
    assert done == ["taken"]


def test_a_job_that_fails_is_said_once_and_others_run(caplog: pytest.LogCaptureFixture) -> None:
    background, done = Background("chores", max_jobs=10), []

    def fail() -> None:
        raise OSError("no disk")

    for job in (fail, lambda: done.append(1), fail, lambda: done.append(2)):
        assert background.submit(job)
    assert background.drain(20.0)
    assert done == [1, 2]
    assert caplog.text.count("chores failed; serving goes on") == 1
