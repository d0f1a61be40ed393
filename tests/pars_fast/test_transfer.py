import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pars_fast.baselines.encoder import FrozenEncoder
from pars_fast.cli import main
from pars_fast.data import read_length_file
from pars_fast.errors import DataError
from pars_fast.metrics import kendall_tau
from pars_fast.transfer import across_models, across_sets

pytest.importorskip("sklearn")
WriteLengths = Callable[..., Path]


def rows(seed: int, *, longer_is_longer: bool) -> list[Any]:
    """`up` and `up2` answer long prompts at length (or the reverse), `down` the other way, `rare` seldom."""
    rng = np.random.default_rng(seed)
    found = {}
    for index in range(150):
        size = int(rng.integers(2, 25))
        prompt = " ".join(rng.choice(list("abcdefghij"), size=size))
        signal = size if longer_is_longer else 30 - size
        lengths = {"up": 10 * signal, "up2": 7 * signal + int(rng.integers(0, 9)), "down": 10 * (32 - signal)}
        found[prompt] = (
            "train" if index < 100 else "test",
            prompt,
            lengths | ({"rare": 5} if index < 3 else {}),
        )
    return list(found.values())


@pytest.fixture
def encoder(tiny_encoder: Path) -> FrozenEncoder:
    return FrozenEncoder.of(str(tiny_encoder))


def test_what_models_share_carries_over_and_what_they_do_not_does_not(
    write_lengths: WriteLengths, encoder: FrozenEncoder
) -> None:
    file = read_length_file(write_lengths(rows(0, longer_is_longer=True)))
    result = across_models(file, encoder)
    assert result.models == ["up", "up2", "down"]
    up, up2, down = range(3)
    assert result.tau[up][up] > 0.6
    assert result.tau[up][up2] > 0.6
    assert result.tau[up][down] < -0.6
    assert result.others[down] < 0
    test = file.select("test").rows
    real = kendall_tau(*(np.array([row.output_tokens[m] for row in test]) for m in ("up", "up2")))
    assert result.own_tau[up][up2] == pytest.approx(real)


def test_a_set_of_another_kind_is_not_learnt_from_the_others(
    write_lengths: WriteLengths, encoder: FrozenEncoder
) -> None:
    names = ("lengths_a.jsonl", "lengths_b.jsonl", "lengths_c.jsonl")
    kinds = ((0, True), (1, True), (2, False))
    files = [
        read_length_file(
            write_lengths([(s, p, {"up": n["up"]}) for s, p, n in rows(seed, longer_is_longer=up)], name)
        )
        for name, (seed, up) in zip(names, kinds, strict=True)
    ]
    same, _, other = across_sets(files, encoder, max_prompts_per_file=80)
    assert same.own > 0.6
    assert other.own > 0.6
    assert other.all_but_this < -0.3


def test_too_little_data_is_said(write_lengths: WriteLengths, encoder: FrozenEncoder) -> None:
    file = read_length_file(
        write_lengths([("train", "a", {"m": 3, "n": 4}), ("test", "b", {"m": 3, "n": 5})])
    )
    with pytest.raises(DataError, match="not two models with 20 prompts in common"):
        across_models(file, encoder)
    with pytest.raises(DataError, match="needs at least two"):
        across_sets([file], encoder, max_prompts_per_file=5)


def test_the_command(
    write_lengths: WriteLengths, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        str(write_lengths(rows(seed, longer_is_longer=True), f"lengths_{seed}.jsonl")) for seed in (0, 1)
    ]
    times = "".join(f"{time}.0,5,5\n" for time in range(3000))
    (tmp_path / "trace_x.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + times)
    result = tmp_path / "transfer.json"
    options = ["--encoder", str(tiny_encoder), "--traces", str(tmp_path), "--json", str(result)]
    assert main(["transfer", "--data", *paths, *options]) == 0
    printed = capsys.readouterr().out
    assert "all the others" in printed
    assert "from all but it" in printed
    assert "arrival order" in printed
    cells = json.loads(result.read_text())["models"]["0"]
    assert [cells["latency"]["e2e"][i][i] for i in range(3)] == pytest.approx([1, 1, 1])
    assert len(cells["own_tau"]) == 3
    (tmp_path / "trace_x.csv").unlink()
    assert main(["transfer", "--data", *paths, *options]) == 2
    assert "no trace_" in capsys.readouterr().err


def test_a_model_of_constant_answers_has_no_tau_and_loses_nothing(
    write_lengths: WriteLengths, tiny_encoder: Path, tmp_path: Path
) -> None:
    constant = [(s, p, n | {"same": 7}) for s, p, n in rows(0, longer_is_longer=True)]
    result = tmp_path / "transfer.json"
    options = ["--encoder", str(tiny_encoder), "--json", str(result)]
    assert main(["transfer", "--data", str(write_lengths(constant)), *options]) == 0
    cells = json.loads(result.read_text())["models"]["toy"]
    same = cells["models"].index("same")
    assert [row[same] for row in cells["own_tau"]] == [None] * len(cells["models"])
    assert cells["tau"][0][0] > 0.5
