"""Pooled score: score[i] = pool(hidden[t] for t in prompt i) . weight + bias

pool is the first token (cls) or the mean over the prompt's tokens (mean). By linearity the mean is taken
after the dot product, so one fp32 number a prompt leaves the chip and no pooled (B, H) tensor exists.

Bytes moved: T * H * itemsize once for mean, B * H * itemsize for cls, plus 8 a prompt; 2 FLOPs an element, so
bound by HBM. One program a prompt: a prompt is at most the ranker's window (512 tokens, 0.4 MB at H = 384),
and a fixed order of addition makes the score independent of the batch it came in. With a destination the
program also writes the request's key into its slot (`publish_score`), 100 bytes a prompt more and no launch.

Source: PARS (arXiv 2510.03243), pooled [CLS] and Linear(H, 1); mean pooling: Reimers & Gurevych 2019
(arXiv 1908.10084), section 3.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# A kernel's arguments have Triton's types, not Python's; the comments beside them say which.

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from pars_fast.kernels.publish_score import ScoreDestination, _publish, publish_arguments

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _pool_score_kernel(
    hidden_ptr,  # (T, H), rows stride_t apart
    weight_ptr,  # (H,)
    bias_ptr,  # (1,)
    cu_seqlens_ptr,  # (B + 1,) int32
    score_ptr,  # (B,) fp32, out
    stride_t,
    slot_ptr,  # this and the rest: where the score goes, as in `_publish_score_kernel`; None without PUBLISH
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
    H: tl.constexpr,
    CLS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PUBLISH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    prompt = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + prompt).to(tl.int64)  # T * H may pass 2**31
    end = tl.load(cu_seqlens_ptr + prompt + 1).to(tl.int64)
    if CLS:
        end = tl.minimum(end, start + 1)  # an empty prompt stays empty: it must not read its neighbour's row

    total = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    for first_h in range(0, H, BLOCK_H):
        offs_h = first_h + tl.arange(0, BLOCK_H)
        weight = tl.load(weight_ptr + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)
        for first_t in range(start, end, BLOCK_T):
            offs_t = first_t + tl.arange(0, BLOCK_T)
            mask = (offs_t < end)[:, None] & (offs_h < H)[None, :]
            rows = hidden_ptr + offs_t[:, None] * stride_t + offs_h[None, :]
            total += tl.load(rows, mask=mask, other=0.0).to(tl.float32) * weight[None, :]

    mean = tl.sum(tl.sum(total, axis=1), axis=0) / (end - start).to(tl.float32)  # empty: 0 / 0 = NaN
    score = mean + tl.load(bias_ptr).to(tl.float32)
    tl.store(score_ptr + prompt, score)
    if PUBLISH:
        _publish(
            prompt, score, slot_ptr, generation_ptr, prompt_work_ptr, stride_slot, stride_generation,
            stride_work, key_ptr, slot_generation_ptr, dirty_ptr, map_scores_ptr, map_tokens_ptr,
            tokens_ptr, M, TILE, BLOCK_M,
        )  # fmt: skip


def launch_config(hidden_size: int, pooling: Literal["cls", "mean"]) -> dict[str, int]:
    """Block sizes: 128 divides 384, 768 and 1024, so mean wastes no lane there, and 16 rows of it are 16 fp32
    accumulators a thread; cls reads one row and wants it in flight at once."""
    if pooling == "cls":
        return {"BLOCK_T": 1, "BLOCK_H": min(triton.next_power_of_2(hidden_size), 1024), "num_warps": 4}
    return {"BLOCK_T": 16, "BLOCK_H": 128, "num_warps": 4}


def pool_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    *,
    pooling: Literal["cls", "mean"],
    destination: ScoreDestination | None = None,
) -> Tensor:
    """Score packed prompts; a larger score means a longer expected answer.

    Never synchronises, so the contents of `cu_seqlens` are the caller's word. A prompt without tokens scores
    NaN, which the queue orders as unscored.

    Args:
        hidden: (T, H) fp16, bf16 or fp32, last dimension contiguous; prompts lie end to end.
        weight: (H,) fp16, bf16 or fp32, contiguous.
        bias: (1,) fp16, bf16 or fp32.
        cu_seqlens: (B + 1,) int32, contiguous; prompt i owns rows cu_seqlens[i]:cu_seqlens[i + 1].
        pooling: "cls" (first token) or "mean".
        destination: store the scores as keys of their slots too, and as expected tokens in
            `destination.tokens`; what `publish_score` does with the result.
    Returns: (B,) fp32 scores, no unit; fp32 accumulation, the same bits each time.
    Raises: ValueError: if a shape, dtype, layout, device or pooling is not as above, the batch is empty, or
    it
        is larger than the destination's capacity.
    Source: PARS (arXiv 2510.03243), pooled score head.
    """
    if pooling not in ("cls", "mean"):
        raise ValueError(f"pooling must be 'cls' or 'mean', got {pooling!r}")
    if hidden.dim() != 2 or (hidden.shape[1] > 1 and hidden.stride(1) != 1) or hidden.shape[1] == 0:
        raise ValueError(
            f"hidden must be (total_tokens, H) with a contiguous last dimension, "
            f"got shape {tuple(hidden.shape)} with strides {hidden.stride()}"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    if weight.shape != hidden.shape[1:] or not weight.is_contiguous():
        raise ValueError(
            f"weight must be contiguous ({hidden.shape[1]},) to match hidden, got {tuple(weight.shape)}"
        )
    if bias.shape != (1,):
        raise ValueError(f"bias must be (1,), got {tuple(bias.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or not cu_seqlens.is_contiguous():
        raise ValueError(
            f"cu_seqlens must be contiguous (num_prompts + 1,) int32, got {tuple(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}"
        )
    if len(cu_seqlens) < 2:
        raise ValueError("cu_seqlens describes no prompt: an empty batch cannot be scored")
    if len({hidden.device, weight.device, bias.device, cu_seqlens.device}) > 1:
        raise ValueError(
            f"all inputs must lie on one device, got hidden on {hidden.device}, weight on {weight.device}, "
            f"bias on {bias.device}, cu_seqlens on {cu_seqlens.device}"
        )
    num_prompts = len(cu_seqlens) - 1
    if destination is not None and num_prompts > len(destination.tokens):
        raise ValueError(f"the destination takes {len(destination.tokens)} prompts, got {num_prompts}")
    score = torch.empty(num_prompts, dtype=torch.float32, device=hidden.device)
    _pool_score_kernel[(num_prompts,)](
        hidden, weight, bias, cu_seqlens, score, hidden.stride(0),
        H=hidden.shape[1], CLS=pooling == "cls", PUBLISH=destination is not None,
        **publish_arguments(destination), **launch_config(hidden.shape[1], pooling),
    )  # fmt: skip
    return score


def pool_score_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, *, pooling: Literal["cls", "mean"]
) -> Tensor:
    """The same in float64, one prompt at a time; reads `cu_seqlens` on the host."""
    prompts = hidden.double().split(cu_seqlens.diff().tolist())
    pooled = torch.stack([prompt[0] if pooling == "cls" else prompt.mean(dim=0) for prompt in prompts])
    return pooled @ weight.double() + bias.double()
