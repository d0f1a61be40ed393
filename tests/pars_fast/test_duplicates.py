import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pars_fast.cli import main
from pars_fast.data import read_length_file
from pars_fast.duplicates import leaking_prompts, near_duplicates

WriteLengths = Callable[..., Path]
WORDS = [f"word{n}" for n in range(60)]
LONG = " ".join(WORDS)
EDITED = " ".join([*WORDS[:-1], "other"])
HALF = " ".join([*WORDS[:30], *(f"new{n}" for n in range(30))])


def test_edited_prompts_are_found_across_splits_and_files_only(write_lengths: WriteLengths) -> None:
    first = [("train", LONG, {"m": 3}), ("test", EDITED, {"m": 3}), ("test", HALF, {"m": 3})]
    second = [("val", LONG.upper() + "!", {"m": 3}), ("train", EDITED, {"m": 3}), ("test", "short", {"m": 3})]
    files = [
        read_length_file(write_lengths(rows, name))
        for rows, name in ((first, "a.jsonl"), (second, "b.jsonl"))
    ]
    pairs = near_duplicates(files)
    found = {frozenset({(p.first.file, p.first.split), (p.second.file, p.second.split)}) for p in pairs}
    assert found == {
        frozenset({("a", "train"), ("a", "test")}),
        frozenset({("a", "train"), ("b", "val")}),
        frozenset({("a", "test"), ("b", "val")}),
        frozenset({("a", "test"), ("b", "train")}),
        frozenset({("b", "val"), ("b", "train")}),
    }
    assert [p.similarity for p in pairs] == sorted((p.similarity for p in pairs), reverse=True)
    assert pairs[0].similarity == 1
    assert all(p.similarity == pytest.approx(55 / 57) or p.similarity > 0.9 for p in pairs)
    assert leaking_prompts(pairs, "test") == {"a": 1}
    assert leaking_prompts(pairs, "val") == {"b": 1}


def test_the_command(write_lengths: WriteLengths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lengths([("train", LONG, {"m": 3}), ("test", EDITED, {"m": 3})])
    assert main(["duplicates", "--data", str(path), "--json", str(tmp_path / "d.json")]) == 0
    assert "near-duplicate" in capsys.readouterr().out
    (pair,) = json.loads((tmp_path / "d.json").read_text())
    assert {pair["first"]["split"], pair["second"]["split"]} == {"train", "test"}
