"""Shadow mode, on vLLM's real scheduler."""

import logging
from typing import Any

import pytest

from pars_fast.integration.scheduler import RankedScheduler, RankingMixin
from tests.integration.engine import MakeRequest


def test_shadow_mode_keeps_arrival_order_and_estimates_the_gain(
    make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    runtime = use_policy("pars_fast", PARS_MODE="shadow")
    runtime.answer = lambda prompt: 500.0 - prompt[0]
    engine = make_engine(RankedScheduler, max_num_seqs=2)
    engine.add([make_request(str(i), max_tokens=60 - i) for i in range(30)])
    engine.run()
    assert engine.admitted == [str(i) for i in range(30)]
    engine.step()  # where the last endings are noted
    engine.scheduler._learning.flush()
    assert engine.scheduler._background.drain(10.0)
    shadow = engine.scheduler._shadow
    assert engine.scheduler._counters.values["pars_active"] == 0
    assert shadow.estimate(list(shadow._finished)).startswith("Kendall tau-b 1.00 over ")


def test_shadow_mode_goes_by_the_schedulers_clock(
    make_engine: Any,
    make_request: MakeRequest,
    use_policy: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A simulation's seconds are its own: here a step takes one of them."""
    now = 0.0
    monkeypatch.setattr(RankingMixin, "clock", staticmethod(lambda: now))
    runtime = use_policy("pars_fast", PARS_MODE="shadow")
    runtime.answer = lambda prompt: 500.0 - prompt[0]
    engine = make_engine(RankedScheduler, max_num_seqs=2)
    engine.add([make_request(str(i), max_tokens=10) for i in range(40)])
    with caplog.at_level(logging.INFO, "vllm.pars_fast"):
        while engine.scheduler.has_requests():
            engine.step()
            now += 1.0
        for _ in range(2):  # what was learnt, and the report that it called for
            assert engine.scheduler._background.drain(10.0)
    assert {request.service_s for request in engine.scheduler._shadow._finished} == {10.0}
    assert sum("pars-fast shadow: Kendall tau-b" in message for message in caplog.messages) >= 2


@pytest.mark.parametrize("mode", ["on", "shadow"])
@pytest.mark.parametrize("policy", ["oracle", "prompt_length", "justitia"])
def test_shadow_mode_keeps_arrival_order_without_a_ranker_too(
    policy: str, mode: str, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    use_policy(policy, PARS_MODE=mode)
    engine = make_engine(RankedScheduler, max_num_seqs=1)
    engine.add([make_request(str(i), max_tokens=30 - i, num_prompt_tokens=40 - i) for i in range(8)])
    engine.run()
    assert engine.admitted == [str(i) for i in (range(8) if mode == "shadow" else range(7, -1, -1))]
    assert engine.scheduler._counters.values["pars_active"] == (mode == "on")
