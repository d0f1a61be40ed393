"""The live check on a demo that was made by the simulator itself, and on files that are none."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the faithful simulator is vLLM's scheduler")

from pars_fast.cli import main
from pars_fast.demo.arrivals import arrivals_hash
from pars_fast.demo.model import DESCRIPTION
from pars_fast.demo.sample import load_sample
from pars_fast.errors import DataError
from pars_fast.simulation import live_check as module
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.live_check import COMPARED, live_check, read_demo
from pars_fast.simulation.profile import Fit, Profile
from pars_fast.simulation.step_time import StepTime

STEP = StepTime(5e-3, 1e-5, 3e-4, 1e-8, "a test")
ENGINE = EngineSettings(16, 8192, 100_000, 32, 8192)
SEED = 7


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a demo's server would have shown, had it been the simulator; a token for four characters."""
    sample = load_sample()
    lengths = [max(1, len(prompt.prompt) // 4) for prompt in sample]
    monkeypatch.setattr(module, "_prompt_tokens", lambda served, sample: lengths)
    monkeypatch.setattr(module, "expected_tokens", lambda ranker, sample: [p.output_tokens for p in sample])
    captured: dict[tuple[str, str, int], dict[str, Any]] = {}

    def capture(live: Any, simulated: dict[tuple[str, str, int], dict[str, Any]]) -> list[dict[str, Any]]:
        captured.update(simulated)
        return compare(live, simulated)

    compare = module._compare
    keys = [("fcfs", "saturated", 0), ("fcfs", "saturated", 1), ("pars_fast", "saturated", 0),
            ("fcfs", "light", 0)]
    rows = [
        {"policy": policy, "load": load, "repeat": repeat, "stock": False, **dict.fromkeys(COMPARED, 1.0)}
        for policy, load, repeat in keys
    ]
    result = {
        "capacity_tok_s": 1500.0,
        "seed": SEED,
        "repeats": 2,
        "served_model": DESCRIPTION,
        "arrivals_sha256": arrivals_hash(sample, [SEED, SEED + 1]),
        "runs": [*rows, {"policy": "stock", "load": "saturated", "repeat": 0, "stock": True}],
    }
    monkeypatch.setattr(module, "_compare", capture)
    live_check(result, STEP, ENGINE, ranker="default", ranker_delay_s=0.0)
    monkeypatch.setattr(module, "_compare", compare)
    for row, key in zip(rows, keys, strict=True):
        row.update(captured[key])
    return result


def test_it_agrees_with_itself_and_not_with_an_engine_half_as_fast(
    demo: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = live_check(demo, STEP, ENGINE, ranker="default", ranker_delay_s=0.0)
    assert same["agrees"]
    assert same["worst_mean_error"] == same["worst_ratio_error"] == pytest.approx(0.0)
    assert [(row["policy"], row["load"]) for row in same["rows"]] == [
        ("fcfs", "saturated"), ("pars_fast", "saturated"), ("fcfs", "light")
    ]
    slow = StepTime(1e-2, 2e-5, 6e-4, 2e-8, "a test")
    other = live_check(demo, slow, ENGINE, ranker="default", ranker_delay_s=0.0)
    assert not other["agrees"]
    assert other["worst_mean_error"] > 0.5
    profile = Profile(STEP, ENGINE, Fit(1000, 0.01, 1e-3, 5e-4, 0.03, 0.98), "tiny", "CPU")
    for name, content in (("demo", demo), ("profile", profile.to_json())):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    arguments = [f"--{name}={tmp_path / name}.json" for name in ("demo", "profile")]
    assert main(["live-check", *arguments, "--ranker-delay=0", f"--json={tmp_path / 'out.json'}"]) == 0
    assert "worst error of a mean 0.0%, of a ratio to fcfs 0.0%: within 15%" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["agrees"]


def test_arrivals_of_another_sample_are_refused(demo: dict[str, Any]) -> None:
    demo["seed"] += 1
    with pytest.raises(DataError, match="the demo's arrivals are not those of the shipped sample"):
        live_check(demo, STEP, ENGINE, ranker="default", ranker_delay_s=0.0)


@pytest.mark.parametrize("damage", [str, lambda text: "[]", lambda text: text[:20], lambda text: "{}"])
def test_a_file_that_is_no_demo(damage: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    if damage is not str:
        path.write_text(damage('{"runs": [], "capacity_tok_s": 1}'))
    with pytest.raises(DataError, match=re.escape(f"{path}: not a file that `pars-fast demo --json` wrote")):
        read_demo(path)
