"""What the order believes to be cached is what vLLM finds, and no fault of it reaches a step."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.scheduler import Scheduler

from pars_fast.integration.prefix_cache import PrefixCache
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.faithful import VirtualClock, serve, simulate
from pars_fast.simulation.simulated_requests import make_request
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.vllm_scheduler import make_scheduler
from pars_fast.simulation.workload import HASHED_TOKENS, Workload, make_workload

STEP = StepTime(0.01, 1e-5, 1e-4, 1e-7, "a test")
ENGINE = EngineSettings(
    max_num_seqs=4, max_num_batched_tokens=512, kv_cache_tokens=65_536, block_size=32, max_model_len=8192
)


def conversations(turns: list[tuple[int, int]]) -> Workload:
    """Turns (conversation, hashed blocks of its prompt) a second apart: those of one share its beginning."""
    hash_ids = [tuple(1000 * name + block for block in range(blocks)) for name, blocks in turns]
    prompts = [HASHED_TOKENS * blocks - 100 for _, blocks in turns]
    return make_workload("turns", range(len(turns)), prompts, [5] * len(turns), hash_ids=hash_ids)


def found_by_vllm(scheduler: Any, request: Any) -> int:
    coordinator = scheduler.kv_cache_manager.coordinator
    return int(coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)[1])


turns = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 8)), min_size=1, max_size=20)


@settings(max_examples=20, deadline=None)
@given(turns)
def test_it_says_what_vllm_finds(served_turns: list[tuple[int, int]]) -> None:
    """Every request anew, once all have been served."""
    scheduler = make_scheduler(Scheduler, ENGINE)
    workload = conversations(served_turns)
    serve(scheduler, workload, ENGINE, STEP, VirtualClock())
    lookup = PrefixCache(scheduler.kv_cache_manager, ENGINE.block_size)
    for number in range(len(workload)):
        request = make_request(workload, number, ENGINE.block_size)
        assert lookup(request) == found_by_vllm(scheduler, request) > 0
    unknown = make_request(conversations([(9, 3)]), 0, ENGINE.block_size)
    assert lookup(unknown) == 0
    scheduler.shutdown()


def test_what_is_evicted_is_not_cached() -> None:
    """A cache of ten blocks of 512 tokens, and twenty conversations of two: the last ones are left."""
    small = EngineSettings(
        max_num_seqs=1, max_num_batched_tokens=512, kv_cache_tokens=5120, block_size=32, max_model_len=8192
    )
    scheduler = make_scheduler(Scheduler, small)
    workload = conversations([(conversation, 2) for conversation in range(20)])
    serve(scheduler, workload, small, STEP, VirtualClock())
    lookup = PrefixCache(scheduler.kv_cache_manager, small.block_size)
    cached = [lookup(make_request(workload, number, small.block_size)) for number in range(20)]
    assert cached[0] == 0 < cached[-1]
    for number in range(20):
        request = make_request(workload, number, small.block_size)
        assert cached[number] == found_by_vllm(scheduler, request)
    scheduler.shutdown()


def test_of_a_preempted_request_the_prompt_alone_counts() -> None:
    """Blocks of its answer are cached as well: less than no prompt cannot be left to compute."""
    manager = SimpleNamespace(
        enable_caching=True,
        kv_cache_config=SimpleNamespace(kv_cache_groups=["one"]),
        block_pool=SimpleNamespace(get_cached_block=lambda block_hash, groups: ["a block"]),
    )
    request: Any = SimpleNamespace(
        block_hashes=list(range(9)), num_tokens=300, num_prompt_tokens=96, skip_reading_prefix_cache=False
    )
    assert PrefixCache(manager, 32)(request) == 64


@pytest.mark.parametrize(("policy", "first"), [("pars_fast", 3), ("pars", 2)])
def test_a_cached_prompt_is_less_work(policy: str, first: int) -> None:
    """Two prompts of one length wait for one seat, the later one a next turn of what was served before."""
    engine = EngineSettings(
        max_num_seqs=1, max_num_batched_tokens=512, kv_cache_tokens=65_536, block_size=32, max_model_len=8192
    )
    workload = make_workload(
        "turns",
        [0.0, 1.0, 1.1, 1.2],
        [1900, 10, 2000, 2000],
        [1, 50, 20, 20],
        expected_tokens=[1, 50, 20, 20],
        hash_ids=[(0, 1, 2, 3), (9,), (4, 5, 6, 7), (0, 1, 2, 8)],
    )
    served = simulate(workload, policy, None, engine, STEP)
    assert int(np.argsort(served.first_scheduled_s)[2]) == first
    assert served.prefix_hit_tokens == 3 * HASHED_TOKENS


def test_prompts_that_share_nothing_hit_nothing() -> None:
    workload = make_workload("apart", range(4), [1000] * 4, [5] * 4)
    assert simulate(workload, "fcfs", None, ENGINE, STEP).prefix_hit_tokens == 0


def test_a_cache_that_cannot_be_asked_counts_as_empty(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        enable_caching = True

        @property
        def kv_cache_config(self) -> Any:
            raise AttributeError("another vLLM")

    lookup = PrefixCache(Broken(), 32)
    request = make_request(conversations([(0, 2)]), 0, 32)
    with caplog.at_level(logging.WARNING, "vllm.pars_fast"):
        assert [lookup(request), lookup(request)] == [0, 0]
    assert sum("count as if none" in record.message for record in caplog.records) == 1
