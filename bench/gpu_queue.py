"""The waiting queue's order on a GPU: our top-k against torch's, and where it beats the host's own order.

Every provider of a top-k starts from the table's columns, so packing the keys is in its time, and gives slot
ids in order. Ours includes what marks tiles: a fill of the flags in the full form, a `slot_update` in the
incremental one. Pops are host time: the crossover is where `device_hint` falls under `host_heaps`.
`device_order` is what such an order costs the ranker's thread, not the scheduling thread: changes, order, and
K_ORDER slots to the host.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from bench.gpu_cases import Case
from bench.timers import Call, host_time
from pars_fast.bench_results import Times
from pars_fast.bench_table import quantiles_us
from pars_fast.guards import OvertakingBudget
from pars_fast.host_index import HostIndex
from pars_fast.integration.gpu_scoring import K_ORDER
from pars_fast.kernels.queue_topk import MAX_RANKS, SEQ_BITS, TopkWorkspace, queue_topk
from pars_fast.kernels.slot_update import slot_update
from pars_fast.policies import POLICIES
from pars_fast.priority_class import Entry

SLOTS = (1 << 14, 1 << 18, 1 << 20, 1 << 22)
TOP = (256, 1024)
CHANGED = 16  # slots changed since the last order, each in a tile of its own where there are as many
POP_WAITING = (1 << 12, 1 << 14, 1 << 16, 1 << 18)
POPS = 16  # admitted in one step
POP_ROUNDS = 200
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
    for waiting in POP_WAITING:
        for provider, hinted in (("host_heaps", False), ("device_hint", True)):
            yield Case(
                f"queue_pop_{POPS}",
                provider,
                {"waiting": waiting, "k": K_ORDER},
                partial(Pops, waiting, hinted=hinted),
                baseline="host_heaps",
                timer=pop_time,
            )
        yield Case(
            "device_order",
            "pars_fast",
            {"waiting": waiting, "k": K_ORDER},
            partial(_device_order, waiting),
            timer=host_time,
        )


def _setup(provider: str, num_slots: int, k: int) -> Call:
    table = make_table(num_slots, "cuda")
    call = PROVIDERS[provider](table, k)
    expected = _full(table, k)().tolist()
    if call().tolist() != expected:
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


class Pops:
    """POPS admissions from a `HostIndex` of `waiting` scored requests, by its own or a device's order."""

    def __init__(self, waiting: int, *, hinted: bool) -> None:
        self.index = HostIndex(
            POLICIES["pars"](), OvertakingBudget(), device_order_min_waiting=1 if hinted else 1 << 62
        )
        self._waiting, self._hinted = waiting, hinted
        self._rng, self._seqs = random.Random(0), itertools.count()

    def refill(self) -> None:
        """Back to `waiting` requests, the device's order up to date."""
        while len(self.index) < self._waiting:
            entry = Entry(next(self._seqs), 0, SimpleNamespace(max_tokens=1))
            self.index.set_expected_tokens(entry, self._rng.lognormvariate(5.0, 1.0))
            self.index.add(entry)
        if self._hinted:
            self.index.set_device_order([entry.seq for entry in itertools.islice(self.index, K_ORDER)])

    def __call__(self) -> None:
        for _ in range(POPS):
            self.index.pop()


def pop_time(call: Call) -> Times:
    """Host time of the pops alone."""
    assert isinstance(call, Pops)
    times = []
    for _ in range(POP_ROUNDS):
        call.refill()
        started = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - started)
    return quantiles_us(times, ns_per_unit=1)


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
