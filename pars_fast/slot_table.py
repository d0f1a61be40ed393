"""The waiting queue on the device: one slot a request, ordered by `queue_topk`, no tensor read by the host.

Structure of arrays, preallocated, addresses fixed for life (captured graphs hold them); nothing is allocated
after construction. A slot carries a generation, raised each time it is taken, so that a score which comes
back after its request has left and the slot has a new owner is recognised and dropped, on the device, without
a synchronisation.

Two sides, which may live in two threads as long as the device side sees events in the order they happened:
the owner of the queue calls `acquire` and `release` (host only, no tensor); whoever owns the stream calls the
rest. Changes are kept on the host, the last state of each slot, until `upload` or `order` sends them in one
transfer and writes them in one launch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pars_fast.calibration import TokenMap
from pars_fast.kernels.publish_score import ScoreDestination, map_knots, publish_score
from pars_fast.kernels.queue_topk import MAX_K, MAX_RANKS, MAX_SEQ_SPAN, TopkWorkspace, queue_topk
from pars_fast.kernels.slot_update import FREE, WORDS, slot_update

DEFAULT_CAPACITY = 1 << 18
MAX_BATCH = 64  # scores published at a time
K_ORDER = 1024  # requests whose order is sent to the host: 4 times what a step of 256 seats can admit
MAX_COMMANDS = 1024  # slots changed by one transfer, of 35 KB then
PREEMPTED_LANE, NORMAL_LANE = 0, 1

# seq_base moves in steps of this many seqs, so the host counts a handful of blocks instead of sorting seqs.
_SEQ_BLOCK_BITS = 16


class SlotTable:
    """Slots for `capacity` waiting requests on `device`; 29 bytes a slot, and those of `TopkWorkspace`.

    Args:
        token_map: from scores to expected tokens, of which keys are made.
        max_order: largest k that `order` will be asked for.
    On CPU tensors the kernels need Triton's interpreter, which is for tests.

    Attributes:
        destination: where the scores of the last `upload`'s requests go; a kernel that makes scores can write
            them there itself. `destination.tokens` then has their expected tokens. Addresses are fixed.

    Raises: ValueError: if `capacity` is not positive or `max_order` is outside the kernel's range.
    """

    def __init__(
        self,
        token_map: TokenMap,
        capacity: int = DEFAULT_CAPACITY,
        device: torch.device | str = "cuda",
        *,
        max_order: int = MAX_K,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.device = torch.device(device)

        def column(dtype: torch.dtype, rows: int = capacity) -> Tensor:
            return torch.zeros(rows, dtype=dtype, device=self.device)

        self._table = {
            "priority_rank": column(torch.int32),
            "lane": column(torch.int32),
            "key": column(torch.float32),
            "seq": column(torch.int64),
            "occupied": column(torch.bool),
            "median_key": column(torch.float32, 1),
            "seq_base": column(torch.int64, 1),
        }
        self._generation = column(torch.int64)
        self._workspace = TopkWorkspace(capacity, max_order, self.device)
        self._uploads = _Uploads(1 + MAX_BATCH + MAX_COMMANDS, self.device)
        self._header, destinations, self._commands = self._uploads.words.split([1, MAX_BATCH, MAX_COMMANDS])
        destinations[:, 0] = -1  # until the first upload scores go nowhere
        map_scores, map_tokens = map_knots(token_map, self.device)
        self.destination = ScoreDestination(
            slot=destinations[:, 0],
            generation=destinations[:, 1],
            prompt_work=destinations.view(torch.float64)[:, 2],
            key=self._table["key"],
            slot_generation=self._generation,
            dirty=self._workspace.dirty,
            tile_size=self._workspace.tile_size,
            map_scores=map_scores,
            map_tokens=map_tokens,
            tokens=column(torch.float32, MAX_BATCH),
        )

        # Owner's side. Lowest slots first and last freed first reused: the used part stays short and warm.
        self._free = list(range(capacity - 1, -1, -1))
        self._taken = bytearray(capacity)
        self._next_generation = [1] * capacity

        # Stream's side: what the device holds or is about to, and whether it fits the packed key.
        self._live: dict[int, _Request] = {}  # slot -> its request
        self._pending: dict[int, tuple[int, int, int]] = {}  # slot -> generation, group, seq
        self._live_blocks: Counter[int] = Counter()  # seq block -> live requests
        self._unpackable_ranks = 0
        self._newest_seq = 0
        self._median_bits = 0
        self._seq_base = 0
        self._sent = (0, 0)  # seq_base and bits of the median that the device has

    def __len__(self) -> int:
        """Requests inserted and not freed."""
        return len(self._live)

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
        """Give a slot back. Its `free` must be called before the `insert` of whoever takes it next.

        Raises: ValueError: if the slot is not taken.
        """
        if not (0 <= slot < self.capacity and self._taken[slot]):
            raise ValueError(f"slot {slot} is not taken: it was never acquired, or was released before")
        self._taken[slot] = 0
        self._free.append(slot)

    # -- stream's side: changes, host only --

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
        live = [slot for slot in slots if slot in self._live]
        if live or len(set(slots)) < len(slots):
            raise ValueError(f"each slot takes one request; live already: {live}, inserted: {list(slots)}")
        for slot, *fields in zip(slots, generations, priority_ranks, seqs, strict=True):
            self._put(slot, _Request(*fields))
        self._newest_seq = max(self._newest_seq, *seqs)

    def set_priority_ranks(self, slots: Sequence[int], priority_ranks: Sequence[int]) -> None:
        """New ranks of live requests: a priority that nobody had yet came in between.

        Raises: ValueError: as `insert`; or if a slot is not live.
        """
        self._check(slots, priority_ranks=priority_ranks)
        if slots and min(priority_ranks) < 0:
            raise ValueError(f"priority ranks must not be negative, got {min(priority_ranks)}")
        self._check_live(slots)
        for slot, rank in zip(slots, priority_ranks, strict=True):
            self._put(slot, replace(self._take(slot), priority_rank=rank))

    def set_lane(self, slots: Sequence[int], lane: int) -> None:
        """Move live requests to PREEMPTED_LANE or NORMAL_LANE.

        Raises: ValueError: if the lane is neither, or a slot is not live.
        """
        if lane not in (PREEMPTED_LANE, NORMAL_LANE):
            raise ValueError(f"lane must be {PREEMPTED_LANE} (preempted) or {NORMAL_LANE}, got {lane}")
        self._check(slots)
        self._check_live(slots)
        for slot in slots:
            self._put(slot, replace(self._take(slot), lane=lane))

    def free(self, slots: Sequence[int]) -> None:
        """Live requests stop to wait (admitted, aborted). Their slots stay taken until `release`.

        Raises: ValueError: if a slot is not live. Nothing is changed then.
        """
        self._check(slots)
        self._check_live(slots)
        for slot in slots:
            self._pending[slot] = (self._take(slot).generation, FREE, 0)

    def set_median_key(self, median_key: float) -> None:
        """The key of a request that has none: the running median."""
        self._median_bits = int(np.float32(median_key).view(np.int32))

    # -- stream's side: the device --

    def upload(self, scoring: Sequence[tuple[int, int]] = (), prompt_work: Sequence[float] = ()) -> None:
        """Bring all changes to the device, and tell it where the next scores go.

        One transfer and one launch, or more for more than MAX_COMMANDS slots. Waits only if the transfer
        before the last has not ended.

        Args:
            scoring: slot and generation of each request that is going to be scored, in the batch's order, as
                `acquire` gave them; slot -1 for one that has none.
            prompt_work: of each of them, in output tokens, for a key that weighs it; none: all 0.
        Raises: ValueError: if there are more than MAX_BATCH, a slot is outside the table, or not every one of
            them has its work.
        """
        if len(scoring) > MAX_BATCH:
            raise ValueError(f"at most {MAX_BATCH} requests are scored at a time, got {len(scoring)}")
        if prompt_work and len(prompt_work) != len(scoring):
            raise ValueError(
                f"prompt_work must have one entry a request: {len(prompt_work)} for {len(scoring)}"
            )
        self._check([slot for slot, _ in scoring if slot != -1])
        self._seq_base = self._fitting_seq_base()
        commands = [(slot, *state) for slot, state in self._pending.items()]
        for first in range(0, max(1, len(commands)), MAX_COMMANDS):
            part = commands[first : first + MAX_COMMANDS]
            words = self._uploads.next_words()
            words[0] = len(part), self._seq_base, self._median_bits, 0
            words[1 : 1 + MAX_BATCH, 0] = -1
            if scoring:
                words[1 : 1 + len(scoring), :2] = scoring
                words.view(np.float64)[1 : 1 + len(scoring), 2] = prompt_work or 0.0
            if part:
                words[1 + MAX_BATCH : 1 + MAX_BATCH + len(part)] = part
            self._uploads.send(1 + MAX_BATCH + len(part))
            slot_update(
                self._header[0],
                self._commands,
                **self._table,
                generation=self._generation,
                dirty=self._workspace.dirty,
                tile_size=self._workspace.tile_size,
            )
        self._pending.clear()
        self._sent = (self._seq_base, self._median_bits)

    def publish(self, scores: Tensor) -> Tensor:
        """Keys of requests that were scored elsewhere; those whose slot has changed hands since are dropped
        on the device.

        Args: scores: (B,) float32 on the device, in the order of the last `upload`'s requests.
        Returns: (B,) float32 expected tokens on the device, NaN for a score that is not finite; overwritten
            by the next call.
        Raises: ValueError: if shape, dtype or device are not as above.
        """
        return publish_score(scores, self.destination)

    def order(self, k: int) -> Tensor | None:
        """The k requests that run first, all changes counted.

        Returns: (k,) int32 slot ids on the device, -1 where there are fewer requests, overwritten by the next
            call; or None when live ranks or seqs are past what the packed key holds: then the host index
            orders.
        Raises: ValueError: if k is not 1 to `max_order`.
        """
        seq_base = self._fitting_seq_base()
        if self._unpackable_ranks or self._newest_seq - seq_base >= MAX_SEQ_SPAN:
            return None
        if self._pending or self._sent != (seq_base, self._median_bits):
            self.upload()
        return queue_topk(**self._table, k=k, workspace=self._workspace)

    # -- helpers --

    def _fitting_seq_base(self) -> int:
        """The present one as long as it serves, since a new one re-keys every request."""
        oldest = min(self._live_blocks, default=self._newest_seq >> _SEQ_BLOCK_BITS) << _SEQ_BLOCK_BITS
        serves = self._seq_base <= oldest and self._newest_seq - self._seq_base < MAX_SEQ_SPAN
        return self._seq_base if serves else oldest

    def _put(self, slot: int, request: "_Request") -> None:
        self._live[slot] = request
        self._live_blocks[request.seq >> _SEQ_BLOCK_BITS] += 1
        self._unpackable_ranks += request.priority_rank >= MAX_RANKS
        self._pending[slot] = (request.generation, 2 * request.priority_rank + request.lane, request.seq)

    def _take(self, slot: int) -> "_Request":
        request = self._live.pop(slot)
        block = request.seq >> _SEQ_BLOCK_BITS
        self._live_blocks[block] -= 1
        if not self._live_blocks[block]:
            del self._live_blocks[block]
        self._unpackable_ranks -= request.priority_rank >= MAX_RANKS
        return request

    def _check(self, slots: Sequence[int], **columns: Sequence[int]) -> None:
        for name, column in columns.items():
            if len(column) != len(slots):
                raise ValueError(f"{name} must have one entry a slot: {len(column)} for {len(slots)} slots")
        if slots and not (min(slots) >= 0 and max(slots) < self.capacity):
            raise ValueError(f"slots must be in [0, {self.capacity}), got {min(slots)} to {max(slots)}")

    def _check_live(self, slots: Sequence[int]) -> None:
        missing = [slot for slot in slots if slot not in self._live]
        if missing or len(set(slots)) < len(slots):
            raise ValueError(f"slots must be live and given once; not live: {missing}, given: {list(slots)}")


@dataclass(frozen=True, slots=True)
class _Request:
    generation: int
    priority_rank: int
    seq: int
    lane: int = NORMAL_LANE


class _Uploads:
    """(rows, 4) int64 on the device, filled from two host buffers in turn: pinned, so that a transfer runs
    behind the host's back while the next one is written."""

    def __init__(self, rows: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.words = torch.zeros((rows, WORDS), dtype=torch.int64, device=device)
        self._hosts = [torch.zeros((rows, WORDS), dtype=torch.int64, pin_memory=on_gpu) for _ in range(2)]
        self._arrays = [host.numpy() for host in self._hosts]
        self._sent = [torch.cuda.Event() for _ in range(2)] if on_gpu else None
        self._turn = 0

    def next_words(self) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """The buffer to fill, once its last transfer has ended."""
        self._turn ^= 1
        if self._sent is not None:
            self._sent[self._turn].synchronize()
        return self._arrays[self._turn]

    def send(self, rows: int) -> None:
        """Transfer the first rows of the buffer that `next_words` gave, on the current stream."""
        self.words[:rows].copy_(self._hosts[self._turn][:rows], non_blocking=True)
        if self._sent is not None:
            self._sent[self._turn].record()
