"""The live check on results that were made by the simulator itself, and on files that are none."""

import copy
import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the faithful simulator is vLLM's scheduler")

from pars_fast.cli import main
from pars_fast.demo.arrivals import LOADS, arrivals_hash
from pars_fast.demo.model import TINY
from pars_fast.demo.records import STEP_TIMES
from pars_fast.demo.sample import load_sample
from pars_fast.errors import DataError
from pars_fast.simulation import live_check as module
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.live_check import COMPARED, live_check, read_result

STEP = {"base_s": 5e-3, "prefill_token_s": 1e-5, "decode_seq_s": 3e-4, "kv_token_s": 1e-8}
ENGINE = EngineSettings(16, 8192, 100_000, 32, 8192)
SEED = 7


PAIRS: list[tuple[str, Any, int]] = [
    ("fcfs", "saturated", 0), ("fcfs", "saturated", 1), ("pars_fast", "saturated", 0), ("fcfs", "light", 0)
]


@pytest.fixture(autouse=True)
def known_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token for four characters, and a ranker that knows every answer."""
    lengths = [max(1, len(prompt.prompt) // 4) for prompt in load_sample()]
    monkeypatch.setattr(module, "_prompt_tokens", lambda served, sample: lengths)
    monkeypatch.setattr(module, "expected_tokens", lambda ranker, sample: [p.output_tokens for p in sample])


def as_if_served(
    cases: list[tuple[str, Any, int]], slower: Mapping[int, float] = MappingProxyType({}), **given: Any
) -> dict[str, Any]:
    """What a server would have shown, had it been the simulator; `slower` by how much in which repeat."""
    rows = [{"policy": policy, "load": load, "repeat": repeat, "stock": False,
             **scaled(STEP, slower.get(repeat, 1.0)), **dict.fromkeys(COMPARED, 1.0)}
            for policy, load, repeat in cases]
    loads = given.get("loads", LOADS)
    result = {
        "capacity_tok_s": 1500.0, "engine_settings": asdict(ENGINE), "seed": SEED, "repeats": 2,
        "served_model": TINY, "runs": rows,
        "arrivals_sha256": arrivals_hash(load_sample(), [SEED, SEED + 1], loads,
                                         given.get("burst_requests", 0)),
        **given,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compare", lambda live, simulated: [
            real.update({column: made[column] for column in COMPARED})
            for real, made in zip(live, simulated, strict=True)] and [])
        live_check(result, ranker="default", ranker_delay_s=0.0)
    return result


def scaled(step: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: factor * seconds for name, seconds in step.items()}


@pytest.fixture
def demo() -> dict[str, Any]:
    result = copy.deepcopy(_served_once())
    result["runs"].append({"policy": "stock", "load": "saturated", "repeat": 0, "stock": True})
    return result


@functools.cache
def _served_once() -> dict[str, Any]:
    return as_if_served(PAIRS)


def test_it_agrees_with_itself_and_not_with_an_engine_of_another_kind(
    demo: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = live_check(demo, ranker="default", ranker_delay_s=0.0)
    assert same["agrees"]
    judged = same["columns"]["mean_e2e_s"]
    assert judged == {"worst_mean_error": pytest.approx(0.0), "mean_rows": 3, "mean_within": 3,
                      "worst_ratio_error": pytest.approx(0.0), "ratio_rows": 1, "ratio_within": 1}
    assert [(row["policy"], row["load"]) for row in same["rows"]] == [
        ("fcfs", "saturated"), ("pars_fast", "saturated"), ("fcfs", "light")
    ]
    other = copy.deepcopy(demo)
    for row in other["runs"]:  # as if prompts were all that takes time
        row |= {"base_s": 1e-6, "prefill_token_s": 1e-3, "decode_seq_s": 1e-6, "kv_token_s": 0.0}
    other = live_check(other, ranker="default", ranker_delay_s=0.0)
    assert not other["agrees"]
    assert other["columns"]["mean_e2e_s"]["mean_within"] < 3
    assert other["columns"]["mean_e2e_s"]["worst_mean_error"] > 0.15
    (tmp_path / "live.json").write_text(json.dumps(demo))
    files = [f"--live={tmp_path / 'live.json'}", f"--json={tmp_path / 'out.json'}"]
    assert main(["live-check", *files, "--ranker-delay=0"]) == 0
    printed = capsys.readouterr().out
    assert "mean_e2e_s: 3 of 3 means within 15%, worst 0.0%; 1 of 1 ratios within 15%, worst 0.0%" in printed
    assert "the simulator agrees with the server" in printed
    assert json.loads((tmp_path / "out.json").read_text())["agrees"]


def test_each_run_is_simulated_with_its_own_steps() -> None:
    """A machine that was half as fast in the second repeat."""
    demo = as_if_served(PAIRS[:2], slower={1: 2.0})
    first, second = (row["mean_e2e_s"] for row in demo["runs"])
    assert second > 1.5 * first
    assert live_check(demo, ranker="default", ranker_delay_s=0.0)["agrees"]


def test_a_run_of_too_few_steps_is_refused(demo: dict[str, Any]) -> None:
    demo["runs"][1] |= dict.fromkeys(STEP_TIMES)
    with pytest.raises(DataError, match="load saturated, fcfs: fewer than 200 steps"):
        live_check(demo, ranker="default", ranker_delay_s=0.0)


def test_a_run_without_a_mean_does_not_agree(demo: dict[str, Any]) -> None:
    """One of two repeats completed nothing, and so did a run that is alone at its load."""
    for place in (1, 3):
        demo["runs"][place] |= dict.fromkeys(COMPARED)
    result = live_check(demo, ranker="default", ranker_delay_s=0.0)
    judged = result["columns"]["mean_e2e_s"]
    assert (judged["mean_rows"], judged["mean_within"]) == (3, 1)
    assert not result["agrees"]


def test_no_run_is_no_agreement(demo: dict[str, Any]) -> None:
    demo["runs"] = []
    assert not live_check(demo, ranker="default", ranker_delay_s=0.0)["agrees"]


def test_a_sweep_with_a_burst_and_a_guard_of_its_own() -> None:
    cases = [(policy, load, 0) for load in (1.2, "burst") for policy in ("fcfs", "pars_fast/none")]
    sweep = as_if_served(cases, loads=[1.2, "burst"], burst_requests=40)
    assert live_check(sweep, ranker="default", ranker_delay_s=0.0)["agrees"]
    at_once = [row for row in sweep["runs"] if row["load"] == "burst"]
    assert at_once[1]["mean_e2e_s"] < at_once[0]["mean_e2e_s"]


def test_the_delay_that_a_run_measured_is_taken(demo: dict[str, Any]) -> None:
    for row in demo["runs"]:
        row["mean_score_latency_s"] = 0.0 if row["policy"] == "pars_fast" else None
    assert live_check(demo, ranker="default")["agrees"]
    demo["runs"][2]["mean_score_latency_s"] = 3.0
    late = live_check(demo, ranker="default")
    assert late["columns"]["mean_latency_per_token_s"]["worst_ratio_error"] > 0.15


def test_arrivals_of_another_sample_are_refused(demo: dict[str, Any]) -> None:
    demo["seed"] += 1
    with pytest.raises(DataError, match="the arrivals are not those of the shipped sample"):
        live_check(demo, ranker="default", ranker_delay_s=0.0)


@pytest.mark.parametrize("damage", [str, lambda text: "[]", lambda text: text[:20], lambda text: "{}"])
def test_a_file_that_is_no_demo(damage: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    if damage is not str:
        path.write_text(damage('{"runs": [], "capacity_tok_s": 1}'))
    with pytest.raises(DataError, match=re.escape(f"{path}: not what `pars-fast demo` or `load` wrote")):
        read_result(path)


def test_a_run_of_an_earlier_version_lacks_a_column(demo: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    path.write_text(json.dumps(demo))
    assert read_result(path) == demo
    for lacking in ("kv_token_s", "max_wait_s"):
        damaged = copy.deepcopy(demo)
        del damaged["runs"][1][lacking]
        path.write_text(json.dumps(damaged))
        with pytest.raises(DataError, match=f"a run has no {lacking}, .* run `pars-fast demo`"):
            read_result(path)
