"""The waiting queue's order on a GPU: our top-k against torch's.

Every provider of a top-k starts from the table's columns, so packing the keys is in its time, and gives slot
ids in order. Ours includes what marks tiles: a fill of the flags in the full form, a `slot_update` in the
incremental one. `device_order` is what such an order costs the ranker's thread, not the scheduling thread:
changes, order, and K_ORDER slots to the host. From how many requests on it pays the host alone decides
(`bench_queue.py`).
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.gpu_cases import Case
from bench.gpu_providers import capture
from bench.timers import Call, host_time
from pars_fast.kernels.queue_topk import MAX_RANKS, SEQ_BITS, TopkWorkspace, queue_topk
from pars_fast.kernels.slot_update import slot_update
from pars_fast.slot_table import K_ORDER

SLOTS = (1 << 14, 1 << 18, 1 << 20, 1 << 22)
TOP = (256, 1024)
CHANGED = 16  # slots changed since the last order, each in a tile of its own where there are as many
ORDER_WAITING = (1 << 12, 1 << 14, 1 << 16, 1 << 18)
SLOT_BYTES = 21  # rank 4, lane 4, key 4, seq 8, occupied 1: what an order of all slots cannot do without
Table = dict[str, Tensor]


def cases() -> Iterator[Case]:
    for num_slots, k, provider in itertools.product(SLOTS, TOP, PROVIDERS):
        yield Case(
            "queue_topk",
            provider,
            {"waiting": num_slots, "k": k},
            partial(_setup, provider, num_slots, k),
            # The incremental form reads less, but the order it gives is the same one.
            bytes_moved=SLOT_BYTES * num_slots + 4 * k,
            baseline="torch_topk",
        )
    for waiting in ORDER_WAITING:
        yield Case(
            "device_order",
            "pars_fast",
            {"waiting": waiting, "k": K_ORDER},
            partial(_device_order, waiting),
            timer=host_time,
        )


def _setup(provider: str, num_slots: int, k: int) -> Call:
    table = make_table(num_slots, "cuda")
    expected = _full(table, k)().tolist()
    call = capture(PROVIDERS[provider](table, k))  # the GPU's time, not that of some launches
    order = call()
    assert isinstance(order, Tensor)
    if order.tolist() != expected:
        raise RuntimeError(f"{provider} gives another order of {num_slots} slots")
    return call


def _full(table: Table, k: int) -> Callable[[], Tensor]:
    workspace = TopkWorkspace(len(table["key"]), k, table["key"].device)

    def order() -> Tensor:
        workspace.dirty.fill_(1)
        return queue_topk(**table, k=k, workspace=workspace)

    return order


def _incremental(table: Table, k: int) -> Callable[[], Tensor]:
    workspace = TopkWorkspace(len(table["key"]), k, table["key"].device)
    change = slot_changes(table, min(CHANGED, len(workspace.dirty)), workspace)

    def order() -> Tensor:
        change()
        return queue_topk(**table, k=k, workspace=workspace)

    return order


def _torch_topk(table: Table, k: int) -> Callable[[], Tensor]:
    urgency = torch.compile(packed_urgency, dynamic=False)
    return lambda: urgency(**table).topk(k).indices


def _torch_sort(table: Table, k: int) -> Callable[[], Tensor]:
    urgency = torch.compile(packed_urgency, dynamic=False)
    return lambda: urgency(**table).sort(descending=True).indices[:k]


PROVIDERS: dict[str, Callable[[Table, int], Callable[[], Tensor]]] = {
    "torch_topk": _torch_topk,
    "torch_sort": _torch_sort,
    "pars_fast_full": _full,
    "pars_fast_incremental": _incremental,
}


def make_table(num_slots: int, device: torch.device | str) -> Table:
    """A full table of one priority: lognormal keys, one request in 16 unscored, one in 16 preempted."""
    generator = torch.Generator().manual_seed(0)
    key = torch.empty(num_slots).log_normal_(5.0, 1.0, generator=generator)
    key[torch.rand(num_slots, generator=generator) < 1 / 16] = torch.nan
    table = {
        "priority_rank": torch.zeros(num_slots, dtype=torch.int32),
        "lane": (torch.rand(num_slots, generator=generator) >= 1 / 16).int(),
        "key": key,
        "seq": torch.randperm(num_slots, generator=generator),
        "occupied": torch.ones(num_slots, dtype=torch.bool),
        "median_key": torch.tensor([150.0]),
        "seq_base": torch.zeros(1, dtype=torch.int64),
    }
    return {name: column.to(device) for name, column in table.items()}


def packed_urgency(
    priority_rank: Tensor,
    lane: Tensor,
    key: Tensor,
    seq: Tensor,
    occupied: Tensor,
    median_key: Tensor,
    seq_base: Tensor,
) -> Tensor:
    """(N,) int64, larger = more urgent: what `queue_topk` packs, in torch's elementwise operations."""
    finite_key = torch.where(key.isfinite(), key, median_key) + 0.0
    bits = finite_key.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + (1 << 31)
    group = (priority_rank * 2 + lane).long() - MAX_RANKS
    packed = (group << (32 + SEQ_BITS)) + (ordered << SEQ_BITS) + (seq - seq_base)
    return torch.where(occupied, ~packed, torch.iinfo(torch.int64).min)


def slot_changes(table: Table, changed: int, workspace: TopkWorkspace) -> Callable[[], None]:
    """A launch of `slot_update` that writes `changed` slots, spread over the table, as they are."""
    device, num_slots = table["key"].device, len(table["key"])
    slots = torch.arange(changed, device=device) * (num_slots // changed)
    group = 2 * table["priority_rank"][slots] + table["lane"][slots]
    generation = torch.zeros(num_slots, dtype=torch.int64, device=device)
    commands = torch.stack([slots, generation[slots], group.long(), table["seq"][slots]], dim=1)
    header = torch.tensor([changed, 0, int(table["median_key"].view(torch.int32)), 0], device=device)

    def launch() -> None:
        slot_update(
            header, commands, **table, generation=generation, dirty=workspace.dirty,
            tile_size=workspace.tile_size,
        )  # fmt: skip

    return launch


def _device_order(waiting: int) -> Call:
    """From changes in host memory to slots in host memory."""
    table = make_table(waiting, "cuda")
    order = _incremental(table, K_ORDER)
    host = torch.empty(K_ORDER, dtype=torch.int32, pin_memory=True)
    done = torch.cuda.Event(blocking=True)

    def call() -> None:
        host.copy_(order(), non_blocking=True)
        done.record()
        done.synchronize()

    return call
