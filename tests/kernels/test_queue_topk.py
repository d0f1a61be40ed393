"""Queue top-k against stable sorts: the order is total, so results must be equal, not close."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pars_fast.kernels import queue_topk as module
from pars_fast.kernels.queue_topk import MAX_RANKS, MAX_SEQ_SPAN, queue_topk, queue_topk_reference

SEQ_BASE = 10**12  # far past 32 bits: only the offset may be packed

# The floats an order gets wrong: both zeros, denormals, neighbours, the largest, and what counts as unscored.
KEYS = [0.0, -0.0, 1e-45, -1e-45, 1.0, 1.0000001, -1.0, 3.4028235e38, -3.4028235e38,
        float("nan"), float("inf"), float("-inf")]  # fmt: skip
FIELDS = ("priority_rank", "lane", "key", "seq", "occupied", "median_key", "seq_base")


def random_queue(num_slots: int, device: torch.device, occupied: float = 0.7) -> dict[str, Tensor]:
    """Many equal ranks and keys, so every field decides somewhere; seqs reach both ends of their range."""
    generator = torch.Generator().manual_seed(0)

    def integers(high: int) -> Tensor:
        return torch.randint(0, high, (num_slots,), generator=generator)

    offsets = torch.randperm(num_slots, generator=generator)
    offsets[offsets % 2 == 1] += MAX_SEQ_SPAN - num_slots
    queue = {
        "priority_rank": (integers(3) * (MAX_RANKS - 1) // 2).int(),
        "lane": integers(2).int(),
        "key": torch.tensor(KEYS)[integers(len(KEYS))],
        "seq": SEQ_BASE + offsets,
        "occupied": torch.rand(num_slots, generator=generator) < occupied,
        "median_key": torch.tensor([1.0]),
        "seq_base": torch.tensor([SEQ_BASE]),
    }
    return {name: tensor.to(device) for name, tensor in queue.items()}


def assert_same_order(queue: dict[str, Tensor], k: int) -> None:
    slots = queue_topk(**queue, k=k)
    assert slots.dtype == torch.int32
    assert slots.tolist() == queue_topk_reference(**queue, k=k).tolist()


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(("num_slots", "k"), [(1, 1), (1, 7), (37, 37), (300, 20), (1500, 1000), (2049, 1)])
def test_matches_stable_sorts(num_slots: int, k: int, device: torch.device) -> None:
    assert_same_order(random_queue(num_slots, device), k)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("num_slots", [16 * 8, 16 * 8 + 1, 16 * 8 * 3 + 3], ids=lambda n: f"{n}_slots")
def test_merges_any_number_of_lists(
    num_slots: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TILE", 16)  # one and two levels of merging without a huge table
    assert_same_order(random_queue(num_slots, device), k=16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: minutes in the interpreter")
@pytest.mark.parametrize("num_slots", [2**18, 2**20 + 5])
@pytest.mark.parametrize("k", [256, 1024])
def test_matches_stable_sorts_on_large_tables(num_slots: int, k: int) -> None:
    assert_same_order(random_queue(num_slots, torch.device("cuda")), k)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_small_queue(data: st.DataObject, device: torch.device) -> None:
    num_slots = data.draw(st.integers(1, 50))
    keys = st.sampled_from(KEYS) | st.floats(width=32)

    def column(values: st.SearchStrategy[Any], dtype: torch.dtype) -> Tensor:
        drawn = data.draw(st.lists(values, min_size=num_slots, max_size=num_slots))
        return torch.tensor(drawn, dtype=dtype, device=device)

    seqs = st.integers(0, MAX_SEQ_SPAN - 1)
    offsets = data.draw(st.lists(seqs, min_size=num_slots, max_size=num_slots, unique=True))
    queue = {
        "priority_rank": column(st.sampled_from([0, 1, MAX_RANKS - 1]), torch.int32),
        "lane": column(st.integers(0, 1), torch.int32),
        "key": column(keys, torch.float32),
        "seq": torch.tensor(offsets, device=device) + SEQ_BASE,
        "occupied": column(st.booleans(), data.draw(st.sampled_from([torch.bool, torch.int32]))),
        "median_key": torch.tensor([data.draw(keys)], dtype=torch.float32, device=device),
        "seq_base": torch.tensor([SEQ_BASE], device=device),
    }
    assert_same_order(queue, k=data.draw(st.integers(1, 64)))


def test_an_empty_queue_is_all_padding(device: torch.device) -> None:
    assert queue_topk(**random_queue(40, device, occupied=0.0), k=3).tolist() == [-1, -1, -1]


def test_ties_go_to_the_earlier_request(device: torch.device) -> None:
    queue = random_queue(200, device, occupied=1.0)
    queue["priority_rank"].zero_(), queue["lane"].zero_()
    queue["key"] = torch.tensor([0.0, -0.0], device=device).repeat(100)
    assert queue_topk(**queue, k=64).tolist() == queue["seq"].argsort()[:64].tolist()


def test_each_field_outranks_those_after_it(device: torch.device) -> None:
    """Slot 0 loses on one field and wins on all the later ones."""
    worse = {"priority_rank": 1, "lane": 1, "key": 2.0, "seq": 5}
    for position, name in enumerate(worse):
        queue = {
            field: torch.tensor([value, value], device=device)
            for field, value in {"priority_rank": 0, "lane": 0, "key": 1.0, "seq": 3}.items()
        }
        queue["priority_rank"], queue["lane"] = queue["priority_rank"].int(), queue["lane"].int()
        for later in list(worse)[position:]:
            queue[later][int(later != name)] = worse[later]
        queue |= {"occupied": torch.ones(2, dtype=torch.bool, device=device),
                  "median_key": torch.zeros(1, device=device),
                  "seq_base": torch.zeros(1, dtype=torch.int64, device=device)}  # fmt: skip
        assert queue_topk(**queue, k=2).tolist() == [1, 0], name


def test_a_free_slot_may_hold_anything(device: torch.device) -> None:
    queue = random_queue(50, device)
    free = ~queue["occupied"]
    queue["priority_rank"][free], queue["lane"][free] = -(2**31), 2**31 - 1
    queue["seq"][free], queue["key"][free] = -(2**63), torch.nan
    assert_same_order(queue, k=50)


def test_fields_past_their_limit_saturate_and_stay_in_their_field(device: torch.device) -> None:
    queue = random_queue(4, device, occupied=1.0)
    queue["priority_rank"] = torch.tensor([2**31 - 1, MAX_RANKS - 1, -5, 0], dtype=torch.int32, device=device)
    queue["lane"] = torch.tensor([0, 1, 0, 7], dtype=torch.int32, device=device)
    queue["key"] = torch.zeros(4, device=device)
    queue["seq"] = torch.tensor([2**62, SEQ_BASE, SEQ_BASE - 9, SEQ_BASE], device=device)
    assert queue_topk(**queue, k=4).tolist() == [2, 3, 0, 1]


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "k zero": ({"k": 0}, "k must be 1 to 1024, got 0"),
    "k large": ({"k": 1025}, "k must be 1 to 1024, got 1025"),
    "no slots": ({"key": torch.zeros(0)}, r"at least one slot, got \(0,\)"),
    "rank": ({"priority_rank": torch.zeros(5)}, r"priority_rank must be contiguous \(5,\) torch.int32, got"),
    "lane": ({"lane": torch.zeros(4).int()}, r"lane must be contiguous \(5,\) .*got \(4,\)"),
    "key dtype": ({"key": torch.zeros(5).half()}, "key must be .*torch.float32, got .*torch.float16"),
    "seq": ({"seq": torch.zeros(5).int()}, "seq must be .*torch.int64, got .*torch.int32"),
    "occupied": ({"occupied": torch.zeros(5)}, "occupied must be .*torch.bool or torch.int32"),
    "median": ({"median_key": torch.tensor(0.0)}, r"median_key must be contiguous \(1,\)"),
    "seq_base": ({"seq_base": torch.zeros(2).long()}, r"seq_base must be contiguous \(1,\)"),
    "stride": ({"seq": torch.zeros(10).long()[::2]}, "seq must be contiguous"),
    "device": ({"lane": torch.zeros(5, device="meta").int()}, "lane must lie on cpu like key, got meta"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong(case: str) -> None:
    change, message = ERRORS[case]
    arguments: dict[str, Any] = random_queue(5, torch.device("cpu")) | {"k": 2}
    assert set(arguments) == {*FIELDS, "k"}
    with pytest.raises(ValueError, match=message):
        queue_topk(**(arguments | change))
