"""The waiting queue's order on a GPU: our top-k against torch's, and where it beats the host's heaps.

    python -m bench.gpu_queue

`rows` gives one tidy dict a measurement. Top-k is GPU time of a captured graph with L2 flushed before each
replay (`triton.testing.do_bench`); every provider starts from the table's columns, so packing the keys is in
its time, and gives slot ids in order. Ours includes what marks tiles: a fill of the flags in the full form, a
`slot_update` in the incremental one. Pops are host time, by the clock. Needs an NVIDIA GPU.
"""

import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pars_fast.guard import GuardSettings
from pars_fast.host_index import Entry, HostIndex
from pars_fast.kernels.queue_topk import MAX_RANKS, SEQ_BITS, TopkWorkspace, queue_topk
from pars_fast.kernels.slot_update import slot_update
from pars_fast.policies import POLICIES

SLOTS = (1 << 14, 1 << 18, 1 << 20, 1 << 22)
TOP = (256, 1024)
CHANGED = 16  # slots changed since the last order, each in a tile of its own where there are as many
POP_WAITING = (1 << 12, 1 << 14, 1 << 16, 1 << 18)
POPS = 16  # admitted in one step
POP_ROUNDS = 200
K_ORDER = 1024  # slots that come to the host, as in `integration/gpu_scoring.py`
QUANTILES = (0.2, 0.5, 0.8)
Table = dict[str, Tensor]


def rows() -> Iterator[dict[str, Any]]:
    """All measurements. Raises: RuntimeError: if there is no GPU."""
    require_gpu()
    for num_slots, k in itertools.product(SLOTS, TOP):
        yield from topk_rows(num_slots, k)
    for waiting in POP_WAITING:
        yield from pop_rows(waiting)


def require_gpu() -> None:
    """Raises: RuntimeError: if no NVIDIA GPU is visible, or the interpreter would run the kernels."""
    import triton

    if not torch.cuda.is_available():
        raise RuntimeError("bench.gpu_queue needs an NVIDIA GPU, and torch sees none: not measured")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: an interpreted kernel's time says nothing; unset it")


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


def topk_rows(num_slots: int, k: int) -> Iterator[dict[str, Any]]:
    """Our full and incremental top-k, torch.topk and torch.sort; the torch keys are compiled into one kernel.

    Bytes moved of torch's are the least it can do: columns read, keys written, and read once.
    """
    table = make_table(num_slots, "cuda")
    workspace = TopkWorkspace(num_slots, k, "cuda")
    tiles = len(workspace.dirty)
    changed = min(CHANGED, tiles)
    urgency = torch.compile(packed_urgency, dynamic=False)
    marks = slot_changes(table, changed, workspace)

    def full() -> Tensor:
        workspace.dirty.fill_(1)
        return queue_topk(**table, k=k, workspace=workspace)

    def incremental() -> Tensor:
        marks()
        return queue_topk(**table, k=k, workspace=workspace)

    least = 37 * num_slots  # 21 of columns, 8 of keys written, 8 read
    providers: dict[str, tuple[Callable[[], Tensor], int, int]] = {
        "pars_fast_full": (full, num_slots, workspace.bytes_moved(tiles)),
        "pars_fast_incremental": (incremental, changed, workspace.bytes_moved(changed)),
        "torch_topk": (lambda: urgency(**table).topk(k).indices, num_slots, least),
        "torch_sort": (lambda: urgency(**table).sort(descending=True).indices[:k], num_slots, least),
    }
    expected = full().tolist()
    for provider, (order, changed_slots, bytes_moved) in providers.items():
        assert order().tolist() == expected, f"{provider} gives another order of {num_slots} slots"
        yield {
            "op": "queue_topk", "provider": provider, "slots": num_slots, "k": k, "changed": changed_slots,
            **graph_time(order), "bytes_moved": bytes_moved,
        }  # fmt: skip


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


def graph_time(run: Callable[[], Any]) -> dict[str, float]:
    """GPU time of `run`, already warm, as a captured graph."""
    import triton

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times_ms = triton.testing.do_bench(graph.replay, quantiles=list(QUANTILES))
    return quantile_columns([1e3 * time_ms for time_ms in times_ms])


def pop_rows(waiting: int) -> Iterator[dict[str, Any]]:
    """POPS admissions from `HostIndex`, by its heaps and by the device's order.

    The crossover is where `device_hint` falls under `host_heaps`. The third row, `device_order`, is what such
    an order costs the ranker's thread, not the scheduling thread: changes, order, K_ORDER slots to the host.
    """
    for provider, hinted in (("host_heaps", False), ("device_hint", True)):
        times_us = pop_times_us(waiting, hinted=hinted)
        yield _pop_row(waiting, provider, times_us, None)
    workspace = TopkWorkspace(waiting, K_ORDER, "cuda")
    times_us = device_order_times_us(make_table(waiting, "cuda"), workspace)
    bytes_moved = workspace.bytes_moved(min(CHANGED, len(workspace.dirty)))
    yield _pop_row(waiting, "device_order", times_us, bytes_moved)


def pop_times_us(waiting: int, *, hinted: bool, rounds: int = POP_ROUNDS) -> list[float]:
    """Host times of POPS pops from `waiting` scored requests, refilled between rounds."""
    index = HostIndex(
        POLICIES["pars_fast"](), GuardSettings(), device_order_min_waiting=1 if hinted else 1 << 62
    )
    rng = random.Random(0)
    seqs = itertools.count()
    times_us = []
    for _ in range(rounds):
        while len(index) < waiting:
            entry = Entry(next(seqs), 0, SimpleNamespace(max_tokens=1))
            index.set_expected_tokens(entry, rng.lognormvariate(5.0, 1.0))
            index.add(entry)
        if hinted:
            index.set_device_order([entry.seq for entry in itertools.islice(index, K_ORDER)])
        start = time.perf_counter()
        for _ in range(POPS):
            index.pop()
        times_us.append(1e6 * (time.perf_counter() - start))
    return times_us


def device_order_times_us(table: Table, workspace: TopkWorkspace) -> list[float]:
    """Host times from changes in host memory to slots in host memory, on an idle GPU."""
    marks = slot_changes(table, min(CHANGED, len(workspace.dirty)), workspace)
    host = torch.empty(K_ORDER, dtype=torch.int32, pin_memory=True)
    done = torch.cuda.Event(blocking=True)
    times_us = []
    for _ in range(POP_ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        marks()
        host.copy_(queue_topk(**table, k=K_ORDER, workspace=workspace), non_blocking=True)
        done.record()
        done.synchronize()
        times_us.append(1e6 * (time.perf_counter() - start))
    return times_us


def quantile_columns(times_us: list[float]) -> dict[str, float]:
    return dict(zip(("time_us_p20", "time_us_p50", "time_us_p80"), times_us, strict=True))


def _pop_row(waiting: int, provider: str, times_us: list[float], bytes_moved: int | None) -> dict[str, Any]:
    return {
        "op": f"queue_pop_{POPS}", "provider": provider, "slots": waiting, "k": K_ORDER, "changed": POPS,
        **quantile_columns(np.quantile(times_us, QUANTILES).tolist()), "bytes_moved": bytes_moved,
    }  # fmt: skip


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row), flush=True)
