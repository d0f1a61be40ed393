"""Embedding: y[t] = LayerNorm(word[input_ids[t]] + position[t - start of its prompt] + token_type)

LayerNorm(z) = (z - mean(z)) / sqrt(var(z) + eps) * norm_weight + norm_bias, biased variance, over a row of H.
No position ids exist: a token finds its prompt by binary search in cu_seqlens, about log2(B) loads that hit
the cache, since all tokens walk the same few entries.

Per token: 2 H * itemsize of HBM (word row in, y row out) and 4 bytes of id; position rows, at most 512,
come from L2. About 10 H FLOPs, so bound by HBM: 1.5 KB and 3.8 kFLOP a token at H = 384 in 16 bits.
One program takes whole rows, so both sums of LayerNorm stay in registers.

Source: Devlin et al. 2019 (arXiv 1810.04805), section 3; Ba, Kiros, Hinton 2016 (arXiv 1607.06450).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# A kernel's arguments have Triton's types, not Python's; the comments beside them say which.

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pars_fast.kernels.launch import check_matrix, check_tensor, count_prompts, num_programs


@triton.jit(do_not_specialize=["T", "num_bounds", "search_steps"])
def _embed_layer_norm_kernel(
    input_ids_ptr,  # (T,) int32
    cu_seqlens_ptr,  # (num_bounds,) int32, num_bounds = B + 1
    word_ptr,  # (V, H)
    position_ptr,  # (P, H)
    token_type_ptr,  # (H,)
    norm_weight_ptr,  # (H,)
    norm_bias_ptr,  # (H,)
    y_ptr,  # (T, H), out
    T,
    num_bounds,
    search_steps,
    eps,
    V: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    token_type = tl.load(token_type_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    norm_weight = tl.load(norm_weight_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.num_programs(0)):
        offs_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        # The first bound after the token, which for a row past the last prompt is num_bounds.
        low = tl.full([BLOCK_T], 1, tl.int32)
        high = tl.zeros([BLOCK_T], tl.int32) + num_bounds
        for _ in range(search_steps):
            middle = (low + high) // 2
            bound = tl.load(cu_seqlens_ptr + middle, mask=low < high, other=0)
            after = bound > offs_t
            high = tl.where((low < high) & after, middle, high)
            low = tl.where((low < high) & (after == 0), middle + 1, low)
        position = offs_t - tl.load(cu_seqlens_ptr + low - 1)
        # Clamped, as ids are: rows past the last prompt have no position, and none may read out of bounds.
        position = tl.minimum(tl.maximum(position, 0), P - 1)
        token = tl.load(input_ids_ptr + offs_t, mask=mask_t, other=0)
        token = tl.minimum(tl.maximum(token, 0), V - 1)

        word = word_ptr + token.to(tl.int64)[:, None] * H + offs_h[None, :]
        z = tl.load(word, mask=mask_t[:, None] & mask_h[None, :], other=0.0).to(tl.float32)
        place = position_ptr + position[:, None] * H + offs_h[None, :]
        z += tl.load(place, mask=mask_t[:, None] & mask_h[None, :], other=0.0).to(tl.float32)
        z += token_type[None, :]

        mean = tl.sum(z, axis=1) / H
        z = tl.where(mask_h[None, :], z - mean[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(z * z, axis=1) / H + eps)
        y = z * scale[:, None] * norm_weight[None, :] + norm_bias[None, :]
        rows = y_ptr + offs_t.to(tl.int64)[:, None] * H + offs_h[None, :]
        tl.store(rows, y.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_h[None, :])


def launch_config(hidden_size: int) -> dict[str, int]:
    """2048 elements a program in 4 warps: 16 fp32 a thread, and one prompt of 128 tokens fills 32 SMs."""
    BLOCK_H = triton.next_power_of_2(hidden_size)
    return {"BLOCK_T": max(1, 2048 // BLOCK_H), "BLOCK_H": BLOCK_H, "num_warps": 4}


def embed_layer_norm(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    max_programs: int | None = None,
) -> Tensor:
    """Embed packed prompts, without synchronising.

    An id outside the vocabulary is read as the nearest one inside, and a position past the table as its last:
    a check would wait for the GPU. `Ranker` refuses both while the batch is in host memory.

    Args:
        input_ids: (T,) int32, contiguous; prompts lie end to end. Rows past cu_seqlens[-1] may follow: they
            get finite values without a meaning.
        cu_seqlens: (B + 1,) int32, contiguous; prompt i owns ids cu_seqlens[i]:cu_seqlens[i + 1], maybe none.
        word: (V, H) fp16, bf16 or fp32, contiguous.
        position: (P, H), token_type, norm_weight, norm_bias: (H,), as `word`.
        eps: added to the variance.
        max_programs: at most so many programs, and so SMs; None: one a tile.
    Returns: (T, H) in the dtype of `word`; fp32 inside.
    Raises: ValueError: if a shape, dtype, layout or device is not as above, or the batch is empty.
    """
    vocab_size, hidden_size = check_matrix("word", word)
    num_prompts = count_prompts(cu_seqlens, word.device)
    check_tensor("input_ids", input_ids, (input_ids.numel(),), torch.int32, word.device)
    check_tensor("position", position, (len(position), hidden_size), word.dtype, word.device)
    for name, tensor in (
        ("token_type", token_type), ("norm_weight", norm_weight), ("norm_bias", norm_bias),
    ):  # fmt: skip
        check_tensor(name, tensor, (hidden_size,), word.dtype, word.device)
    num_tokens = len(input_ids)
    if num_tokens == 0:
        raise ValueError("input_ids holds no token: an empty batch cannot be scored")
    config = launch_config(hidden_size)
    grid = (num_programs(triton.cdiv(num_tokens, config["BLOCK_T"]), max_programs),)
    y = torch.empty((num_tokens, hidden_size), dtype=word.dtype, device=word.device)
    _embed_layer_norm_kernel[grid](
        input_ids, cu_seqlens, word, position, token_type, norm_weight, norm_bias, y,
        num_tokens, num_prompts + 1, num_prompts.bit_length(), eps,
        V=vocab_size, P=len(position), H=hidden_size, **config,
    )  # fmt: skip
    return y


def embed_layer_norm_reference(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The same in PyTorch, in float64 or another dtype; rows of prompts alone.

    Reads `cu_seqlens` on the host.
    """
    lengths = cu_seqlens.diff().tolist()
    positions = torch.cat([torch.arange(length, device=word.device) for length in lengths])
    z = word.to(dtype)[input_ids[: len(positions)]] + position.to(dtype)[positions] + token_type.to(dtype)
    return F.layer_norm(z, z.shape[1:], norm_weight.to(dtype), norm_bias.to(dtype), eps)
