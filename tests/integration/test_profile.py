"""`pars-fast profile` on a real server; what it measures is not looked at, but that the fit is one."""

import json
from pathlib import Path

import pytest

from pars_fast.cli import main
from pars_fast.demo import run as demo_run
from pars_fast.demo.run import MAX_NUM_SEQS
from pars_fast.simulation import profile, step_log
from pars_fast.simulation.step_time import load_profile


def test_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo_run, "NUM_LAYERS", 1)
    monkeypatch.setattr(profile, "PHASE_S", 2.0)
    monkeypatch.setattr(profile, "MAX_OUTPUT_TOKENS", 50)
    monkeypatch.setattr(step_log, "MIN_STEPS", 20)
    path = tmp_path / "profile.json"
    assert main(["profile", "--json", str(path)]) == 0, capsys.readouterr().err
    step_time, engine = load_profile(str(path))
    assert engine.max_num_seqs == MAX_NUM_SEQS
    assert engine.enable_prefix_caching  # a trace that shares prefixes is simulated with them
    assert step_time.seconds(100, 10, 5000) > 0
    fit = json.loads(path.read_text())["fit"]
    assert fit["steps"] >= 20
    assert 0 < fit["mean_step_s"] < 10
    assert "a step takes" in capsys.readouterr().out
