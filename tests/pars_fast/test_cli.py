import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pars_fast import __version__, cli
from pars_fast.cli import main
from pars_fast.text import hashed

WriteLengths = Callable[..., Path]


@pytest.fixture
def lengths(write_lengths: WriteLengths) -> Path:
    splits = {"train": "abcdefghijkl", "val": "mnop", "test": "qrstuv"}
    rows = [(s, f"write {p}", {"gpt": 7 * n + 1}) for s, ps in splits.items() for n, p in enumerate(ps)]
    return write_lengths(rows, "lengths_toy.jsonl.gz")


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a command that ends with 2."""
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"pars-fast: error: [^\n]+\n", message)
    return message


def test_train_then_evaluate(
    tiny_encoder: Path, lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, result = tmp_path / "out", tmp_path / "results" / "toy.json"
    options = "--epochs 1 --batch-prompts 4 --max-tokens 32 --learning-rate 1e-3 --loss huber --pooling mean"
    command = [
        "train",
        "--data",
        str(lengths),
        "--init",
        str(tiny_encoder),
        "--out",
        str(out),
        *options.split(),
    ]
    assert main(command) == 0
    assert f"ranker written to {out}" in capsys.readouterr().out
    report = json.loads((out / "training.json").read_text())
    assert (report["recipe"]["epochs"], report["recipe"]["loss"], report["recipe"]["pooling"]) == (
        1,
        "huber",
        "mean",
    )
    assert main(["evaluate", "--ranker", str(out), "--data", str(lengths), "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert "toy, test split" in printed
    assert "mean Kendall tau-b" in printed
    written = json.loads(result.read_text())
    assert set(written) == {"models", "mean_kendall_tau"}
    assert written["models"]["gpt"]["n"] == 6


@pytest.mark.parametrize(
    "command",
    [
        "train --data {hashed} --out {out}",
        "train --data {lengths} --exclude {hashed} --out {out}",
        "calibrate {checkpoint} --data {hashed}",
        "baseline prompt_length --data {hashed} --out {out}",
        "evaluate --ranker {checkpoint} --data {hashed} --split all",
        "evaluate --ranker prompt_length --all --data-dir {hashed.parent}",
        "transfer --data {hashed}",
        "duplicates --data {hashed}",
        "simulate --lengths {hashed} --ranker {checkpoint}",
    ],
)
def test_hashes_of_prompts_are_refused(
    command: str,
    checkpoint: Path,
    lengths: Path,
    write_lengths: WriteLengths,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A score of a hash means nothing, and a hash excludes no prompt; `PARS_RECORD` writes them unasked."""
    rows = [(split, hashed(f"prompt {i}"), {"m": 3 + i}) for i, split in enumerate(("train", "val", "test"))]
    file = write_lengths(rows, "lengths_hashed.jsonl")
    command = command.format(checkpoint=checkpoint, lengths=lengths, hashed=file, out=tmp_path / "out")
    assert error_of(capsys, *command.split()) == (
        f"pars-fast: error: {file}:1: holds the hash of a prompt, from which nothing can be learnt or "
        "judged; record with PARS_RECORD_PROMPTS=plain\n"
    )


