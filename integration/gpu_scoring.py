"""Scoring on the engine's GPU, with the order of the scored requests kept there too.

Runs in the ranker's thread on a stream of its own. After each batch the queue top-k kernel orders the slot
table, and the ids of the first K_ORDER slots come to the host with the scores. Finished requests keep their
slots until the next batch: the host passes over them.
"""

from collections.abc import Sequence

import torch

from pars_fast.integration.runtime import Prompt, Scored
from pars_fast.integration.scoring import PromptScorer
from pars_fast.ranker import Ranker
from pars_fast.slot_table import SlotTable

K_ORDER = 1024  # 4 times what a step of 256 seats can admit


class DeviceOrder:
    """Seqs of scored requests in order of their keys, on the device. One priority; see `HostIndex._hint`."""

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._slots: dict[int, int] = {}  # seq -> slot
        self._seqs: dict[int, int] = {}  # slot -> seq
        self._overflowed = False

    def add(self, scored: Sequence[Scored]) -> None:
        """Requests and their keys; once one finds no slot, `order` gives None until all have left."""
        taken = []
        for seq, key in scored:
            if (slot := self._table.acquire()) is None:
                self._overflowed = True
                break
            taken.append((*slot, seq, key))
        if not taken:
            return
        slots, generations, seqs, keys = map(list, zip(*taken, strict=True))
        self._slots.update(zip(seqs, slots, strict=True))
        self._seqs.update(zip(slots, seqs, strict=True))
        self._table.insert(slots, generations, [0] * len(slots), seqs)
        column = torch.tensor(keys, dtype=torch.float32, device=self._table.device)
        self._table.set_keys(slots, generations, column)

    def remove(self, seqs: Sequence[int]) -> None:
        """Drop requests; those that never had a slot are passed over."""
        slots = [self._slots.pop(seq) for seq in seqs if seq in self._slots]
        self._table.free(slots)
        for slot in slots:
            self._table.release(slot)
            del self._seqs[slot]
        self._overflowed = self._overflowed and bool(self._slots)

    def first(self, k: int) -> list[int] | None:
        """Seqs of the k requests that run first; None if the table cannot order all."""
        slots = None if self._overflowed else self._table.order(k)
        if slots is None:
            return None
        # Waits for the copy, in this thread: the scheduling thread sees the list when it is complete.
        return [self._seqs[slot] for slot in slots.tolist() if slot >= 0]


class GpuScorer:
    """A `PromptScorer` that keeps the device's order up to date. Source of the contract: `runtime.Scorer`."""

    def __init__(self, scorer: PromptScorer, order: DeviceOrder, device: torch.device) -> None:
        self._scorer, self._order = scorer, order
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, prompts: Sequence[Prompt]) -> list[Scored]:
        with torch.cuda.stream(self._stream):
            scored = self._scorer(prompts)
            self._order.add([(seq, tokens) for seq, tokens in scored if tokens == tokens])  # NaN has no key
        return scored

    def order(self) -> Sequence[int] | None:
        with torch.cuda.stream(self._stream):
            return self._order.first(K_ORDER)

    def forget(self, seqs: Sequence[int]) -> None:
        with torch.cuda.stream(self._stream):
            self._order.remove(seqs)


def make_gpu_scorer(ranker: str, tokenizer: str, revision: str | None) -> GpuScorer:
    """Load the ranker onto the current GPU. Raises: CheckpointError: as `Ranker.from_pretrained`."""
    device = torch.device("cuda", torch.cuda.current_device())
    scorer = PromptScorer(Ranker.from_pretrained(ranker, device=device), tokenizer, revision)
    return GpuScorer(scorer, DeviceOrder(SlotTable(device=device)), device)
