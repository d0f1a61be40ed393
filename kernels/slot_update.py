"""Slot upkeep: all that the host knows of changed slots, written in one launch from one transfer.

A command is the whole state of one slot, a row of 4 int64: slot, generation, group, seq. The group is
2 * priority_rank + lane of a waiting request, or FREE. Applied to a slot whose generation g is known:

    generation < g   stale, ignored: a late free cannot throw out the slot's next owner
    generation = g   the same request: its rank, lane or occupation has changed, its key stays
    generation > g   a new owner: all of it is written, and its key is NaN, unscored

so commands for different slots are independent, and one launch applies them all, in any order, as long as a
slot appears once. The host sees to that: of several changes of a slot only the last state counts. A score in
flight carries the generation it was started for, and `publish_score` drops it if the slot has another by
then.

A header of 4 int64 comes in the same transfer: number of commands, seq_base, the bits of the fp32 median key,
and a spare word. The number lies on the device so that a captured graph of fixed capacity serves any number.

Bytes moved for C commands: 32 C + 32 read, then a sector of 32 bytes for each of 8 columns a command, since
slots lie anywhere: 288 C in all; a few us of latency, not of bandwidth. One launch.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# A kernel's arguments have Triton's types, not Python's; the comments beside them say which.

import torch
import triton
import triton.language as tl
from torch import Tensor

from pars_fast.kernels.queue_topk import check_column

FREE = -1
WORDS = 4  # of a command, and of the header
BLOCK = 128


@triton.jit
def _slot_update_kernel(
    header_ptr,  # (4,) int64: number of commands, seq_base, bits of the median key, spare
    command_ptr,  # (C, 4) int64: slot, generation, group, seq
    priority_rank_ptr,  # (N,) int32
    lane_ptr,  # (N,) int32
    key_ptr,  # (N,) fp32
    seq_ptr,  # (N,) int64
    occupied_ptr,  # (N,) bool
    generation_ptr,  # (N,) int64
    median_key_ptr,  # (1,) fp32
    seq_base_ptr,  # (1,) int64
    dirty_ptr,  # (tiles,) int32
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.program_id(0) == 0:
        tl.store(seq_base_ptr, tl.load(header_ptr + 1))
        tl.store(median_key_ptr, tl.load(header_ptr + 2).to(tl.int32).to(tl.float32, bitcast=True))
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given = offs < tl.load(header_ptr)
    command = command_ptr + offs * 4
    slot = tl.load(command, mask=given, other=0)
    generation = tl.load(command + 1, mask=given, other=0)
    group = tl.load(command + 2, mask=given, other=0)
    seq = tl.load(command + 3, mask=given, other=0)
    owner = tl.load(generation_ptr + slot, mask=given, other=0)

    current = given & (generation >= owner)
    waits = current & (group >= 0)
    tl.store(occupied_ptr + slot, waits, mask=current)
    tl.store(generation_ptr + slot, generation, mask=current)
    tl.store(priority_rank_ptr + slot, (group >> 1).to(tl.int32), mask=waits)
    tl.store(lane_ptr + slot, (group & 1).to(tl.int32), mask=waits)
    tl.store(seq_ptr + slot, seq, mask=waits)
    tl.store(key_ptr + slot, tl.full([BLOCK], float("nan"), tl.float32), mask=given & (generation > owner))
    tl.store(dirty_ptr + slot // TILE, tl.full([BLOCK], 1, tl.int32), mask=current)


def slot_update(
    header: Tensor,
    commands: Tensor,
    priority_rank: Tensor,
    lane: Tensor,
    key: Tensor,
    seq: Tensor,
    occupied: Tensor,
    generation: Tensor,
    median_key: Tensor,
    seq_base: Tensor,
    dirty: Tensor,
    *,
    tile_size: int,
) -> None:
    """Apply commands to the slot table in place, without synchronising or allocating.

    Args:
        header: (4,) int64: number of commands (at most C), seq_base, bits of the median key as int32, spare.
        commands: (C, 4) int64: slot in [0, N) and given once, generation, 2 * priority_rank + lane or FREE,
            seq; rows past the number in the header are not read.
        priority_rank, lane, key, seq, occupied, median_key, seq_base: as in `queue_topk`; occupied is bool.
        generation: (N,) int64; 0 before a slot's first owner.
        dirty, tile_size: of the table's `TopkWorkspace`.
    Raises: ValueError: if a shape, dtype, layout or device is not as above; contents are not looked at.
    """
    for name, tensor, shape in (("header", header, (WORDS,)), ("commands", commands, (len(commands), WORDS))):
        if tensor.shape != shape or tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {'(4,)' if name == 'header' else '(C, 4)'} torch.int64, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != key.device:
            raise ValueError(f"{name} must lie on {key.device} like key, got {tensor.device}")
    num_slots = len(key)
    for name, tensor, length, dtype in (
        ("priority_rank", priority_rank, num_slots, torch.int32),
        ("lane", lane, num_slots, torch.int32),
        ("key", key, num_slots, torch.float32),
        ("seq", seq, num_slots, torch.int64),
        ("occupied", occupied, num_slots, torch.bool),
        ("generation", generation, num_slots, torch.int64),
        ("median_key", median_key, 1, torch.float32),
        ("seq_base", seq_base, 1, torch.int64),
        ("dirty", dirty, triton.cdiv(num_slots, tile_size), torch.int32),
    ):
        check_column(name, tensor, length, (dtype,), key.device)
    _slot_update_kernel[(max(1, triton.cdiv(len(commands), BLOCK)),)](
        header, commands, priority_rank, lane, key, seq, occupied, generation, median_key, seq_base, dirty,
        TILE=tile_size, BLOCK=BLOCK, num_warps=BLOCK // 32,
    )  # fmt: skip


def slot_update_reference(
    header: Tensor,
    commands: Tensor,
    priority_rank: Tensor,
    lane: Tensor,
    key: Tensor,
    seq: Tensor,
    occupied: Tensor,
    generation: Tensor,
    median_key: Tensor,
    seq_base: Tensor,
    dirty: Tensor,
    *,
    tile_size: int,
) -> None:
    """The same, one command at a time on the host."""
    count, base, median_bits, _ = header.tolist()
    seq_base.fill_(base)
    median_key.copy_(torch.tensor([median_bits], dtype=torch.int32).view(torch.float32))
    for slot, at, group, number in commands[:count].tolist():
        owner = int(generation[slot])
        if at < owner:
            continue
        generation[slot] = at
        occupied[slot] = group >= 0
        if group >= 0:
            priority_rank[slot], lane[slot] = divmod(group, 2)
            seq[slot] = number
        if at > owner:
            key[slot] = torch.nan
        dirty[slot // tile_size] = 1
