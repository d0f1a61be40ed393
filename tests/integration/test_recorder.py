"""Recording: what is kept, what survives, and that it never blocks."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pars_fast.data import label_prompts, read_length_file
from pars_fast.errors import DataError
from pars_fast.integration import recorder as recorder_module
from pars_fast.integration.background import Background
from pars_fast.integration.metrics import CounterFile
from pars_fast.integration.runtime import MAX_PROMPT_IDS
from pars_fast.integration.recorder import Recorder
from pars_fast.live_calibration import Ending


def decode(ids: list[int]) -> str:
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
        label_prompts([read_length_file(path)], first["split"], "my-model")


def test_of_a_long_prompt_as_much_is_kept_as_the_ranker_sees(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    recorder = make_recorder(path)
    recorder.add(list(range(100_000)), 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    (row,) = rows(path)
    assert (len(row["prompt"].split()), row["prompt_tokens"]) == (MAX_PROMPT_IDS, 100_000)


def test_a_line_that_a_kill_tore_is_cut_off_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text('{"prompt": "whole"}\n{"prompt": "to')
    recorder = make_recorder(path)
    recorder.add([1], 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    assert [row["prompt"] for row in rows(path)] == ["whole", "word1"]


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
    path = tmp_path / "lengths.jsonl"
    recorder = make_recorder(path)
    for i in range(20):
        recorder.add([i], 5, Ending.COMPLETE)
    assert recorder.flush(20.0)
    assert 800 < path.stat().st_size <= 1000
    assert rows(path)
    assert "has reached 1000 bytes" in caplog.text


def test_a_job_that_fails_is_said_once_and_others_run(caplog: pytest.LogCaptureFixture) -> None:
    background, done = Background("chores", max_jobs=10), []

    def fail() -> None:
        raise OSError("no disk")

    for job in (fail, lambda: done.append(1), fail, lambda: done.append(2)):
        assert background.submit(job)
    assert background.drain(20.0)
    assert done == [1, 2]
    assert caplog.text.count("chores failed; serving goes on") == 1
