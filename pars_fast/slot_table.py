"""The waiting queue on the device: one slot a request, ordered by `queue_topk`, no tensor read by the host.

Structure of arrays, preallocated, addresses fixed for life (captured graphs hold them). A slot carries a
generation, raised each time it is taken, so that a score which comes back after its request has left and the
slot has a new owner is recognised and dropped, on the device, without a synchronisation.

Two sides, which may live in two threads as long as the device side sees events in the order they happened:
the owner of the queue calls `acquire` and `release` (host only, no tensor); whoever owns the stream calls
the rest.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from pars_fast.kernels.queue_topk import MAX_RANKS, MAX_SEQ_SPAN, queue_topk

DEFAULT_CAPACITY = 1 << 18
PREEMPTED_LANE, NORMAL_LANE = 0, 1

# seq_base moves in steps of this many seqs, so the host counts a handful of blocks instead of sorting seqs.
_SEQ_BLOCK_BITS = 16


class SlotTable:
    """Slots for `capacity` waiting requests on `device`; 29 bytes a slot.

    On CPU tensors the kernel needs Triton's interpreter, which is for tests.

    Raises: ValueError: if `capacity` is not positive.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY, device: torch.device | str = "cuda") -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.device = torch.device(device)
        # The row past the end is a bin: writes that must not happen go there, so a dropped score can never
        # race with the write that replaced it, and no mask has to come back to the host.
        rows = capacity + 1
        self._priority_rank = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self._lane = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self._key = torch.full((rows,), torch.nan, dtype=torch.float32, device=self.device)
        self._seq = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._occupied = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self._generation = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._median_key = torch.zeros(1, dtype=torch.float32, device=self.device)
        self._seq_base = torch.zeros(1, dtype=torch.int64, device=self.device)

        # Owner's side. Lowest slots first and last freed first reused: the used part stays short and warm.
        self._free = list(range(capacity - 1, -1, -1))
        self._taken = bytearray(capacity)
        self._next_generation = [1] * capacity

        # Stream's side: what tells, without asking the device, whether the live fields fit the packed key.
        self._packed_fields: dict[int, tuple[int, int]] = {}  # slot -> (priority rank, seq)
        self._live_blocks: Counter[int] = Counter()  # seq block -> live requests
        self._unpackable_ranks = 0
        self._newest_seq = 0
        self._host_seq_base = 0
        self._used = 0  # slots at or past this were never inserted

    def __len__(self) -> int:
        """Requests inserted and not freed."""
        return len(self._packed_fields)

    # -- owner's side --

    def acquire(self) -> tuple[int, int] | None:
        """A free slot and its new generation; None when the table is full: then the host index orders."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._taken[slot] = 1
        generation = self._next_generation[slot]
        self._next_generation[slot] = generation + 1
        return slot, generation

    def release(self, slot: int) -> None:
        """Give a slot back. Its `free` must reach the device before the `insert` of whoever takes it next.

        Raises: ValueError: if the slot is not taken.
        """
        if not (0 <= slot < self.capacity and self._taken[slot]):
            raise ValueError(f"slot {slot} is not taken: it was never acquired, or was released before")
        self._taken[slot] = 0
        self._free.append(slot)

    # -- stream's side --

    def insert(
        self,
        slots: Sequence[int],
        generations: Sequence[int],
        priority_ranks: Sequence[int],
        seqs: Sequence[int],
    ) -> None:
        """Requests start to wait, unscored and in the normal lane.

        Args: four columns of one length; priority_ranks dense from 0, seqs unique among live requests.
        Raises: ValueError: if columns differ in length, a slot is outside the table, live already or given
            twice, or a rank or seq is negative. Nothing is changed then.
        """
        self._check(slots, generations=generations, priority_ranks=priority_ranks, seqs=seqs)
        if not slots:
            return
        if min(priority_ranks) < 0 or min(seqs) < 0:
            raise ValueError(
                f"priority ranks and seqs must not be negative, got {min(priority_ranks)} and {min(seqs)}"
            )
        live = [slot for slot in slots if slot in self._packed_fields]
        if live or len(set(slots)) < len(slots):
            raise ValueError(f"each slot takes one request; live already: {live}, inserted: {list(slots)}")
        for slot, rank, seq in zip(slots, priority_ranks, seqs, strict=True):
            self._track(slot, rank, seq)
        self._newest_seq = max(self._newest_seq, *seqs)
        self._used = max(self._used, 1 + max(slots))
        at, generation, rank_column, seq_column = self._upload(slots, generations, priority_ranks, seqs)
        self._generation[at] = generation
        self._priority_rank[at] = rank_column.int()
        self._seq[at] = seq_column
        self._lane[at] = NORMAL_LANE
        self._key[at] = torch.nan  # orders as the median until scored
        self._occupied[at] = True

    def set_priority_ranks(self, slots: Sequence[int], priority_ranks: Sequence[int]) -> None:
        """New ranks of live requests: a priority that nobody had yet came in between.

        Raises: ValueError: as `insert`; or if a slot is not live.
        """
        self._check(slots, priority_ranks=priority_ranks)
        if not slots:
            return
        if min(priority_ranks) < 0:
            raise ValueError(f"priority ranks must not be negative, got {min(priority_ranks)}")
        self._check_live(slots)
        for slot, rank in zip(slots, priority_ranks, strict=True):
            seq = self._untrack(slot)
            self._track(slot, rank, seq)
        at, rank_column = self._upload(slots, priority_ranks)
        self._priority_rank[at] = rank_column.int()

    def set_lane(self, slots: Sequence[int], lane: int) -> None:
        """Move live requests to PREEMPTED_LANE or NORMAL_LANE.

        Raises: ValueError: if the lane is neither, or a slot is not live.
        """
        if lane not in (PREEMPTED_LANE, NORMAL_LANE):
            raise ValueError(f"lane must be {PREEMPTED_LANE} (preempted) or {NORMAL_LANE}, got {lane}")
        self._check(slots)
        self._check_live(slots)
        if slots:
            self._lane[self._upload(slots)[0]] = lane

    def set_keys(self, slots: Sequence[int], generations: Sequence[int], keys: Tensor) -> None:
        """Keys of scored requests; those whose slot has changed hands since are dropped on the device.

        Args:
            slots, generations: as `acquire` gave them when scoring began.
            keys: (len(slots),) float32 on the table's device, smaller runs first; not finite = unscored.
        Raises: ValueError: if lengths, dtype or device do not match, or a slot is outside the table.
        """
        self._check(slots, generations=generations)
        if keys.shape != (len(slots),) or keys.dtype != torch.float32 or keys.device.type != self.device.type:
            raise ValueError(
                f"keys must be ({len(slots)},) torch.float32 on {self.device}, "
                f"got {tuple(keys.shape)} {keys.dtype} on {keys.device}"
            )
        if not slots:
            return
        at, generation = self._upload(slots, generations)
        self._key[torch.where(self._generation[at] == generation, at, self.capacity)] = keys

    def set_median_key(self, median_key: float) -> None:
        """The key of a request that has none: the running median."""
        self._median_key.fill_(median_key)

    def free(self, slots: Sequence[int]) -> None:
        """Live requests stop to wait (admitted, aborted). Their slots stay taken until `release`.

        Raises: ValueError: if a slot is not live. Nothing is changed then.
        """
        self._check(slots)
        self._check_live(slots)
        if not slots:
            return
        for slot in slots:
            self._untrack(slot)
        self._occupied[self._upload(slots)[0]] = False

    def order(self, k: int) -> Tensor | None:
        """The k requests that run first.

        Returns: (k,) int32 slot ids on the device, -1 where there are fewer requests; or None when live ranks
            or seqs are past what the packed key holds: then the host index orders.
        Raises: ValueError: if k is outside the kernel's range.
        """
        seq_base = min(self._live_blocks, default=self._newest_seq >> _SEQ_BLOCK_BITS) << _SEQ_BLOCK_BITS
        if self._unpackable_ranks or self._newest_seq - seq_base >= MAX_SEQ_SPAN:
            return None
        if seq_base != self._host_seq_base:
            self._seq_base.fill_(seq_base)
            self._host_seq_base = seq_base
        scanned = self._scanned()
        return queue_topk(
            self._priority_rank[:scanned],
            self._lane[:scanned],
            self._key[:scanned],
            self._seq[:scanned],
            self._occupied[:scanned],
            self._median_key,
            self._seq_base,
            k=k,
        )

    # -- helpers --

    def _scanned(self) -> int:
        """Slots the kernel looks at: the used part, in few distinct sizes (a graph or a compilation each)."""
        return min(self.capacity, max(1024, 1 << (self._used - 1).bit_length() if self._used else 1))

    def _track(self, slot: int, rank: int, seq: int) -> None:
        self._packed_fields[slot] = (rank, seq)
        self._live_blocks[seq >> _SEQ_BLOCK_BITS] += 1
        self._unpackable_ranks += rank >= MAX_RANKS

    def _untrack(self, slot: int) -> int:
        rank, seq = self._packed_fields.pop(slot)
        block = seq >> _SEQ_BLOCK_BITS
        self._live_blocks[block] -= 1
        if not self._live_blocks[block]:
            del self._live_blocks[block]
        self._unpackable_ranks -= rank >= MAX_RANKS
        return seq

    def _upload(self, *columns: Sequence[int]) -> Tensor:
        """One transfer for all columns, from pinned memory where that lets it run behind the host's back."""
        on_gpu = self.device.type == "cuda"
        host = torch.tensor([list(column) for column in columns], dtype=torch.int64, pin_memory=on_gpu)
        return host.to(self.device, non_blocking=True)

    def _check(self, slots: Sequence[int], **columns: Sequence[int]) -> None:
        for name, column in columns.items():
            if len(column) != len(slots):
                raise ValueError(f"{name} must have one entry a slot: {len(column)} for {len(slots)} slots")
        if slots and not (min(slots) >= 0 and max(slots) < self.capacity):
            raise ValueError(f"slots must be in [0, {self.capacity}), got {min(slots)} to {max(slots)}")

    def _check_live(self, slots: Sequence[int]) -> None:
        missing = [slot for slot in slots if slot not in self._packed_fields]
        if missing or len(set(slots)) < len(slots):
            raise ValueError(f"slots must be live and given once; not live: {missing}, given: {list(slots)}")