def test_an_empty_split_is_null_and_no_error(
    checkpoint: Path,
    write_lengths: WriteLengths,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # a narrow table wraps the reason
    data, result = write_lengths([("train", "a", {"m": 3})]), tmp_path / "r.json"
    command = [
        "evaluate",
        "--ranker",
        str(checkpoint),
        "--data",
        str(data),
        "--split",
        "val",
        "--json",
        str(result),
    ]
    assert main(command) == 0
    assert "the val split has 0 rows" in capsys.readouterr().out
    assert json.loads(result.read_text())["mean_kendall_tau"] is None


def test_bad_data_names_file_and_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n')
    assert f'{path}:1: "split" must be' in error_of(
        capsys, "evaluate", "--ranker", checkpoint, "--data", path
    )
    assert f"{path}:1: " in error_of(capsys, "train", "--data", path, "--out", tmp_path / "out")
    path.write_text("")
    assert "the file has no rows" in error_of(capsys, "evaluate", "--ranker", checkpoint, "--data", path)
    assert "no such file" in error_of(
        capsys, "evaluate", "--ranker", checkpoint, "--data", tmp_path / "nowhere"
    )


def test_a_bad_ranker_is_named(
    checkpoint: Path, lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = error_of(capsys, "evaluate", "--ranker", tmp_path / "nowhere", "--data", lengths)
    assert "nowhere: no config.json there" in missing
    (checkpoint / "model.safetensors").write_bytes(b"cut")
    damaged = error_of(capsys, "evaluate", "--ranker", checkpoint, "--data", lengths)
    assert "model.safetensors: damaged or truncated" in damaged


def test_an_unknown_model_column_lists_those_there_are(
    tiny_encoder: Path, lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("train", "--data", lengths, "--out", tmp_path / "out", "--init", tiny_encoder)
    assert "no model column 'opt'; it has: gpt" in error_of(capsys, *command, "--model-column", "opt")
    assert "loss must be one of margin, margin_unfiltered, listmle, huber, got 'mse'" in error_of(
        capsys, *command, "--loss", "mse"
    )


def test_a_ranker_goes_on_as_it_was_trained(
    tiny_encoder: Path, lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = "--loss huber --pooling mean --max-tokens 32 "
    made += "--epochs 1 --batch-prompts 4 --learning-rate 1e-3 --dropout 0"
    first, on = tmp_path / "first", tmp_path / "on"
    train = ["train", "--data", str(lengths)]
    assert main([*train, "--init", str(tiny_encoder), "--out", str(first), *made.split()]) == 0
    assert main([*train, "--init", str(first), "--out", str(on), "--epochs", "2"]) == 0
    before, after = (json.loads((run / "training.json").read_text())["recipe"] for run in (first, on))
    assert before["loss"] == "huber"
    assert after == {**before, "epochs": 2}

    for damaged in ("{", "{}", '{"recipe": {}}', json.dumps({"recipe": {**before, "epochs": "2"}})):
        (first / "training.json").write_text(damaged)
        message = error_of(capsys, *train, "--init", first, "--out", tmp_path / "again")
        assert "training.json does not say how the ranker was trained" in message
    (first / "training.json").unlink()
    assert main([*train, "--init", str(first), "--out", str(tmp_path / "again"), "--epochs", "1"]) == 0
    assert json.loads((tmp_path / "again" / "training.json").read_text())["recipe"]["loss"] == "margin"


def test_an_output_that_cannot_be_written_is_named(
    checkpoint: Path, lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    evaluate = ("evaluate", "--ranker", checkpoint, "--data", lengths, "--json")
    assert "file/sub: cannot be written" in error_of(capsys, *evaluate, tmp_path / "file" / "sub" / "r.json")
    assert f"{tmp_path}: cannot be written" in error_of(capsys, *evaluate, tmp_path)
    train = ("train", "--data", lengths, "--init", checkpoint, "--out")
    assert "file/out: cannot be written" in error_of(capsys, *train, tmp_path / "file" / "out")


def test_an_interrupt_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_evaluate", interrupt)
    assert main(["evaluate", "--data", "x"]) == 130
    assert capsys.readouterr().err == "pars-fast: interrupted\n"


def test_sigterm_skips_no_cleaning_up() -> None:
    code = (
        "import os, signal, time\n"
        "from pars_fast import cli\n"
        "def serve(_):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('server stopped')\n"
        "cli._evaluate = serve\n"
        "cli.main(['evaluate', '--data', 'x'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (128 + 15, "server stopped\n")


@pytest.mark.parametrize(
    "arguments", [[], ["nope"], ["train"], ["evaluate", "--data", "x", "--split", "dev"]], ids=str
)
def test_a_wrong_call_shows_the_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: pars-fast" in capsys.readouterr().err


def test_version_and_help_are_answered_without_torch() -> None:
    code = (
        "import sys, contextlib; from pars_fast.cli import main\n"
        "for option in ('--version', '--help'):\n"
        "    with contextlib.suppress(SystemExit): main([option])\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules), sorted(sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert __version__ in answer.stdout
    assert "train" in answer.stdout
