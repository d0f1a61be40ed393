"""Publish scores: from the ranker's score to the request's key in the slot table, without the host.

    tokens[i] = token_map(score[i])
    key[slot[i]] = sqrt(tokens[i] * (tokens[i] + prompt_work[i]))   where slot[i] >= 0 and generation[i] is
                                                                    the slot's

The work of a prompt is 0 for a policy that does not weigh it: then the key is the tokens, bit for bit.

The isotonic map is M knots with linear interpolation between them and constant beyond (`TokenMap`). A score
that is not finite gives NaN: no key, so the request is ordered by the median. The map stays monotone in fp32:
a value between two knots is held below the upper one, so rounding changes no order, it can only make ties.

`_publish` is what one program does with one score in hand: the last lines of `pool_score` and of this file's
own kernel, which takes scores that another kernel left in memory.

Bytes moved for B scores: 36 B read, 4 B written and 64 B into the table, 8 M for knots; one launch, or none
in `pool_score`.

Source: isotonic calibration, Barlow et al. 1972; `pars_fast/calibration.py`. The key: Smith 1956;
`pars_fast/policies/pars_fast.py`.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# A kernel's arguments have Triton's types, not Python's; the comments beside them say which.

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pars_fast.calibration import TokenMap
from pars_fast.kernels.queue_topk import check_column

PUBLISH_ARGUMENTS = (
    "slot_ptr", "generation_ptr", "prompt_work_ptr", "stride_slot", "stride_generation", "stride_work",
    "key_ptr", "slot_generation_ptr", "dirty_ptr", "map_scores_ptr", "map_tokens_ptr", "tokens_ptr", "M",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ScoreDestination:
    """Where the scores of a batch of up to C prompts go; N slots in tiles, a map of M knots. One device.

    Raises: ValueError: if a shape, dtype, layout or device is not as below.
    """

    slot: Tensor  # (C,) int64, of any stride; -1 where a score goes nowhere
    generation: Tensor  # (C,) int64, of any stride: the slot's owner when scoring began
    prompt_work: Tensor  # (C,) fp64, of any stride, >= 0: work of the prompt, in output tokens
    key: Tensor  # (N,) fp32, of the slot table
    slot_generation: Tensor  # (N,) int64, of the slot table
    dirty: Tensor  # (tiles,) int32, of the table's `TopkWorkspace`
    tile_size: int
    map_scores: Tensor  # (M,) fp32, rising
    map_tokens: Tensor  # (M,) fp32, rising
    tokens: Tensor  # (C,) fp32, out: expected output tokens, for the host

    def __post_init__(self) -> None:
        capacity, num_slots, device = len(self.tokens), len(self.key), self.key.device
        for name, tensor, dtype in (
            ("slot", self.slot, torch.int64),
            ("generation", self.generation, torch.int64),
            ("prompt_work", self.prompt_work, torch.float64),
        ):
            if tensor.shape != (capacity,) or tensor.dtype != dtype or tensor.device != device:
                raise ValueError(
                    f"{name} must be ({capacity},) {dtype} on {device}, "
                    f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                )
        for name, tensor, length, dtype in (
            ("key", self.key, num_slots, torch.float32),
            ("slot_generation", self.slot_generation, num_slots, torch.int64),
            ("dirty", self.dirty, triton.cdiv(num_slots, self.tile_size), torch.int32),
            ("map_scores", self.map_scores, len(self.map_tokens), torch.float32),
            ("map_tokens", self.map_tokens, len(self.map_tokens), torch.float32),
            ("tokens", self.tokens, capacity, torch.float32),
        ):
            check_column(name, tensor, length, (dtype,), device)


def map_knots(token_map: TokenMap, device: torch.device) -> tuple[Tensor, Tensor]:
    """The map's scores and tokens as the kernel reads them: two (M,) fp32."""
    scores, tokens = (torch.tensor(k, dtype=torch.float32) for k in (token_map.scores, token_map.tokens))
    return scores.to(device), tokens.to(device)


