"""The schedulers of demo and bench, which change their kind while the engine is empty."""

from pathlib import Path
from typing import Any

import pytest

from bench.stock_switch import KIND_VARIABLE, RANKED, STOCK, RankedKind, StockKind
from pars_fast.demo.scheduler import SwitchableAsyncScheduler, SwitchableScheduler
from pars_fast.guards import IdleQuantum, NoGuard, PassingLimit
from pars_fast.policies import POLICIES
from pars_fast.simulation.step_log import STEP_LOG_VARIABLE, StepLog
from tests.integration.engine import Engine, MakeRequest, MakeScheduler


@pytest.mark.parametrize("scheduler_cls", [SwitchableScheduler, SwitchableAsyncScheduler])
def test_the_demos_switch_changes_policy_and_guard_between_runs(
    scheduler_cls: type, make_scheduler: MakeScheduler, make_request: MakeRequest, use_policy: Any,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planned ahead or not, and every step is written down."""
    use_policy("pars_fast", PARS_GUARD_BETA="2")
    policy_file = tmp_path / "policy"
    monkeypatch.setenv("PARS_DEMO_POLICY_FILE", str(policy_file))
    step_log = StepLog(tmp_path / "steps")
    monkeypatch.setenv(STEP_LOG_VARIABLE, str(step_log.path))
    engine = Engine(make_scheduler(scheduler_cls))
    index = engine.scheduler.waiting.index
    guards = {"fcfs": NoGuard(), "pars_fast": PassingLimit(2.0), "ltr": IdleQuantum(), "oracle": NoGuard()}
    for policy, guard in guards.items():
        policy_file.write_text(policy)
        engine.add([make_request(max_tokens=3) for _ in range(6)])
        assert (type(index.policy), index.guard) == (POLICIES[policy], guard)
        assert (engine.scheduler._preemption is not None) == (policy == "ltr")
        engine.run()
    steps = step_log.steps(0)
    assert len(steps) == sum(bool(step) for step in engine.steps)
    assert steps[:, :2].sum() == sum(sum(step.values()) for step in engine.steps)
    assert (steps[:, 3] > 0).all()


def test_the_scheduler_of_bench_is_stock_and_ranked_by_turns(
    make_engine: Any, make_request: MakeRequest, use_policy: Any, tmp_path: Path
) -> None:
    kind_file = tmp_path / "kind"
    use_policy("oracle", **{KIND_VARIABLE: str(kind_file)})
    engine = make_engine(RankedKind, max_num_seqs=1)
    ranked = engine.scheduler.waiting
    for turn, kind in enumerate((STOCK, RANKED, RANKED, STOCK, STOCK, RANKED)):
        kind_file.write_text(kind)
        names = [f"{turn} {tokens}" for tokens in (8, 6, 4, 2)]
        engine.add([make_request(name, max_tokens=8 - 2 * i) for i, name in enumerate(names)])
        assert type(engine.scheduler) is (StockKind if kind == STOCK else RankedKind)
        assert (engine.scheduler.waiting is ranked) == (kind == RANKED)
        engine.admitted.clear()
        engine.run()
        assert engine.admitted == (names if kind == STOCK else names[::-1])
    engine.step()  # after which the last one has been named as ended
    assert not ranked.entries
