"""Queue top-k: the k waiting requests that run next, in order, from the slot table.

A request sorts by (priority_rank, lane, key, seq), smaller first. Both kernels and reference see a key that
is NaN or +-inf as `median_key` (being unscored is never an advantage) and -0.0 as 0.0. `seq` is unique, so
the order is a strict total one and has one right answer.

The four fields are packed, most significant first, into one int64:

    priority_rank: 8 bits | lane: 1 | key: 32, as an order-preserving integer | seq - seq_base: 23

and complemented: larger = more urgent, and the smallest int64 is a free slot. Limits: MAX_RANKS ranks, and
MAX_SEQ_SPAN between seq_base and the newest seq. All 32 bits of the key are kept, so the order is exact
within them. A field past its limit saturates: it cannot leak into another field, but requests may then tie
and be left out. Whoever fills the table knows ranks and seqs on the host and has to check them there
(`SlotTable` does).

Three steps. (1) Each program packs a tile of slots and keeps its K largest: bitonic sort of blocks of K, then
pairwise maxima of two blocks, which halve them, until one list is left. It finds the slots of that list by
binary search and stores them beside it; carrying them through the network would double its work. (2) Programs
merge `fan` lists each in the same way, until one is left. (3) Each tile looks up those of its list that are
in the merged one, and writes their slots at their places there.

Incremental: the workspace keeps every list. A tile's list is built anew only if a writer marked the tile
(`workspace.dirty`, by `slot_update` and `publish_score`), if `seq_base` has moved, or if the median has moved
and the tile holds a request without a key; a program of step 2 runs only if a list below it was built anew.
All this is decided on the device, so that one captured graph serves both forms, and the result is that of the
full form, always: lists are functions of their tile's slots, the median and seq_base, and nothing else.

Bytes moved for N slots in N / 1024 tiles, `changed` of them built anew (all in the full form):

    step 1: 21 a slot of a changed tile (24 with int32 flags; 1 if it is free), 12 K a list, 24 a tile to see
            whether it has changed
    step 2: 8 K a list under a program that runs, and 8 K a program
    step 3: 8 * 32 a tile and 4 more a hit: lists are in order, and reading stops at the first miss

`TopkWorkspace.bytes_moved` counts them. Launches: 2 and the levels of step 2; the incremental form makes as
many, and its programs end at once where nothing has changed.

    slots    K     launches  full      16 tiles changed
    2^14     256   3          0.4 MB   0.4 MB: all
    2^18     256   4          6.9 MB    1.0 MB
    2^20     256   4         27.7 MB    1.8 MB
    2^22     256   5          111 MB    2.9 MB
    2^18     1024  5         11.4 MB    2.1 MB
    2^20     1024  6         45.7 MB    3.4 MB
    2^22     1024  6          183 MB    4.7 MB

27.7 MB take 7 us of an H200's HBM. The cost of step 1 is the network in shared memory: 42 exchanges of 16
bytes a slot at K = 256, so 0.7 GB at 2^20 slots, some 25 us on 132 SMs at 128 bytes a clock.

Not measured: whether radix select is faster. It needs no network: passes over 8 or more digits of the packed
key, each reading 8 N bytes (or 21 N, packing again) and counting digits by atomics, end at the k-th key; then
come a compaction by atomics, whose order is not fixed, and a sort of the k. A first pass of 11 digits and a
second over the survivors read about 29 N + 8 N + 8 N bytes, 47 MB at 2^20, 12 us of HBM in 4 to 6 launches:
up to 2 times faster in the full form for large N and k up to 1024, where step 1 here does not use that k is
small. But keys of one priority and lane share their first 9 bits and most of their exponent, so the first
digits split little and an adversary's ties make each pass read all. And it keeps nothing: the incremental
form, which is what a step of the scheduler meets, reads 21 KB a changed tile here and all N there. Nor
measured: all levels in one launch, the last program of a group going on to the next level.

Source: bitonic top-k: Shanbhag, Pirk, Madden 2018, "Efficient Top-K Query Processing on Massively Parallel
Hardware".
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# A kernel's arguments have Triton's types, not Python's; the comments beside them say which.

import torch
import triton
import triton.language as tl
from torch import Tensor

RANK_BITS = 8
SEQ_BITS = 23
MAX_RANKS = 1 << RANK_BITS
MAX_SEQ_SPAN = 1 << SEQ_BITS
MAX_K = 1024
MAX_TILE = 1024
MERGE_ELEMENTS = 8192  # that a program of step 2 reads; it exchanges half of them, in 32 KB of shared memory
MAX_FAN = 32
LOCATE_BLOCK = 32  # of a list, read at a time; the mean tile has fewer hits once tiles are many
TILE_WARPS, MERGE_WARPS = 8, 8

# What the kernels see of the above. FREE is the complement of the largest int64, which is never packed: the
# largest finite float maps well below 2**32 - 1.
_FREE = tl.constexpr(-(1 << 63))
_LAST_RANK = tl.constexpr(MAX_RANKS - 1)
_LAST_SEQ = tl.constexpr(MAX_SEQ_SPAN - 1)
_SEQ_BITS = tl.constexpr(SEQ_BITS)
_KEY_AND_SEQ_BITS = tl.constexpr(32 + SEQ_BITS)
_NO_MEDIAN = tl.constexpr(1 << 32)  # no int32: the tile was keyed without the median


@triton.jit
def _is_finite(bits):
    """Bit tests and not float compares: they hold for denormals and whatever the fast-math mode is."""
    return (bits & 0x7F800000) != 0x7F800000


@triton.jit
def _urgency(rank, lane, key_bits, seq_offset):
    """Pack one request into an int64, larger = more urgent; the key is finite."""
    bits = tl.where((key_bits & 0x7FFFFFFF) == 0, 0, key_bits)  # -0.0 is 0.0
    # IEEE floats order as sign and magnitude; turn negative ones over to order as two's complement.
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + (1 << 31)

    rank = tl.minimum(tl.maximum(rank, 0), _LAST_RANK)
    lane = tl.minimum(tl.maximum(lane, 0), 1)
    seq_offset = tl.minimum(tl.maximum(seq_offset, 0), _LAST_SEQ)
    group = (rank * 2 + lane).to(tl.int64) - (_LAST_RANK + 1)  # centred: the top bit of an int64 is its sign
    return ~((group << _KEY_AND_SEQ_BITS) + (ordered << _SEQ_BITS) + seq_offset)


@triton.jit
def _exchange(x, offs, distance, size):
    """One column of a bitonic network: pairs `distance` apart, larger first in even blocks of `size`."""
    other = tl.gather(x, offs ^ distance, axis=0)
    larger_here = ((offs & size) == 0) == ((offs & distance) == 0)
    return tl.where(larger_here, tl.maximum(x, other), tl.minimum(x, other))


@triton.jit
def _bitonic_merge(x, offs, size):
    """Sort each bitonic block of `size`, larger first in even blocks. A loop: `tl.topk` unrolls the network,
    which took 6 s to compile where this takes 1; which of them runs faster on a GPU is not measured."""
    distance = size // 2
    while distance > 0:
        x = _exchange(x, offs, distance, size)
        distance = distance // 2
    return x


@triton.jit
def _halve(x, BLOCKS: tl.constexpr, K: tl.constexpr):
    """From 2 * BLOCKS lists of K, even ones descending, odd ones ascending, to BLOCKS such lists.

    Two neighbours make a bitonic sequence: their pairwise maxima are the K largest of both, and bitonic.
    """
    x = tl.reshape(tl.max(tl.reshape(x, [BLOCKS, 2, K]), axis=1), [BLOCKS * K])
    return _bitonic_merge(x, tl.arange(0, BLOCKS * K), K)


@triton.jit
def _largest(x, HALVINGS: tl.constexpr, K: tl.constexpr):
    """The K largest, descending, of 2**HALVINGS lists of K, even ones descending, odd ones ascending."""
    for halving in tl.static_range(HALVINGS):
        x = _halve(x, 1 << (HALVINGS - 1 - halving), K)
    return x


@triton.jit
def _queue_topk_tile_kernel(
    priority_rank_ptr,  # (N,) int32
    lane_ptr,  # (N,) int32
    key_ptr,  # (N,) fp32
    seq_ptr,  # (N,) int64
    occupied_ptr,  # (N,) int32 or bool
    median_key_ptr,  # (1,) fp32
    seq_base_ptr,  # (1,) int64
    dirty_ptr,  # (tiles,) int32: not 0 if a slot has changed; cleared
    keyed_with_ptr,  # (tiles, 2) int64: seq_base and bits of the median that the list was built with
    rebuilt_ptr,  # (tiles,) int32, out: 1 if the list was built anew
    list_ptr,  # (tiles, K) int64: K largest urgencies of each tile, descending
    list_slot_ptr,  # (tiles, K) int32: their slots
    slot_ptr,  # (k,) int32, out: filled with -1 for step 3
    N,
    k,
    K: tl.constexpr,
    HALVINGS: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    place = tl.arange(0, TILE)
    if tile == 0:
        tl.store(slot_ptr + place, tl.full([TILE], -1, tl.int32), mask=place < k)
    seq_base = tl.load(seq_base_ptr)
    median_bits = tl.load(median_key_ptr).to(tl.int32, bitcast=True)
    median_bits = tl.where(_is_finite(median_bits), median_bits, 0)  # nothing scored yet
    built_median = tl.load(keyed_with_ptr + 2 * tile + 1)
    stale = tl.load(dirty_ptr + tile) != 0
    stale |= tl.load(keyed_with_ptr + 2 * tile) != seq_base
    stale |= (built_median != _NO_MEDIAN) & (built_median != median_bits.to(tl.int64))
    tl.store(rebuilt_ptr + tile, stale.to(tl.int32))
    if stale:
        offs = tile * TILE + place
        occupied = tl.load(occupied_ptr + offs, mask=offs < N, other=0) != 0
        rank = tl.load(priority_rank_ptr + offs, mask=occupied, other=0)
        lane = tl.load(lane_ptr + offs, mask=occupied, other=0)
        key_bits = tl.load(key_ptr + offs, mask=occupied, other=0.0).to(tl.int32, bitcast=True)
        seq_offset = tl.load(seq_ptr + offs, mask=occupied, other=0) - seq_base
        unscored = occupied & ~_is_finite(key_bits)
        key_bits = tl.where(unscored, median_bits, key_bits)
        median_used = tl.max(unscored.to(tl.int32), axis=0) != 0
        urgency = tl.where(occupied, _urgency(rank, lane, key_bits, seq_offset), _FREE)

        best = urgency
        size = 2
        while size <= K:
            best = _bitonic_merge(best, place, size)
            size = size * 2
        best = _largest(best, HALVINGS, K)

        before = tl.zeros([TILE], dtype=tl.int32)  # how many of the list are more urgent than this slot
        half = K // 2
        while half > 0:
            probe = tl.gather(best, before + (half - 1), axis=0)
            before = tl.where(probe > urgency, before + half, before)
            half //= 2
        inside = (urgency != _FREE) & (urgency >= tl.min(best, axis=0))
        offs_k = tl.arange(0, K)
        tl.store(list_ptr + tile * K + offs_k, best)
        # First nobody everywhere: where fields past their limits make a tie, a place stays empty.
        tl.store(list_slot_ptr + tile * K + offs_k, tl.full([K], -1, tl.int32))
        tl.debug_barrier()
        tl.store(list_slot_ptr + tile * K + before, tile * TILE + place, mask=inside)
        # All threads are past their reading of these: the barriers of the network lie between.
        tl.store(keyed_with_ptr + 2 * tile, seq_base)
        tl.store(keyed_with_ptr + 2 * tile + 1, tl.where(median_used, median_bits.to(tl.int64), _NO_MEDIAN))
        tl.store(dirty_ptr + tile, 0)


@triton.jit
def _queue_topk_merge_kernel(
    list_ptr,  # (num_lists, K) int64, each descending
    rebuilt_ptr,  # (num_lists,) int32
    merged_ptr,  # (programs, K) int64
    merged_rebuilt_ptr,  # (programs,) int32, out
    num_lists,
    K: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    program = tl.program_id(0)
    FAN: tl.constexpr = 1 << HALVINGS
    first = program * FAN
    lists = first + tl.arange(0, FAN)
    rebuilt = tl.max(tl.load(rebuilt_ptr + lists, mask=lists < num_lists, other=0), axis=0)
    tl.store(merged_rebuilt_ptr + program, rebuilt)
    if rebuilt != 0:
        offs = tl.arange(0, FAN * K)
        row, column = offs // K, offs % K
        column = tl.where(row % 2 == 0, column, K - 1 - column)  # odd lists turned round, as `_largest` wants
        row += first
        best = tl.load(list_ptr + row * K + column, mask=row < num_lists, other=_FREE)
        tl.store(merged_ptr + program * K + tl.arange(0, K), _largest(best, HALVINGS, K))


@triton.jit
def _queue_topk_locate_kernel(
    list_ptr,  # (tiles, K) int64, each descending
    list_slot_ptr,  # (tiles, K) int32
    top_ptr,  # (K,) int64, the K largest urgencies, descending
    slot_ptr,  # (k,) int32, out
    k,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    kth = tl.load(top_ptr + (K - 1))
    first = 0
    while first < K:
        offs = tile * K + first + tl.arange(0, BLOCK)
        urgency = tl.load(list_ptr + offs)
        inside = (urgency >= kth) & (urgency != _FREE)
        place = tl.zeros([BLOCK], dtype=tl.int32)  # how many are more urgent than this one
        half = K // 2
        while half > 0:
            probe = tl.load(top_ptr + place + (half - 1), mask=inside, other=_FREE)
            place = tl.where(probe > urgency, place + half, place)
            half //= 2
        slot = tl.load(list_slot_ptr + offs, mask=inside, other=-1)
        tl.store(slot_ptr + place, slot, mask=inside & (slot >= 0) & (place < k))
        all_inside = tl.min(inside.to(tl.int32), axis=0) != 0
        first = tl.where(all_inside, first + BLOCK, K)


def launch_config(k: int, num_slots: int) -> dict[str, int]:
    """Tile and list sizes. K is k rounded up to what a sorting network needs. A tile of 1024 int64 in 4 warps
    is 8 a thread and 8 KB of shared memory: no spills, and 2^18 slots are 256 programs, two on each SM of
    an H200."""
    K = max(16, triton.next_power_of_2(k))
    return {"K": K, "TILE": max(K, min(MAX_TILE, triton.next_power_of_2(num_slots)))}


def merge_fan(K: int, num_lists: int) -> int:
    """Lists that a program of step 2 merges: many, to make few launches, within its shared memory."""
    return min(MAX_FAN, MERGE_ELEMENTS // K, triton.next_power_of_2(num_lists))


class TopkWorkspace:
    """What `queue_topk` keeps between calls on one table, and all its scratch, at fixed addresses.

    Attributes:
        dirty: (tiles,) int32; whoever changes a slot sets the flag of its tile, slot // tile_size, not to 0.
            Set at first: the first call builds every list.
        tile_size: slots a tile.
    """

    def __init__(self, num_slots: int, k: int, device: torch.device | str) -> None:
        """For `num_slots` slots and orders of at most k; (12 + 8 / (fan - 1)) * K bytes a tile.

        Raises: ValueError: if there is no slot, or k is not 1 to MAX_K.
        """
        if not 1 <= k <= MAX_K:
            raise ValueError(f"k must be 1 to {MAX_K}, got {k}")
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        config = launch_config(k, num_slots)
        self.num_slots, self.K, self.tile_size = num_slots, config["K"], config["TILE"]
        tiles = triton.cdiv(num_slots, self.tile_size)
        sizes, self.fans = [tiles], list[int]()
        while sizes[-1] > 1:
            self.fans.append(merge_fan(self.K, sizes[-1]))
            sizes.append(triton.cdiv(sizes[-1], self.fans[-1]))
        self.dirty = torch.ones(tiles, dtype=torch.int32, device=device)
        self.keyed_with = torch.zeros((tiles, 2), dtype=torch.int64, device=device)
        self.list_slot = torch.empty((tiles, self.K), dtype=torch.int32, device=device)
        # One pair a level: the tiles' own lists first, the one list of all last.
        self.lists = [torch.empty((n, self.K), dtype=torch.int64, device=device) for n in sizes]
        self.rebuilt = [torch.empty(n, dtype=torch.int32, device=device) for n in sizes]
        self.slot = torch.empty(self.K, dtype=torch.int32, device=device)

    @property
    def num_launches(self) -> int:
        """Kernels that one order takes."""
        return 1 + len(self.lists)

    def bytes_moved(self, changed_tiles: int, hits_per_tile: int = 0) -> int:
        """Global memory read and written by one order that builds `changed_tiles` lists anew, all their slots
        taken; `hits_per_tile` as the fullest tile has them."""
        tiles = len(self.dirty)
        moved = changed_tiles * (21 * self.tile_size + 12 * self.K) + 24 * tiles
        for lists, merged, fan in zip(self.lists, self.lists[1:], self.fans, strict=False):
            changed_tiles = min(changed_tiles, len(merged))  # programs that run
            moved += 8 * self.K * (min(changed_tiles * fan, len(lists)) + changed_tiles)
        read = min(self.K, 32 * (1 + hits_per_tile // 32))
        return moved + tiles * 8 * read + 8 * self.K


def check_column(
    name: str, tensor: Tensor, length: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """What the slot table's launchers want of a column.

    Raises: ValueError: if it is not contiguous (length,) of one of the dtypes on the device.
    """
    if tensor.shape != (length,) or tensor.dtype not in dtypes or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous ({length},) {' or '.join(str(d) for d in dtypes)}, "
            f"got {tuple(tensor.shape)} {tensor.dtype}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} must lie on {device} like key, got {tensor.device}")


def queue_topk(
    priority_rank: Tensor,
    lane: Tensor,
    key: Tensor,
    seq: Tensor,
    occupied: Tensor,
    median_key: Tensor,
    seq_base: Tensor,
    *,
    k: int,
    workspace: TopkWorkspace | None = None,
) -> Tensor:
    """The k occupied slots with the smallest (priority_rank, lane, key, seq), in that order, without
    synchronising; with a workspace also without allocating.

    Args:
        priority_rank: (N,) int32 in [0, MAX_RANKS), dense rank of the priority, smaller first.
        lane: (N,) int32, 0 preempted, 1 normal.
        key: (N,) fp32, smaller first; NaN and +-inf stand for `median_key`.
        seq: (N,) int64, unique among occupied slots, in [seq_base, seq_base + MAX_SEQ_SPAN).
        occupied: (N,) bool or int32; a slot with 0 is free, whatever its other fields hold.
        median_key: (1,) fp32; itself NaN or +-inf it counts as 0.
        seq_base: (1,) int64, on the device so that a captured graph sees it move.
        k: how many, 1 to MAX_K; may be more than N.
        workspace: this table's, for the incremental form; None takes a new one, for the full form.
    Returns: (k,) int32 slot ids, then -1 where fewer than k are occupied; in the workspace's memory, so the
        next call overwrites them.
    Raises: ValueError: if a shape, dtype, layout, device or k is not as above, or the workspace is for
        another table or a smaller k. Values of ranks and seqs are not looked at (see the module docstring).
    """
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k must be 1 to {MAX_K}, got {k}")
    if key.dim() != 1 or len(key) == 0:
        raise ValueError(f"key must be (capacity,) with at least one slot, got {tuple(key.shape)}")
    num_slots = len(key)
    for name, tensor, length, dtypes in (
        ("priority_rank", priority_rank, num_slots, (torch.int32,)),
        ("lane", lane, num_slots, (torch.int32,)),
        ("key", key, num_slots, (torch.float32,)),
        ("seq", seq, num_slots, (torch.int64,)),
        ("occupied", occupied, num_slots, (torch.bool, torch.int32)),
        ("median_key", median_key, 1, (torch.float32,)),
        ("seq_base", seq_base, 1, (torch.int64,)),
    ):
        check_column(name, tensor, length, dtypes, key.device)
    workspace = workspace or TopkWorkspace(num_slots, k, key.device)
    if workspace.num_slots != num_slots or k > workspace.K or workspace.slot.device != key.device:
        raise ValueError(
            f"the workspace is for {workspace.num_slots} slots and k up to {workspace.K} on "
            f"{workspace.slot.device}, not for {num_slots} slots and k = {k} on {key.device}"
        )

    K, tile_size = workspace.K, workspace.tile_size
    lists, rebuilt, slot = workspace.lists, workspace.rebuilt, workspace.slot[:k]
    _queue_topk_tile_kernel[(len(workspace.dirty),)](
        priority_rank, lane, key, seq, occupied, median_key, seq_base, workspace.dirty, workspace.keyed_with,
        rebuilt[0], lists[0], workspace.list_slot, slot, num_slots, k,
        K=K, HALVINGS=log2(tile_size // K), TILE=tile_size, num_warps=TILE_WARPS,
    )  # fmt: skip
    for level, fan in enumerate(workspace.fans):
        _queue_topk_merge_kernel[(len(lists[level + 1]),)](
            lists[level], rebuilt[level], lists[level + 1], rebuilt[level + 1], len(lists[level]),
            K=K, HALVINGS=log2(fan), num_warps=MERGE_WARPS,
        )  # fmt: skip
    _queue_topk_locate_kernel[(len(workspace.dirty),)](
        lists[0], workspace.list_slot, lists[-1], slot, k, K=K, BLOCK=min(K, LOCATE_BLOCK), num_warps=1
    )
    return slot


def log2(power_of_two: int) -> int:
    return power_of_two.bit_length() - 1


def queue_topk_reference(
    priority_rank: Tensor,
    lane: Tensor,
    key: Tensor,
    seq: Tensor,
    occupied: Tensor,
    median_key: Tensor,
    seq_base: Tensor,
    *,
    k: int,
) -> Tensor:
    """The same by stable sorts, least significant field first; needs no `seq_base` and knows no limits."""
    median = torch.where(median_key.isfinite(), median_key, 0.0)
    key = torch.where(key.isfinite(), key, median) + 0.0  # -0.0 + 0.0 = 0.0
    order = occupied.nonzero()[:, 0]
    for field in (seq, key, lane, priority_rank):
        order = order[field[order].argsort(stable=True)]
    slot = torch.full((k,), -1, dtype=torch.int32, device=key.device)
    slot[: len(order)] = order[:k].int()
    return slot