@triton.jit
def _publish(
    prompt,
    score,  # fp32
    slot_ptr,
    generation_ptr,
    prompt_work_ptr,
    stride_slot: tl.constexpr,
    stride_generation: tl.constexpr,
    stride_work: tl.constexpr,
    key_ptr,
    slot_generation_ptr,
    dirty_ptr,
    map_scores_ptr,
    map_tokens_ptr,
    tokens_ptr,
    M,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Map the score of one prompt, and store it for the host and in its slot; arguments as in the kernel."""
    offs_m = tl.arange(0, BLOCK_M)
    knots = tl.load(map_scores_ptr + offs_m, mask=offs_m < M, other=float("inf"))
    below = tl.sum((knots <= score).to(tl.int32), axis=0)
    left, right = tl.maximum(below - 1, 0), tl.minimum(below, M - 1)
    left_score, right_score = tl.load(map_scores_ptr + left), tl.load(map_scores_ptr + right)
    left_tokens, right_tokens = tl.load(map_tokens_ptr + left), tl.load(map_tokens_ptr + right)
    width = right_score - left_score
    share = tl.where(width > 0, (score - left_score) / tl.where(width > 0, width, 1.0), 0.0)
    tokens = tl.minimum(left_tokens + share * (right_tokens - left_tokens), right_tokens)
    finite = (score.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
    tokens = tl.where(finite, tokens, float("nan"))
    tl.store(tokens_ptr + prompt, tokens)

    slot = tl.load(slot_ptr + prompt * stride_slot)
    owner = tl.load(slot_generation_ptr + slot, mask=slot >= 0, other=-1)
    mine = (slot >= 0) & (owner == tl.load(generation_ptr + prompt * stride_generation))
    work = tl.load(prompt_work_ptr + prompt * stride_work).to(tl.float32)
    key = tl.where(work > 0, tl.sqrt_rn(tokens * (tokens + work)), tokens)
    tl.store(key_ptr + slot, key, mask=mine)
    tl.store(dirty_ptr + slot // TILE, 1, mask=mine)


@triton.jit
def _publish_score_kernel(
    score_ptr,  # (B,) fp32
    slot_ptr,  # (B,) int64, stride_slot apart
    generation_ptr,  # (B,) int64, stride_generation apart
    prompt_work_ptr,  # (B,) fp64, stride_work apart
    stride_slot: tl.constexpr,
    stride_generation: tl.constexpr,
    stride_work: tl.constexpr,
    key_ptr,  # (N,) fp32
    slot_generation_ptr,  # (N,) int64
    dirty_ptr,  # (tiles,) int32
    map_scores_ptr,  # (M,) fp32
    map_tokens_ptr,  # (M,) fp32
    tokens_ptr,  # (B,) fp32, out
    M,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    prompt = tl.program_id(0)
    _publish(
        prompt, tl.load(score_ptr + prompt), slot_ptr, generation_ptr, prompt_work_ptr, stride_slot,
        stride_generation, stride_work, key_ptr, slot_generation_ptr, dirty_ptr, map_scores_ptr,
        map_tokens_ptr, tokens_ptr, M, TILE, BLOCK_M,
    )  # fmt: skip


def publish_arguments(destination: ScoreDestination | None) -> dict[str, Any]:
    """What a kernel that publishes takes besides its scores, by name; nothing of it without a destination."""
    if destination is None:
        return dict.fromkeys(PUBLISH_ARGUMENTS) | {"TILE": 1, "BLOCK_M": 1}
    d = destination
    values = (d.slot, d.generation, d.prompt_work, d.slot.stride(0), d.generation.stride(0),
              d.prompt_work.stride(0), d.key, d.slot_generation, d.dirty,
              d.map_scores, d.map_tokens, d.tokens, len(d.map_scores))  # fmt: skip
    arguments: dict[str, Any] = dict(zip(PUBLISH_ARGUMENTS, values, strict=True))
    return arguments | {"TILE": d.tile_size, "BLOCK_M": triton.next_power_of_2(len(d.map_scores))}


def publish_score(score: Tensor, destination: ScoreDestination) -> Tensor:
    """Store scores as keys of their slots, where those still belong to the requests that were scored, without
    synchronising or allocating.

    Args:
        score: (B,) fp32, contiguous, B at most the destination's capacity; prompt i goes to slot[i].
    Returns: (B,) fp32 expected output tokens, NaN where the score is not finite; the head of
        `destination.tokens`.
    Raises: ValueError: if score is not as above, or empty. Slots are not looked at: they must be under N.
    """
    capacity, device = len(destination.tokens), destination.key.device
    if score.dim() != 1 or not 0 < len(score) <= capacity:
        raise ValueError(f"score must be (B,) with B from 1 to {capacity}, got {tuple(score.shape)}")
    check_column("score", score, len(score), (torch.float32,), device)
    _publish_score_kernel[(len(score),)](score, **publish_arguments(destination), num_warps=1)
    return destination.tokens[: len(score)]


def publish_score_reference(score: Tensor, destination: ScoreDestination) -> Tensor:
    """The same in float64 on the host; gives the tokens and writes only `destination.key` and `dirty`."""
    token_map = TokenMap(tuple(destination.map_scores.tolist()), tuple(destination.map_tokens.tolist()))
    tokens = torch.from_numpy(token_map(score.double().cpu().numpy()))
    tokens = torch.where(score.cpu().isfinite(), tokens, torch.nan)
    work = destination.prompt_work[: len(tokens)].cpu()
    keys = (tokens * (tokens + work)).sqrt()
    for slot, generation, value in zip(
        destination.slot.tolist(), destination.generation.tolist(), keys.tolist(), strict=False
    ):
        if slot >= 0 and destination.slot_generation[slot] == generation:
            destination.key[slot] = value
            destination.dirty[slot // destination.tile_size] = 1
    return tokens
