"""The device's order of scored requests, on CPU tensors through Triton's interpreter."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pars_fast.guards import OvertakingBudget
from pars_fast.host_index import Entry, HostIndex
from pars_fast.integration.gpu_scoring import DeviceOrder, GpuScorer
from pars_fast.integration.runtime import Prompt, Scored
from pars_fast.policies import POLICIES
from pars_fast.slot_table import SlotTable

UNBOUNDED = OvertakingBudget(beta=1e9, floor_tokens=1e9)


@pytest.fixture
def order() -> DeviceOrder:
    return DeviceOrder(SlotTable(capacity=64, device="cpu"))


def test_order_is_by_key_then_arrival(order: DeviceOrder) -> None:
    order.add([(0, 30.0), (1, 10.0), (2, 30.0), (3, 20.0)])
    assert order.first(16) == [1, 3, 0, 2]


def test_finished_requests_leave_and_their_slots_serve_others(order: DeviceOrder) -> None:
    order.add([(seq, float(seq)) for seq in range(64)])
    order.remove([0, 1, 999])
    order.add([(64, 0.5), (65, 1000.0)])
    assert order.first(3) == [64, 2, 3]


def test_a_full_table_gives_no_order_until_it_has_emptied(order: DeviceOrder) -> None:
    order.add([(seq, 1.0) for seq in range(65)])
    assert order.first(4) is None
    order.remove(list(range(64)))
    order.add([(70, 2.0)])
    assert order.first(4) == [70]


class _LengthScorer:
    """Expected tokens = number of ids; an empty prompt cannot be scored."""

    def __call__(self, prompts: Sequence[Prompt]) -> list[Scored]:
        return [(seq, float(len(ids)) if ids else math.nan) for seq, ids in prompts]


def test_scorer_orders_what_it_scored(order: DeviceOrder) -> None:
    scorer = GpuScorer(_LengthScorer(), order, torch.device("cpu"))  # type: ignore[arg-type]
    scored = scorer([(0, [1, 2, 3]), (1, []), (2, [1])])
    assert [seq for seq, _ in scored] == [0, 1, 2]
    assert scorer.order() == [2, 0]
    scorer.forget([2])
    assert scorer.order() == [0]


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
def test_host_index_admits_by_the_devices_order_as_by_its_own(order: DeviceOrder, stale: bool) -> None:
    rng = np.random.default_rng(7)
    keys = rng.integers(1, 20, size=40).astype(float)  # ties are many
    admitted = []
    for use_device in (False, True):
        least = 1 if use_device else 1000
        index = HostIndex(POLICIES["pars_fast"](), UNBOUNDED, device_order_min_waiting=least)
        entries = [Entry(seq, 0, SimpleNamespace(max_tokens=1)) for seq in range(40)]
        for entry, key in zip(entries, keys, strict=True):
            index.add(entry)
            if entry.seq % 5:  # every fifth has no score
                index.set_expected_tokens(entry, key)
        if use_device:
            order.add([(entry.seq, keys[entry.seq]) for entry in entries if entry.seq % 5])
            index.set_device_order(order.first(64) or [])
        if stale:  # aborted after the order was computed
            for entry in entries[::7]:
                index.remove(entry)
        admitted.append([index.pop().seq for _ in range(len(index))])
    assert admitted[0] == admitted[1]
