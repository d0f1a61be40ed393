"""The benchmark of cached prefixes: every order serves the same requests, and what they share is found."""

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the faithful simulator is vLLM's scheduler")

from bench.prefix_cache import COLUMNS, KV_CACHE_TOKENS, ORDERS, pieces, rows_of
from pars_fast.errors import DataError


def write_turns(path: Path, count: int) -> Path:
    """Conversations of four, whose turns come in turns and share their beginnings."""
    rows = [
        {"timestamp": 10 * turn, "input_length": 1500, "output_length": 20 + turn % 7,
         "hash_ids": [turn % 4, 100 + turn % 4, 1000 + turn]}
        for turn in range(count)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_rows_of_a_piece(tmp_path: Path) -> None:
    made = list(pieces(write_turns(tmp_path / "turns_trace.jsonl", 60), 2, 30))
    assert [(piece.number, piece.engine.kv_cache_tokens) for piece in made] == [
        (number, tokens) for number in (0, 1) for tokens in KV_CACHE_TOKENS
    ]
    rows = rows_of(made[-1])
    assert [row["policy"] for row in rows] == list(ORDERS)
    assert {(row["workload"], row["piece"], row["prompt_tokens"]) for row in rows} == {("turns", 1, 45_000)}
    assert all(row[column] >= 0 for row in rows for column in COLUMNS)
    assert all(row["prefix_hit_tokens"] >= 20 * 1024 for row in rows)  # all but the first turns


def test_what_cannot_be_cut_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="20 requests, not 3 times 10"):
        list(pieces(write_turns(tmp_path / "turns.jsonl", 20), 3, 10))
    (tmp_path / "plain.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,9,9\n")
    with pytest.raises(DataError, match="has no hash_ids"):
        list(pieces(tmp_path / "plain.csv", 1, 1))
