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

Three steps. (1) Each program packs a tile of slots, sorts it (bitonic network) and keeps the tile's
K largest. (2) Programs merge FAN lists each, until one list of K is left; it holds no slot ids, and needs
none. (3) Each slot that is in the list finds its place there by binary search and writes its id: urgencies
are unique, so no two write the same place. Carrying a payload through the network would double its work.

Bytes moved for N slots: 21 N read (24 N with int32 flags), 8 N written and read again, about 16 N K / TILE
for lists: 11 MB at N = 2^18, K = 256, some 3 us of HBM on an H200, so the 2 to 5 launches count for as much.

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
FAN = 8  # lists a program merges: few enough to keep the chain short, many enough to keep launches few

# What the kernels see of the above. FREE is the complement of the largest int64, which is never packed: the
# largest finite float maps well below 2**32 - 1.
_FREE = tl.constexpr(-(1 << 63))
_LAST_RANK = tl.constexpr(MAX_RANKS - 1)
_LAST_SEQ = tl.constexpr(MAX_SEQ_SPAN - 1)
_SEQ_BITS = tl.constexpr(SEQ_BITS)
_KEY_AND_SEQ_BITS = tl.constexpr(32 + SEQ_BITS)


@triton.jit
def _urgency(rank, lane, key, median, seq_offset):
    """Pack one request into an int64, larger = more urgent."""
    # Bit tests and not float compares: they hold for denormals and whatever the fast-math mode is.
    bits = key.to(tl.int32, bitcast=True)
    median_bits = median.to(tl.int32, bitcast=True)
    median_bits = tl.where((median_bits & 0x7F800000) == 0x7F800000, 0, median_bits)  # nothing scored yet
    bits = tl.where((bits & 0x7F800000) == 0x7F800000, median_bits, bits)  # NaN, +inf, -inf
    bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)  # -0.0 is 0.0
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
def _queue_topk_tile_kernel(
    priority_rank_ptr,  # (N,) int32
    lane_ptr,  # (N,) int32
    key_ptr,  # (N,) fp32
    seq_ptr,  # (N,) int64
    occupied_ptr,  # (N,) int32 or bool
    median_key_ptr,  # (1,) fp32
    seq_base_ptr,  # (1,) int64
    urgency_ptr,  # (N,) int64, out
    list_ptr,  # (tiles * K,) int64, out: K largest urgencies of each tile, descending
    slot_ptr,  # (k,) int32, out: filled with -1 for step 3
    N,
    k,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    offs = tile * TILE + tl.arange(0, TILE)
    mask = offs < N
    occupied = tl.load(occupied_ptr + offs, mask=mask, other=0) != 0
    rank = tl.load(priority_rank_ptr + offs, mask=occupied, other=0)
    lane = tl.load(lane_ptr + offs, mask=occupied, other=0)
    key = tl.load(key_ptr + offs, mask=occupied, other=0.0)
    seq_offset = tl.load(seq_ptr + offs, mask=occupied, other=0) - tl.load(seq_base_ptr)
    urgency = _urgency(rank, lane, key, tl.load(median_key_ptr), seq_offset)
    urgency = tl.where(occupied, urgency, _FREE)
    tl.store(urgency_ptr + offs, urgency, mask=mask)

    place = tl.arange(0, TILE)
    size = 2
    while size <= TILE:
        urgency = _bitonic_merge(urgency, place, size)
        size = size * 2
    tl.store(list_ptr + tile * K + place, urgency, mask=place < K)
    if tile == 0:
        tl.store(slot_ptr + place, tl.full([TILE], -1, tl.int32), mask=place < k)


@triton.jit
def _queue_topk_merge_kernel(
    list_ptr,  # (num_lists, K) int64, each descending
    merged_ptr,  # (programs, K) int64, out
    num_lists,
    fan,
    K: tl.constexpr,
):
    program = tl.program_id(0)
    first = program * fan
    offs_k = tl.arange(0, K)
    best = tl.load(list_ptr + first * K + offs_k)
    for row in range(first + 1, tl.minimum(first + fan, num_lists)):
        # One list turned round against the other: the pairwise maxima are the K largest of both, and bitonic.
        other = tl.load(list_ptr + row * K + (K - 1 - offs_k))
        best = _bitonic_merge(tl.maximum(best, other), offs_k, K)
    tl.store(merged_ptr + program * K + offs_k, best)


@triton.jit
def _queue_topk_locate_kernel(
    urgency_ptr,  # (N,) int64
    top_ptr,  # (K,) int64, the K largest urgencies, descending
    slot_ptr,  # (k,) int32, out
    N,
    k,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    offs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    urgency = tl.load(urgency_ptr + offs, mask=offs < N, other=_FREE)
    kth = tl.load(top_ptr + (K - 1))
    inside = (urgency >= kth) & (urgency != _FREE)
    place = tl.zeros([TILE], dtype=tl.int32)  # how many are more urgent than this slot
    half = K // 2
    while half > 0:
        probe = tl.load(top_ptr + place + (half - 1), mask=inside, other=_FREE)
        place = tl.where(probe > urgency, place + half, place)
        half //= 2
    tl.store(slot_ptr + place, offs, mask=inside & (place < k))


def launch_config(k: int, num_slots: int) -> dict[str, int]:
    """K is k rounded up to what a sorting network needs. A tile of 1024 int64 in 4 warps is 8 a thread
    and 8 KB of shared memory: no spills, and 2^18 slots are 256 programs, two on each SM of an H200."""
    K = max(16, triton.next_power_of_2(k))
    return {"K": K, "TILE": max(K, min(MAX_TILE, triton.next_power_of_2(num_slots))), "num_warps": 4}


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
) -> Tensor:
    """The k occupied slots with the smallest (priority_rank, lane, key, seq), in that order, without
    synchronising.

    Args:
        priority_rank: (N,) int32 in [0, MAX_RANKS), dense rank of the priority, smaller first.
        lane: (N,) int32, 0 preempted, 1 normal.
        key: (N,) fp32, smaller first; NaN and +-inf stand for `median_key`.
        seq: (N,) int64, unique among occupied slots, in [seq_base, seq_base + MAX_SEQ_SPAN).
        occupied: (N,) bool or int32; a slot with 0 is free, whatever its other fields hold.
        median_key: (1,) fp32; itself NaN or +-inf it counts as 0.
        seq_base: (1,) int64, on the device so that a captured graph sees it move.
        k: how many, 1 to MAX_K; may be more than N.
    Returns: (k,) int32 slot ids, then -1 where fewer than k are occupied.
    Raises: ValueError: if a shape, dtype, layout, device or k is not as above. Values of ranks and seqs are
        not looked at (see the module docstring).
    """
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k must be 1 to {MAX_K}, got {k}")
    if key.dim() != 1 or len(key) == 0:
        raise ValueError(f"key must be (capacity,) with at least one slot, got {tuple(key.shape)}")
    num_slots = len(key)
    for name, tensor, shape, dtypes in (
        ("priority_rank", priority_rank, (num_slots,), (torch.int32,)),
        ("lane", lane, (num_slots,), (torch.int32,)),
        ("key", key, (num_slots,), (torch.float32,)),
        ("seq", seq, (num_slots,), (torch.int64,)),
        ("occupied", occupied, (num_slots,), (torch.bool, torch.int32)),
        ("median_key", median_key, (1,), (torch.float32,)),
        ("seq_base", seq_base, (1,), (torch.int64,)),
    ):
        if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {shape} {' or '.join(str(d) for d in dtypes)}, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != key.device:
            raise ValueError(f"{name} must lie on {key.device} like key, got {tensor.device}")

    config = launch_config(k, num_slots)
    K, tiles = config["K"], triton.cdiv(num_slots, config["TILE"])
    slot = torch.empty(k, dtype=torch.int32, device=key.device)
    urgency = torch.empty(num_slots, dtype=torch.int64, device=key.device)
    top = torch.empty((tiles, K), dtype=torch.int64, device=key.device)
    _queue_topk_tile_kernel[(tiles,)](
        priority_rank, lane, key, seq, occupied, median_key, seq_base, urgency, top, slot,
        num_slots, k, **config,
    )  # fmt: skip
    while len(top) > 1:
        merged = torch.empty((triton.cdiv(len(top), FAN), K), dtype=torch.int64, device=key.device)
        _queue_topk_merge_kernel[(len(merged),)](
            top, merged, len(top), FAN, K=K, num_warps=config["num_warps"]
        )
        top = merged
    _queue_topk_locate_kernel[(tiles,)](urgency, top, slot, num_slots, k, **config)
    return slot


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
