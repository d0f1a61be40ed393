"""The first k of the waiting queue on a GPU: the kernel that packs keys and selects, against torch's ops.

torch orders by one key and needs elementwise kernels to make it, as `SlotTable` is laid out: unscored
requests get the median, free slots +inf. It leaves priority, lane and seq out, so ties are in no order.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.gpu_cases import Case
from bench.timers import Call
from pars_fast.kernels.queue_topk import queue_topk

WAITING = (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
K = (256, 1024)
SLOT_BYTES = 21  # rank 4, lane 4, key 4, seq 8, occupied 1: read once


def cases() -> Iterator[Case]:
    for k in K:
        for waiting in WAITING:
            for provider in PROVIDERS:
                yield Case(
                    "queue_topk",
                    provider,
                    {"waiting": waiting, "k": k},
                    partial(_setup, provider, waiting, k),
                    bytes_moved=SLOT_BYTES * waiting + 4 * k,
                    baseline="torch_topk",
                )


def _setup(provider: str, waiting: int, k: int) -> Call:
    generator = torch.Generator("cuda").manual_seed(0)
    key = torch.empty(waiting, device="cuda").log_normal_(5.0, 1.0, generator=generator)
    key[::16] = torch.nan  # not scored yet
    return partial(PROVIDERS[provider], Columns(key), k)


class Columns:
    """A slot table's columns, all slots taken, arrivals in the order of the slots."""

    def __init__(self, key: Tensor) -> None:
        self.key = key
        self.priority_rank, self.lane = (
            torch.zeros_like(key, dtype=torch.int32),
            torch.ones_like(key, dtype=torch.int32),
        )
        self.seq = torch.arange(len(key), device=key.device)
        self.occupied = torch.ones_like(key, dtype=torch.bool)
        self.median_key = torch.full((1,), 148.0, device=key.device)
        self.seq_base = torch.zeros(1, dtype=torch.int64, device=key.device)


def _pars_fast(columns: Columns, k: int) -> Tensor:
    return queue_topk(
        columns.priority_rank,
        columns.lane,
        columns.key,
        columns.seq,
        columns.occupied,
        columns.median_key,
        columns.seq_base,
        k=k,
    )


def _torch_topk(columns: Columns, k: int) -> Tensor:
    return _float_keys(columns).topk(k, largest=False).indices


def _torch_sort(columns: Columns, k: int) -> Tensor:
    return _float_keys(columns).sort(stable=True).indices[:k]


def _float_keys(columns: Columns) -> Tensor:
    key = torch.where(columns.key.isfinite(), columns.key, columns.median_key)
    return torch.where(columns.occupied, key, torch.inf)


PROVIDERS: dict[str, Callable[[Columns, int], Tensor]] = {
    "torch_topk": _torch_topk,
    "torch_sort": _torch_sort,
    "pars_fast": _pars_fast,
}
