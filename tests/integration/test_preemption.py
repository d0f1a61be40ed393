"""Running requests that yield to waiting ones, on vLLM's real scheduler."""

import itertools
import logging
import random
from typing import Any

import pytest

from pars_fast.errors import SettingsError
from pars_fast.integration.preemption import Preemption
from pars_fast.integration.scheduler import RankedScheduler
from tests.integration.engine import MakeRequest, both_schedulers


@both_schedulers
def test_a_running_request_yields_to_a_shorter_one(
    scheduler_cls: type, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    use_policy("srpt")
    engine = make_engine(scheduler_cls, max_num_seqs=1)
    engine.add([make_request("long", max_tokens=40)])
    for _ in range(6):
        engine.step()
    engine.add([make_request("short", max_tokens=3), make_request("longer", max_tokens=60)])
    engine.run()
    assert engine.admitted == ["long", "short", "longer"]
    assert engine.preemptions == 1
    assert {name: len(tokens) for name, tokens in engine.tokens.items()} == {
        "long": 40, "short": 3, "longer": 60
    }


@both_schedulers
def test_what_remains_counts_and_equal_ones_stay(
    scheduler_cls: type, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    use_policy("srpt")
    engine = make_engine(scheduler_cls, max_num_seqs=1)
    engine.add([make_request("first", max_tokens=20)])
    for _ in range(12):
        engine.step()
    engine.add([make_request("second", max_tokens=15)])  # longer than what is left of the first
    engine.run()
    assert engine.preemptions == 0
    engine.add([make_request(name, max_tokens=9) for name in ("third", "fourth")])
    engine.run()
    assert (engine.preemptions, engine.admitted) == (0, ["first", "second", "third", "fourth"])


@both_schedulers
def test_under_ltr_a_long_request_gets_a_quantum(
    scheduler_cls: type, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    """Short ones never cease; without the guard the long one runs when all of them are done."""
    prompts = 300  # computed in two steps, which do not count

    def runs_of_long(guard: str) -> tuple[list[int], list[str]]:
        use_policy("ltr", PARS_TRUST_CALLER="1", PARS_GUARD=guard)
        engine = make_engine(scheduler_cls, max_num_seqs=1)
        engine.add([make_request("long", num_prompt_tokens=prompts, max_tokens=12, pars_score=500)])
        for number in range(30):
            engine.add([make_request(f"short{number}", max_tokens=5, pars_score=5)])
            for _ in range(5):
                engine.step()
        engine.run()
        assert len(engine.tokens["long"]) == 12
        ran = [next(iter(step), "") for step in engine.steps]
        runs = [len(list(same)) for name, same in itertools.groupby(ran) if name == "long"]
        return runs, ran[: ran.index("long")]

    runs, before = runs_of_long("idle_quantum:idle_steps=20,quantum_steps=4")
    assert len(before) >= 20
    assert runs == [5, 5, 5]  # what has to be computed in two steps, the second with a token, and three more
    runs, before = runs_of_long("none")
    assert len(runs) == 1
    assert len({name for name in before if name}) == 30


@pytest.mark.parametrize("where", ["ahead", "rank", "preempt"])
@both_schedulers
def test_a_fault_while_preempting_is_said_once_and_loses_nobody(
    scheduler_cls: type,
    where: str,
    make_engine: Any,
    make_request: MakeRequest,
    use_policy: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the middle of looking who waits, at a key of one that runs, or before vLLM has let anybody go."""
    use_policy("srpt")
    engine = make_engine(scheduler_cls, max_num_seqs=3)
    scheduler = engine.scheduler
    engine.add([make_request(f"long{i}", max_tokens=40 + i) for i in range(3)])
    for _ in range(4):
        engine.step()
    calls = itertools.count()

    def fails(*arguments: Any, **more: Any) -> Any:
        if next(calls) >= 1:
            raise RuntimeError("a fault")
        return real(*arguments, **more)

    target, name = {
        "ahead": (scheduler.waiting.index, "put_back"),
        "rank": (scheduler.waiting.index, "key_now"),
        "preempt": (scheduler, "_preempt_request"),
    }[where]
    real = getattr(target, name)
    monkeypatch.setattr(target, name, fails)
    engine.add([make_request(f"short{i}", max_tokens=3) for i in range(6)])
    with caplog.at_level(logging.ERROR, logger="vllm.pars_fast"):
        engine.step()
        monkeypatch.undo()
        engine.run()
    assert next(calls) >= 2
    assert caplog.text.count("ranking is switched off") == 1
    assert scheduler._counters.values["pars_fallback_error"] == 1
    wanted = {f"long{i}": 40 + i for i in range(3)} | {f"short{i}": 3 for i in range(6)}
    assert {name: len(tokens) for name, tokens in engine.tokens.items()} == wanted
    assert engine.admitted[3:] == [f"short{i}" for i in range(6)]


@both_schedulers
@pytest.mark.parametrize("policy", ["srpt", "ltr", "elis", "alise"])
@pytest.mark.parametrize("seed", range(3))
def test_preempting_policies_lose_nothing(
    scheduler_cls: type, policy: str, seed: int, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    """Few seats and few blocks; some requests are aborted, some have no score."""
    use_policy(policy, PARS_TRUST_CALLER="1")
    rng = random.Random(seed)
    engine = make_engine(scheduler_cls, max_num_seqs=4, num_blocks=14)
    lengths = {f"r{i}": rng.randint(1, 60) for i in range(50)}
    aborted = set(rng.sample(sorted(lengths), 5))
    for name, tokens in lengths.items():
        score = None if rng.random() < 0.2 else tokens * rng.uniform(0.3, 3)
        prompt = rng.randint(1, 120)
        engine.add([make_request(name, num_prompt_tokens=prompt, max_tokens=tokens, pars_score=score)])
        engine.step()
        if name in aborted:
            engine.abort(rng.choice([name, *aborted]))
    engine.run()
    assert engine.preemptions > 0
    answers = {name: len(tokens) for name, tokens in engine.tokens.items() if name in engine.finished}
    complete = {name: tokens for name, tokens in answers.items() if name not in aborted}
    assert complete == {name: tokens for name, tokens in lengths.items() if name not in aborted}
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 13
    assert not engine.scheduler.waiting.entries


def test_what_a_client_calls_its_priority_keeps_no_request_from_yielding(
    make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    """Under vLLM's default policy."""
    use_policy("srpt")
    engine = make_engine(RankedScheduler, max_num_seqs=1)
    engine.add([make_request("long", max_tokens=40, priority=-5)])
    for _ in range(6):
        engine.step()
    engine.add([make_request("short", max_tokens=3)])
    engine.run()
    assert engine.preemptions == 1
    assert len(engine.tokens["long"]) == 40


def test_a_policy_that_preempts_says_which_vllm_it_needs(make_engine: Any, use_policy: Any) -> None:
    use_policy("srpt")
    scheduler = make_engine(RankedScheduler).scheduler
    Preemption(scheduler, scheduler.waiting)
    del scheduler.max_num_active_reqs  # as before 0.31
    with pytest.raises(SettingsError, match=r"needs vLLM 0\.31"):
        Preemption(scheduler, scheduler.waiting)
