"""The slot table against a plain list of requests: order, reuse of slots, late scores, and every error."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pars_fast.calibration import TokenMap
from pars_fast.kernels.queue_topk import MAX_RANKS, MAX_SEQ_SPAN
from pars_fast.policies import POLICIES, prompt_work
from pars_fast.slot_table import MAX_BATCH, MAX_COMMANDS, NORMAL_LANE, PREEMPTED_LANE, SlotTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Scores come out as keys unchanged within these bounds.
IDENTITY = TokenMap((0.0, 64.0), (0.0, 64.0))


def empty(capacity: int) -> SlotTable:
    return SlotTable(IDENTITY, capacity, DEVICE, max_order=16)


def scores_of(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def publish(
    table: SlotTable, slots: Sequence[int], generations: Sequence[int], keys: Sequence[float]
) -> list[float]:
    """A batch from begin to end; gives the expected tokens."""
    table.upload(list(zip(slots, generations, strict=True)))
    return table.publish(scores_of(keys)).tolist()


def filled(capacity: int, seqs: Sequence[int]) -> tuple[SlotTable, list[int], list[int]]:
    """A table with one request of rank 0 a seq; its slots and generations."""
    table = empty(capacity)
    taken = [table.acquire() for _ in seqs]
    slots = [pair[0] for pair in taken if pair]
    generations = [pair[1] for pair in taken if pair]
    table.insert(slots, generations, [0] * len(slots), seqs)
    return table, slots, generations


def order(table: SlotTable, k: int) -> list[int]:
    slots = table.order(k)
    assert slots is not None
    return slots.tolist()


def test_orders_by_key_and_gives_the_unscored_the_median() -> None:
    table, slots, generations = filled(5, seqs=[0, 1, 2])
    assert publish(table, slots[:2], generations[:2], [3.0, 1.0]) == [3.0, 1.0]
    table.set_median_key(2.0)
    assert order(table, 4) == [slots[1], slots[2], slots[0], -1]


def test_a_key_weighs_the_prompt_where_its_work_is_given() -> None:
    table, slots, generations = filled(5, seqs=[0, 1, 2])
    table.upload(list(zip(slots, generations, strict=True)), [27.0, 0.0, 16.0])
    assert table.publish(scores_of([9.0, 17.0, 9.0])).tolist() == [9.0, 17.0, 9.0]
    assert order(table, 3) == [slots[2], slots[1], slots[0]]  # keys 18, 17, 15
    assert publish(table, slots, generations, [9.0, 17.0, 9.0]) == [9.0, 17.0, 9.0]  # the last works are gone
    assert order(table, 3) == [slots[0], slots[2], slots[1]]


def test_of_equal_answers_the_prompts_are_ordered_as_the_policy_orders_them() -> None:
    policy, prompts = POLICIES["pars_fast"], [900, 20, 4000, 300]
    work = prompt_work(policy)
    assert work is not None
    table, slots, generations = filled(5, seqs=range(4))
    table.upload(list(zip(slots, generations, strict=True)), [work * tokens for tokens in prompts])
    table.publish(scores_of([30.0] * 4))
    keys = [policy().key(30.0, SimpleNamespace(num_prompt_tokens=tokens)) for tokens in prompts]
    assert order(table, 4) == [slots[i] for i in np.argsort(keys)]


def test_priority_then_lane_come_before_the_key() -> None:
    table, slots, generations = filled(5, seqs=[0, 1, 2])
    publish(table, slots, generations, [1.0, 2.0, 3.0])
    table.set_lane([slots[2]], PREEMPTED_LANE)
    assert order(table, 3) == [slots[2], slots[0], slots[1]]
    table.set_priority_ranks([slots[2]], [1])
    assert order(table, 3) == [slots[0], slots[1], slots[2]]
    table.set_lane([slots[2]], NORMAL_LANE)
    table.set_priority_ranks([slots[2]], [0])
    assert order(table, 3) == slots


def test_a_score_for_a_slot_that_changed_hands_is_dropped() -> None:
    table, [slot], [old] = filled(1, seqs=[0])
    table.free([slot])
    table.release(slot)
    again = table.acquire()
    assert again is not None
    assert again[0] == slot
    table.insert([slot], [again[1]], [0], [1])
    publish(table, [slot], [old], [9.0])  # in flight while the slot changed hands
    assert table._table["key"][slot].isnan()
    # Both in one batch: whatever order the writes take, the new owner's key stays.
    publish(table, [slot, slot], [again[1], old], [4.0, 9.0])
    assert table._table["key"][slot].item() == 4.0
    publish(table, [slot, slot], [old, again[1]], [9.0, 5.0])
    assert table._table["key"][slot].item() == 5.0


def test_a_score_between_two_uploads_of_a_slot_goes_to_its_own_request_only() -> None:
    table, [slot], [old] = filled(1, seqs=[0])
    table.upload([(slot, old)])
    table.free([slot])
    table.release(slot)
    assert table.acquire() == (slot, old + 1)
    table.insert([slot], [old + 1], [0], [1])
    table.publish(scores_of([9.0]))  # the device does not know of the change yet: the old owner's key
    assert order(table, 1) == [slot]
    assert table._table["key"][slot].isnan()  # the new owner starts without one


def test_a_request_that_comes_and_goes_between_two_uploads_leaves_nothing() -> None:
    table, [slot], [generation] = filled(1, seqs=[0])
    assert order(table, 1) == [slot]
    for seq in (1, 2):
        table.free([slot])
        table.release(slot)
        assert table.acquire() == (slot, generation + seq)
        table.insert([slot], [generation + seq], [0], [seq])
    table.free([slot])
    assert order(table, 1) == [-1]


def test_more_changes_than_one_transfer_holds() -> None:
    seqs = list(range(MAX_COMMANDS + 3))
    table, slots, _ = filled(len(seqs), seqs=seqs[::-1])
    assert order(table, 16) == slots[:-17:-1]
    table.free(slots[3:])
    assert order(table, 4) == [*slots[2::-1], -1]


def test_a_slot_of_none_takes_no_score() -> None:
    table, [slot], [generation] = filled(1, seqs=[0])
    assert publish(table, [-1, slot], [0, generation], [7.0, 3.0]) == [7.0, 3.0]
    assert table._table["key"].tolist() == [3.0]


def test_a_late_score_does_not_bring_back_a_freed_request() -> None:
    table, slots, generations = filled(2, seqs=[0, 1])
    table.free(slots[:1])
    publish(table, slots, generations, [0.5, 1.0])
    assert order(table, 2) == [slots[1], -1]


def test_full_table_says_so_and_takes_released_slots_again() -> None:
    table = empty(2)
    assert table.acquire() == (0, 1)
    assert table.acquire() == (1, 1)
    assert table.acquire() is None
    table.release(1)
    assert table.acquire() == (1, 2)


def test_seqs_too_far_apart_for_the_packed_key_leave_the_order_to_the_host() -> None:
    table, slots, _ = filled(3, seqs=[5, MAX_SEQ_SPAN - 1, MAX_SEQ_SPAN])
    assert table.order(2) is None
    table.free(slots[:1])  # the oldest goes, the rest fits, and the base moves along
    assert order(table, 2) == slots[1:]
    assert int(table._table["seq_base"]) == (MAX_SEQ_SPAN - 1) >> 16 << 16


def test_seq_base_stays_while_it_serves_and_goes_back_for_an_older_request() -> None:
    table, slots, _ = filled(3, seqs=[2**30, 2**30 + 2**20])
    assert order(table, 2) == slots
    table.free(slots[:1])
    order(table, 2)
    assert int(table._table["seq_base"]) == 2**30  # a new one would re-key every request
    table.insert([2], [1], [0], [2**30 - 1])
    assert order(table, 3) == [2, slots[1], -1]


def test_seqs_far_past_32_bits_are_ordered() -> None:
    table, slots, _ = filled(3, seqs=[2**40 + 2, 2**40, 2**40 + 1])
    assert order(table, 3) == [slots[1], slots[2], slots[0]]


def test_too_many_ranks_leave_the_order_to_the_host() -> None:
    table, slots, _ = filled(2, seqs=[0, 1])
    table.set_priority_ranks(slots[:1], [MAX_RANKS])
    assert table.order(2) is None
    table.set_priority_ranks(slots[:1], [MAX_RANKS - 1])
    assert order(table, 2) == [slots[1], slots[0]]


def test_empty_calls_and_an_empty_table_do_nothing() -> None:
    table = empty(4)
    table.insert([], [], [], [])
    table.set_lane([], NORMAL_LANE)
    table.set_priority_ranks([], [])
    table.free([])
    assert len(table) == 0
    assert order(table, 2) == [-1, -1]


def test_nothing_is_allocated_and_addresses_never_change(monkeypatch: pytest.MonkeyPatch) -> None:
    table, slots, generations = filled(4, seqs=[0, 1])
    columns = [*table._table.values(), table._generation, table._workspace.slot, table._uploads.words]
    before = [column.data_ptr() for column in columns]
    scores = scores_of([2.0, 1.0])
    for name in ("empty", "zeros", "full", "ones", "tensor"):
        monkeypatch.setattr(torch, name, None)
    table.upload(list(zip(slots, generations, strict=True)))
    table.publish(scores)
    table.set_median_key(1.5)
    assert order(table, 2) == slots[::-1]
    table.free(slots)
    assert order(table, 2) == [-1, -1]
    assert before == [column.data_ptr() for column in columns]


def test_errors_name_what_is_wrong_and_change_nothing() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        empty(0)
    table, slots, _ = filled(4, seqs=[0, 1])
    with pytest.raises(ValueError, match="slot 3 is not taken"):
        table.release(3)
    with pytest.raises(ValueError, match="slot -1 is not taken"):
        table.release(-1)
    with pytest.raises(ValueError, match="seqs must have one entry a slot: 2 for 1 slots"):
        table.insert([2], [1], [0], [2, 3])
    with pytest.raises(ValueError, match=r"slots must be in \[0, 4\), got 2 to 4"):
        table.insert([2, 4], [1, 1], [0, 0], [2, 3])
    with pytest.raises(ValueError, match="must not be negative, got -1 and 2"):
        table.insert([2], [1], [-1], [2])
    with pytest.raises(ValueError, match=r"each slot takes one request; live already: \[0\]"):
        table.insert([0], [1], [0], [2])
    with pytest.raises(ValueError, match=r"each slot takes one request; .*inserted: \[2, 2\]"):
        table.insert([2, 2], [1, 1], [0, 0], [2, 3])
    with pytest.raises(ValueError, match="priority ranks must not be negative, got -2"):
        table.set_priority_ranks([0], [-2])
    with pytest.raises(ValueError, match="lane must be 0"):
        table.set_lane([0], 2)
    with pytest.raises(ValueError, match=f"at most {MAX_BATCH} requests are scored at a time, got 65"):
        table.upload([(0, 1)] * 65)
    with pytest.raises(ValueError, match="prompt_work must have one entry a request: 1 for 2"):
        table.upload([(0, 1), (1, 1)], [3.0])
    with pytest.raises(ValueError, match=r"slots must be in \[0, 4\), got 4 to 4"):
        table.upload([(-1, 0), (4, 1)])
    with pytest.raises(ValueError, match=r"score must be \(B,\) with B from 1 to 64, got \(0,\)"):
        table.publish(scores_of([]))
    with pytest.raises(ValueError, match=r"score must be contiguous \(2,\) torch.float32, got .*float64"):
        table.publish(scores_of([1.0, 2.0]).double())
    with pytest.raises(ValueError, match=r"slots must be live and given once; not live: \[3\]"):
        table.free([3])
    with pytest.raises(ValueError, match="slots must be live and given once"):
        table.set_lane([0, 0], NORMAL_LANE)
    with pytest.raises(ValueError, match="k must be 1 to 1024, got 0"):
        table.order(0)
    with pytest.raises(ValueError, match="the workspace is for 4 slots and k up to 16"):
        table.order(17)
    assert order(table, 3) == [*slots, -1]


class AgainstAList(RuleBasedStateMachine):
    """Any interleaving of arrivals, late scores, preemptions and departures, in a table of four slots."""

    @initialize()
    def start(self) -> None:
        self.table = empty(4)
        self.table.set_median_key(1.0)
        self.median = 1.0
        self.waiting: dict[int, list[float]] = {}  # slot -> [rank, lane, key, seq]
        self.scoring: list[tuple[int, int, bool]] = []  # slot, generation, still waiting
        self.seq = 0

    @rule(rank=st.integers(0, 2))
    def arrive(self, rank: int) -> None:
        taken = self.table.acquire()
        assert (taken is None) == (len(self.waiting) == 4)
        if taken:
            self.table.insert([taken[0]], [taken[1]], [rank], [self.seq])
            self.waiting[taken[0]] = [rank, NORMAL_LANE, math.nan, self.seq]
            self.scoring.append((*taken, True))
            self.seq += 1

    @precondition(lambda self: self.scoring)
    @rule(data=st.data(), key=st.sampled_from([0.0, -0.0, 1.0, 2.0, math.nan, math.inf, -math.inf]))
    def score(self, data: st.DataObject, key: float) -> None:
        slot, generation, waits = self.scoring.pop(data.draw(st.integers(0, len(self.scoring) - 1)))
        publish(self.table, [slot], [generation], [key])
        if waits:
            self.waiting[slot][2] = min(max(key, 0.0), 64.0) if math.isfinite(key) else math.nan

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.waiting)))
        self.table.free([slot])
        self.table.release(slot)
        del self.waiting[slot]
        self.scoring = [(s, generation, waits and s != slot) for s, generation, waits in self.scoring]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.waiting)))
        self.table.set_lane([slot], PREEMPTED_LANE)
        self.waiting[slot][1] = PREEMPTED_LANE

    @rule(median=st.sampled_from([0.0, 1.0, 1.5]))
    def move_median(self, median: float) -> None:
        self.table.set_median_key(median)
        self.median = median

    @invariant()
    def same_order(self) -> None:
        keyed = {slot: [rank, lane, self.median if math.isnan(key) else key, seq]
                 for slot, (rank, lane, key, seq) in self.waiting.items()}  # fmt: skip
        expected = sorted(keyed, key=lambda slot: keyed[slot])
        assert order(self.table, 4) == expected + [-1] * (4 - len(expected))


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=6, stateful_step_count=12, deadline=None)
