"""Step times: what a step's work is, named profiles, the fit, and files that `pars-fast profile` wrote."""

import json
from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pars_fast.errors import DataError, ParsFastError
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.profile import Profile
from pars_fast.simulation.step_log import MIN_STEPS, STAMP, Fit, StepLog, fit_step_time
from pars_fast.simulation.step_time import PROFILES, StepTime, load_profile, step_work

COST = st.floats(0.0, 1e-3)


def planned(computed: int, *, outputs: int = 0, chunk: bool = False) -> Any:
    return SimpleNamespace(num_computed_tokens=computed, num_output_tokens=outputs, is_prefill_chunk=chunk)


@pytest.mark.parametrize(
    ("request_", "tokens", "work"),
    [
        (planned(128, chunk=True), 128, (128, 0, 0)),  # a first chunk
        (planned(300), 172, (172, 0, 128)),  # the last one
        (planned(1), 1, (1, 0, 0)),  # a prompt of one token
        (planned(301, outputs=1), 1, (0, 1, 300)),  # an answer's second token
        (planned(310, outputs=10), 310, (310, 0, 0)),  # a preempted request begins again
        (planned(310, outputs=10, chunk=True), 1, (1, 0, 309)),  # and comes to the end of a step's room
    ],
)
def test_work_of_a_step(request_: Any, tokens: int, work: tuple[int, int, int]) -> None:
    assert step_work([request_], [tokens]) == work
    assert step_work([request_, planned(51, outputs=2)], [tokens, 1]) == (work[0], work[1] + 1, work[2] + 50)


def test_seconds_are_linear_in_the_work() -> None:
    step_time = StepTime(1.0, 0.1, 0.01, 0.001, "a test")
    assert step_time.seconds(3, 4, 5) == pytest.approx(1.345)


@pytest.mark.parametrize("name", PROFILES)
def test_a_named_profile_is_plausible_and_says_where_it_is_from(name: str) -> None:
    profile = PROFILES[name]
    assert len(profile.source) > 50
    assert 1e-3 < profile.base_s < 0.1  # all weights are read once
    assert 1e3 < 1 / profile.prefill_token_s < 1e5  # tokens/s
    assert load_profile(name) == (profile, EngineSettings())


@settings(max_examples=30)
@given(costs=st.tuples(COST, COST, COST, COST), seed=st.integers(0, 999))
def test_the_fit_finds_the_costs(costs: tuple[float, float, float, float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    work = rng.integers(0, [2000, 64, 50_000], (400, 3))
    truth = StepTime(*costs, "a test")
    seconds = [truth.seconds(*row) + 1e-6 for row in work.tolist()]
    step_time, fit = fit_step_time(np.column_stack([work, seconds]), source="a test")
    assert astuple(step_time)[1:4] == pytest.approx(costs[1:], rel=1e-4, abs=1e-9)
    assert step_time.base_s == pytest.approx(costs[0] + 1e-6, rel=1e-4, abs=1e-8)
    assert (fit.steps, step_time.source) == (400, "a test")
    assert fit.rms_error_s < 1e-6


def test_the_fit_of_noisy_steps_keeps_their_sum_and_says_how_noisy_they_are() -> None:
    rng = np.random.default_rng(0)
    work = rng.integers(0, [2000, 64, 50_000], (4000, 3))
    noise = rng.exponential(1e-3, 4000)
    seconds = 0.01 + work @ [1e-5, 1e-4, 1e-8] + noise
    step_time, fit = fit_step_time(np.column_stack([work, seconds]), source="a test")
    assert step_time.base_s == pytest.approx(0.011, rel=0.05)
    assert sum(step_time.seconds(*row) for row in work.tolist()) == pytest.approx(seconds.sum(), rel=1e-6)
    assert fit.rms_error_s == pytest.approx(1e-3, rel=0.1)
    assert 0.9 < fit.r2 < 1.0


def test_no_cost_is_negative() -> None:
    rng = np.random.default_rng(0)
    work = rng.integers(0, [2000, 64, 50_000], (400, 3))
    seconds = 0.05 - 1e-4 * work[:, 1] + 1e-5 * work[:, 0]
    step_time, _ = fit_step_time(np.column_stack([work, seconds]), source="a test")
    assert step_time.decode_seq_s == 0.0


def test_too_few_steps() -> None:
    with pytest.raises(ParsFastError, match=f"7 steps are too few to fit a step time, {MIN_STEPS} are"):
        fit_step_time(np.ones((7, 4)), source="a test")


def test_a_log_that_is_still_written_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps")
    rows = [(30.0, 0.0, 0.0, 0.5), (0.0, 2.0, 30.0, 0.25), (0.0, 1.0, 31.0, 0.125)]
    log.path.write_bytes(b"".join(STAMP.pack(*row) for row in rows)[:-1])
    assert len(log) == 2
    assert log.steps(1).tolist() == [list(rows[1])]
    assert log.steps(2).shape == (0, 4)


@pytest.fixture
def profile() -> Profile:
    fit = Fit(1000, 0.01, 1e-3, 5e-4, 0.03, 0.98)
    step_time = StepTime(0.01, 1e-5, 1e-4, 0.0, "here")
    return Profile(step_time, EngineSettings(max_num_seqs=16), fit, "tiny", "CPU")


def test_a_profile_is_read_as_written(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile.to_json()))
    assert load_profile(str(path)) == (profile.step_time, profile.engine)
    assert profile.to_json()["fit"] == asdict(profile.fit)


@pytest.mark.parametrize(
    "damage", [lambda c: c.pop("engine"), lambda c: c["step_time"].pop("base_s"), lambda c: c.clear()]
)
def test_a_damaged_profile(
    profile: Profile, tmp_path: Path, damage: Callable[[dict[str, Any]], object]
) -> None:
    content = profile.to_json()
    damage(content)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"{path}: not a file that `pars-fast profile` wrote"):
        load_profile(str(path))
    path.write_text("{")
    with pytest.raises(DataError, match="not a file that `pars-fast profile` wrote"):
        load_profile(str(path))


def test_no_such_profile() -> None:
    with pytest.raises(DataError, match="no profile or file 'h200'; profiles are: h100_llama_3_1_8b, "):
        load_profile("h200")
