"""Small-batch score: 1 to 8 packed prompts, token ids in, scores (or keys in their slots) out, in one launch.

    x = word[id] + position[t] + type;  for each layer:  h = LN(x);  x = h + attention(h W_qkv + b) W_out + b;
    h = LN(x);  x = h + gelu(h W_up + b) W_down + b;  at last  score = pool(LN(x)) . weight + bias

A scheduler that looks at its queue often meets few new prompts at a time. Layer by layer that is some 60
launches of a few microseconds each, with next to no work in them. Here a bounded grid of programs stays on
the chip, shares out the tiles of one stage after the other and meets at a barrier in between. All programs
have to be on the chip at once, so the launch is cooperative: the driver refuses a grid that does not fit.

Barriers: 1 after the embedding, 5 a layer (after qkv, attention, out, up, down), so 5 L + 1: 31 for 6 layers,
and one arrival at the end for which nobody waits. A LayerNorm needs whole rows, which no tile of the product
before it has. It is therefore done by its consumer, which normalises the rows of its own tile before it
multiplies: each column tile repeats a few FLOPs a number and reads rows from L2 that it has to read anyway,
where a stage of its own would cost 2 L barriers. Attention could take in qkv (L barriers less), at the price
of computing keys and values again for each tile of queries. `down` is not split along K: at 128 tokens its
16 x 32 tiles are 96 programs' work, and every column tile of its consumer would have to add up the partial
sums again.

Bytes: each weight matrix comes from HBM once, L (4 H^2 + 2 H I) itemsize: 21.2 MB for MiniLM-L6 (H = 384,
I = 1536) in 16 bits, 5 us of an H200. At the start all programs ask L2 for an equal share of the matrices, in
order of layers, so that later stages need not wait for HBM, whatever their tiles are. Activations, (8 H + I)
itemsize written a token and layer, stay in L2. FLOPs: L (8 H^2 + 4 H I + 4 H S) a token of a prompt of S
tokens: 2.9 GFLOP for one prompt of 128, 4 us at an H200's bf16 peak. One prompt is thus bound by weights and
by barriers, eight by FLOPs.

Order of addition depends on block sizes alone, so the same launch gives the same bits each time.

Source: BERT, Devlin et al. 2019 (arXiv 1810.04805); online softmax: Milakov & Gimelshein 2018 (arXiv
1805.02867); grid barrier: Xiao & Feng 2010, "Inter-block GPU communication via fast barrier synchronization".
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# A kernel's arguments have Triton's types, not Python's; the comments beside them say which.

import math
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pars_fast.kernels.publish_score import ScoreDestination, _publish, publish_arguments
from pars_fast.packed_weights import PackedWeights

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_PROMPTS = 8
MAX_SEQLEN = 512

_OFFSETS = tl.constexpr(16)  # holds MAX_PROMPTS + 1 offsets, a power of two
_EMBEDDED_ROWS = tl.constexpr(4)  # rows a program gathers at a time: 128 tokens are 32 programs' work


@triton.jit
def _grid_barrier(counter_ptr, arrivals):
    """Wait until the counter shows `arrivals`; what programs wrote before theirs can then be read here.
    Returns the arrivals of the next barrier: the counter is never set back between two of them."""
    tl.debug_barrier()  # one thread arrives for all: the others' writes have to come before it
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()
    return arrivals + tl.num_programs(0)


@triton.jit
def _prefetch(weight_ptr, SIZE: tl.constexpr):
    """Ask L2 for SIZE elements, each program for its share, and wait for none of them."""
    LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth  # elements in 128 bytes
    for first in range(tl.program_id(0) * 128, tl.cdiv(SIZE, LINE), tl.num_programs(0) * 128):
        offs = tl.minimum((first + tl.arange(0, 128)) * LINE, SIZE - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [(weight_ptr + offs).to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _embed(
    input_ids_ptr, cu_seqlens_ptr, word_ptr, position_ptr, type_ptr, x_ptr,
    rows, num_prompts, vocab_size, max_positions, H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    offs_h = tl.arange(0, BLOCK_H)
    in_h = offs_h < H
    token_type = tl.load(type_ptr + offs_h, mask=in_h, other=0.0).to(tl.float32)
    prompts = tl.arange(0, _OFFSETS)
    starts = tl.load(cu_seqlens_ptr + prompts, mask=prompts < num_prompts, other=2147483647)
    step = tl.num_programs(0) * _EMBEDDED_ROWS
    for first in range(tl.program_id(0) * _EMBEDDED_ROWS, rows, step):
        offs_m = first + tl.arange(0, _EMBEDDED_ROWS)
        in_m = offs_m < rows
        ids = tl.load(input_ids_ptr + offs_m, mask=in_m, other=0)
        ids = tl.minimum(tl.maximum(ids, 0), vocab_size - 1)
        start = tl.max(tl.where(starts[None, :] <= offs_m[:, None], starts[None, :], 0), axis=1)
        positions = tl.minimum(offs_m - start, max_positions - 1)
        mask = in_m[:, None] & in_h[None, :]
        word = tl.load(word_ptr + ids[:, None] * H + offs_h[None, :], mask=mask, other=0.0)
        position = tl.load(position_ptr + positions[:, None] * H + offs_h[None, :], mask=mask, other=0.0)
        x = word.to(tl.float32) + position.to(tl.float32) + token_type[None, :]
        tl.store(x_ptr + offs_m[:, None] * H + offs_h[None, :], x, mask=mask)


@triton.jit
def _row_stats(row_ptrs, in_m, eps, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1 / standard deviation of each row; the second pass finds the rows in L1."""
    total = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for first_k in range(0, K, BLOCK_K):
        offs_k = first_k + tl.arange(0, BLOCK_K)
        mask = in_m[:, None] & (offs_k < K)[None, :]
        total += tl.load(row_ptrs + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=1) / K
    squares = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for first_k in range(0, K, BLOCK_K):
        offs_k = first_k + tl.arange(0, BLOCK_K)
        mask = in_m[:, None] & (offs_k < K)[None, :]
        x = tl.load(row_ptrs + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - mean[:, None], 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, axis=1) / K + eps)


@triton.jit
def _normalised(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, offs_k, in_k):
    weight = tl.load(norm_weight_ptr + offs_k, mask=in_k, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias_ptr + offs_k, mask=in_k, other=0.0).to(tl.float32)
    return (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def _linear(
    x_ptr,  # (rows, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,)
    y_ptr,  # (rows, N), out
    residual_ptr,  # NORM: (rows, K), out, the normalised rows; ADD_RESIDUAL: (rows, N)
    norm_weight_ptr,  # (K,)
    norm_bias_ptr,  # (K,)
    rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,  # y = f(LN(x) W + b) and not f(x W + b)
    GELU: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(rows, BLOCK_M)
    for tile in range(tl.program_id(0), tiles_m * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        tile_n = tile // tiles_m  # neighbours share columns, so HBM sees each of them once
        offs_m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_m, in_n = offs_m < rows, offs_n < N
        row_ptrs = x_ptr + offs_m[:, None] * K
        if NORM:
            first_tile = offs_m + tile_n * rows < rows  # all column tiles normalise, the first one stores it
            mean, rstd = _row_stats(row_ptrs, in_m, eps, K, BLOCK_M, BLOCK_K)
        y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for first_k in range(0, K, BLOCK_K):
            offs_k = first_k + tl.arange(0, BLOCK_K)
            in_k = offs_k < K
            mask = in_m[:, None] & in_k[None, :]
            x = tl.load(row_ptrs + offs_k[None, :], mask=mask, other=0.0)
            if NORM:
                x = _normalised(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, offs_k, in_k)
                x = x.to(x_ptr.dtype.element_ty)
                tl.store(
                    residual_ptr + offs_m[:, None] * K + offs_k[None, :], x,
                    mask=first_tile[:, None] & in_k[None, :],
                )  # fmt: skip
            weight = tl.load(
                weight_ptr + offs_n[None, :] * K + offs_k[:, None],
                mask=in_k[:, None] & in_n[None, :], other=0.0,
            )  # fmt: skip
            y = tl.dot(x, weight, y, input_precision="ieee")
        y += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if GELU:
            y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
        offs_y = offs_m[:, None] * N + offs_n[None, :]
        mask = in_m[:, None] & in_n[None, :]
        if ADD_RESIDUAL:
            y += tl.load(residual_ptr + offs_y, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offs_y, y, mask=mask)


@triton.jit
def _attention(
    qkv_ptr,  # (rows, 3 H)
    context_ptr,  # (rows, H), out
    cu_seqlens_ptr,
    rows,
    num_prompts,
    max_seqlen,
    scale,  # log2(e) / sqrt(D): the softmax is taken in powers of two
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    D: tl.constexpr = H // HEADS
    tiles_m = tl.cdiv(max_seqlen, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    for item in range(tl.program_id(0), num_prompts * HEADS * tiles_m, tl.num_programs(0)):
        prompt = item // (HEADS * tiles_m)
        column = item // tiles_m % HEADS * D
        start = tl.load(cu_seqlens_ptr + prompt)
        end = tl.minimum(tl.load(cu_seqlens_ptr + prompt + 1), rows)
        first = start + item % tiles_m * BLOCK_M
        if first < end:
            offs_m = first + tl.arange(0, BLOCK_M)
            mask_m = (offs_m < end)[:, None] & in_d[None, :]
            query = tl.load(
                qkv_ptr + offs_m[:, None] * (3 * H) + (column + offs_d)[None, :], mask=mask_m, other=0.0
            )
            largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
            total = tl.zeros([BLOCK_M], dtype=tl.float32)
            context = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            for first_s in range(start, end, BLOCK_S):
                offs_s = first_s + tl.arange(0, BLOCK_S)
                in_s = offs_s < end
                key = tl.load(
                    qkv_ptr + offs_s[None, :] * (3 * H) + (H + column + offs_d)[:, None],
                    mask=in_s[None, :] & in_d[:, None], other=0.0,
                )  # fmt: skip
                logits = tl.dot(query, key, input_precision="ieee") * scale
                logits = tl.where(in_s[None, :], logits, float("-inf"))
                new_largest = tl.maximum(largest, tl.max(logits, axis=1))
                weights = tl.exp2(logits - new_largest[:, None])
                decay = tl.exp2(largest - new_largest)
                value = tl.load(
                    qkv_ptr + offs_s[:, None] * (3 * H) + (2 * H + column + offs_d)[None, :],
                    mask=in_s[:, None] & in_d[None, :], other=0.0,
                )  # fmt: skip
                total = total * decay + tl.sum(weights, axis=1)
                context = context * decay[:, None]
                context = tl.dot(weights.to(value.dtype), value, context, input_precision="ieee")
                largest = new_largest
            tl.store(
                context_ptr + offs_m[:, None] * H + (column + offs_d)[None, :],
                context / total[:, None], mask=mask_m,
            )  # fmt: skip


@triton.jit
def _pool(
    x_ptr, norm_weight_ptr, norm_bias_ptr, head_weight_ptr, head_bias_ptr, cu_seqlens_ptr, score_ptr,
    slot_ptr, generation_ptr, prompt_work_ptr, stride_slot, stride_generation, stride_work,
    key_ptr, slot_generation_ptr, dirty_ptr, map_scores_ptr, map_tokens_ptr, tokens_ptr,
    rows, num_prompts, eps, M, H: tl.constexpr, CLS: tl.constexpr, PUBLISH: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, KNOTS: tl.constexpr,
):  # fmt: skip
    for prompt in range(tl.program_id(0), num_prompts, tl.num_programs(0)):
        start = tl.load(cu_seqlens_ptr + prompt)
        end = tl.minimum(tl.load(cu_seqlens_ptr + prompt + 1), rows)
        if CLS:
            end = tl.minimum(end, start + 1)
        total = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        for first in range(start, end, BLOCK_M):
            offs_m = first + tl.arange(0, BLOCK_M)
            in_m = offs_m < end
            row_ptrs = x_ptr + offs_m[:, None] * H
            mean, rstd = _row_stats(row_ptrs, in_m, eps, H, BLOCK_M, BLOCK_K)
            for first_k in range(0, H, BLOCK_K):
                offs_k = first_k + tl.arange(0, BLOCK_K)
                in_k = offs_k < H
                mask = in_m[:, None] & in_k[None, :]
                x = tl.load(row_ptrs + offs_k[None, :], mask=mask, other=0.0)
                x = _normalised(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, offs_k, in_k)
                weight = tl.load(head_weight_ptr + offs_k, mask=in_k, other=0.0).to(tl.float32)
                total += tl.where(mask, x * weight[None, :], 0.0)
        mean_score = tl.sum(tl.sum(total, axis=1), axis=0) / (end - start).to(tl.float32)  # empty: NaN
        score = mean_score + tl.load(head_bias_ptr).to(tl.float32)
        tl.store(score_ptr + prompt, score)
        if PUBLISH:
            _publish(
                prompt, score, slot_ptr, generation_ptr, prompt_work_ptr, stride_slot, stride_generation,
                stride_work, key_ptr, slot_generation_ptr, dirty_ptr, map_scores_ptr, map_tokens_ptr,
                tokens_ptr, M, TILE, KNOTS,
            )  # fmt: skip


# The batch's sizes change from call to call and must not compile it anew.
@triton.jit(do_not_specialize=["num_tokens", "num_prompts", "max_seqlen"])
def _small_batch_score_kernel(
    input_ids_ptr,  # (T,) int32
    cu_seqlens_ptr,  # (B + 1,) int32
    score_ptr,  # (B,) fp32, out
    word_embedding_ptr,  # weights: as PackedWeights has them
    position_embedding_ptr,
    token_type_embedding_ptr,
    embedding_norm_weight_ptr,
    embedding_norm_bias_ptr,
    qkv_weight_ptr,
    qkv_bias_ptr,
    attention_out_weight_ptr,
    attention_out_bias_ptr,
    attention_norm_weight_ptr,
    attention_norm_bias_ptr,
    up_weight_ptr,
    up_bias_ptr,
    down_weight_ptr,
    down_bias_ptr,
    output_norm_weight_ptr,
    output_norm_bias_ptr,
    head_weight_ptr,
    head_bias_ptr,
    x_ptr,  # workspace: as SmallBatchWorkspace has it
    residual_ptr,
    qkv_ptr,
    context_ptr,
    inner_ptr,
    counter_ptr,  # (1,) int32, 0 between launches
    slot_ptr,  # this and the rest to M: where scores go, as in `_publish_score_kernel`; None without PUBLISH
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
    num_tokens,  # T
    num_prompts,  # B
    max_seqlen,
    num_layers,
    vocab_size,
    max_positions,
    eps,
    scale,
    H: tl.constexpr,
    INNER: tl.constexpr,
    HEADS: tl.constexpr,
    CLS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # attention and pooling
    BLOCK_S: tl.constexpr,
    WIDE_M: tl.constexpr,  # qkv and up
    WIDE_N: tl.constexpr,
    NARROW_M: tl.constexpr,  # out and down
    NARROW_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PUBLISH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # knots of the map
):
    if PREFETCH:
        for layer in range(num_layers):
            _prefetch(qkv_weight_ptr + layer * (3 * H * H), 3 * H * H)
            _prefetch(attention_out_weight_ptr + layer * (H * H), H * H)
            _prefetch(up_weight_ptr + layer * (INNER * H), INNER * H)
            _prefetch(down_weight_ptr + layer * (H * INNER), H * INNER)
    rows = tl.minimum(tl.load(cu_seqlens_ptr + num_prompts), num_tokens)  # ids past the last prompt: padding
    _embed(
        input_ids_ptr, cu_seqlens_ptr, word_embedding_ptr, position_embedding_ptr, token_type_embedding_ptr,
        x_ptr, rows, num_prompts, vocab_size, max_positions, H, BLOCK_H,
    )  # fmt: skip
    arrivals = _grid_barrier(counter_ptr, tl.num_programs(0))
    norm_weight_ptr, norm_bias_ptr = embedding_norm_weight_ptr, embedding_norm_bias_ptr
    for layer in range(num_layers):
        _linear(
            x_ptr, qkv_weight_ptr + layer * (3 * H * H), qkv_bias_ptr + layer * (3 * H), qkv_ptr,
            residual_ptr, norm_weight_ptr, norm_bias_ptr, rows, eps, 3 * H, H,
            NORM=True, GELU=False, ADD_RESIDUAL=False, BLOCK_M=WIDE_M, BLOCK_N=WIDE_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        arrivals = _grid_barrier(counter_ptr, arrivals)
        _attention(
            qkv_ptr, context_ptr, cu_seqlens_ptr, rows, num_prompts, max_seqlen, scale,
            H, HEADS, BLOCK_Q, BLOCK_S, BLOCK_D,
        )  # fmt: skip
        arrivals = _grid_barrier(counter_ptr, arrivals)
        norm_weight_ptr, norm_bias_ptr = (
            attention_norm_weight_ptr + layer * H, attention_norm_bias_ptr + layer * H
        )  # fmt: skip
        _linear(
            context_ptr, attention_out_weight_ptr + layer * (H * H), attention_out_bias_ptr + layer * H,
            x_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, rows, eps, H, H,
            NORM=False, GELU=False, ADD_RESIDUAL=True, BLOCK_M=NARROW_M, BLOCK_N=NARROW_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        arrivals = _grid_barrier(counter_ptr, arrivals)
        _linear(
            x_ptr, up_weight_ptr + layer * (INNER * H), up_bias_ptr + layer * INNER, inner_ptr,
            residual_ptr, norm_weight_ptr, norm_bias_ptr, rows, eps, INNER, H,
            NORM=True, GELU=True, ADD_RESIDUAL=False, BLOCK_M=WIDE_M, BLOCK_N=WIDE_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        arrivals = _grid_barrier(counter_ptr, arrivals)
        norm_weight_ptr, norm_bias_ptr = output_norm_weight_ptr + layer * H, output_norm_bias_ptr + layer * H
        _linear(
            inner_ptr, down_weight_ptr + layer * (H * INNER), down_bias_ptr + layer * H, x_ptr,
            residual_ptr, norm_weight_ptr, norm_bias_ptr, rows, eps, H, INNER,
            NORM=False, GELU=False, ADD_RESIDUAL=True, BLOCK_M=NARROW_M, BLOCK_N=NARROW_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        arrivals = _grid_barrier(counter_ptr, arrivals)
    _pool(
        x_ptr, norm_weight_ptr, norm_bias_ptr, head_weight_ptr, head_bias_ptr, cu_seqlens_ptr, score_ptr,
        slot_ptr, generation_ptr, prompt_work_ptr, stride_slot, stride_generation, stride_work,
        key_ptr, slot_generation_ptr, dirty_ptr, map_scores_ptr, map_tokens_ptr, tokens_ptr,
        rows, num_prompts, eps, M, H, CLS, PUBLISH, TILE, BLOCK_Q, BLOCK_K, BLOCK_M,
    )  # fmt: skip
    # The last to leave sets the counter back for the next launch, which a replayed graph could not do itself.
    if tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu") == arrivals - 1:
        tl.atomic_xchg(counter_ptr, 0, sem="relaxed", scope="gpu")


@dataclass(frozen=True, slots=True)
class SmallBatchWorkspace:
    """What one launch leaves for itself between its stages: C tokens of room, the weights' dtype and device.

    Of one launch at a time: launches on two streams need two of them.
    """

    x: Tensor  # (C, H), what the next LayerNorm reads
    residual: Tensor  # (C, H), the rows it gave
    qkv: Tensor  # (C, 3 H)
    context: Tensor  # (C, H)
    inner: Tensor  # (C, I)
    counter: Tensor  # (1,) int32, arrivals at the grid barrier, 0 between launches

    @classmethod
    def allocate(cls, weights: PackedWeights, max_tokens: int) -> "SmallBatchWorkspace":
        """Room for batches of at most `max_tokens` tokens in all.

        Raises: ValueError: if `max_tokens` is not 1 to MAX_PROMPTS * MAX_SEQLEN.
        """
        if not 1 <= max_tokens <= MAX_PROMPTS * MAX_SEQLEN:
            raise ValueError(f"max_tokens must be 1 to {MAX_PROMPTS * MAX_SEQLEN}, got {max_tokens}")

        def rows(width: int) -> Tensor:
            return torch.empty((max_tokens, width), dtype=weights.dtype, device=weights.device)

        H = weights.hidden_size
        return cls(
            x=rows(H), residual=rows(H), qkv=rows(3 * H), context=rows(H),
            inner=rows(weights.intermediate_size),
            counter=torch.zeros(1, dtype=torch.int32, device=weights.device),
        )  # fmt: skip

    @property
    def max_tokens(self) -> int:
        return len(self.x)

    def num_bytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))


def launch_config(
    num_tokens: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype, num_programs: int
) -> dict[str, int]:
    """Block sizes: of each pair of products (qkv and up, out and down) the largest tile that still gives two
    programs in three something to do: a large tile reads less from L2. An SM has one program, so that may
    have 8 warps. Tiles of 16 rows want more of K in flight; fp32, of twice the bytes, tiles of 32 at most.
    Keys are taken by 64 or 32, whichever ptxas can do without a spill beside those tiles."""
    tiles = ((64, 64), (64, 32), (32, 32), (16, 32), (16, 16))[2 if dtype == torch.float32 else 0 :]

    def tile(out_features: int) -> tuple[int, int]:
        for m, n in tiles:
            if 3 * triton.cdiv(num_tokens, m) * triton.cdiv(out_features, n) >= 2 * num_programs:
                return m, n
        return tiles[-1]

    wide, narrow = tile(min(3 * hidden_size, intermediate_size)), tile(hidden_size)
    return {
        "WIDE_M": wide[0], "WIDE_N": wide[1], "NARROW_M": narrow[0], "NARROW_N": narrow[1],
        # A warp takes 16 queries at least, so a smaller block of them would save no time.
        "BLOCK_Q": min(max(16, triton.next_power_of_2(num_tokens)), tiles[0][0]),
        "BLOCK_S": 32 if wide[0] == 64 else tiles[0][0],
        "BLOCK_K": 128 if wide[0] == 16 and dtype != torch.float32 else 64,
        "num_warps": 4 if num_tokens <= 16 else 8,
    }  # fmt: skip


@lru_cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def small_batch_score(
    weights: PackedWeights,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    workspace: SmallBatchWorkspace,
    num_programs: int | None = None,
    destination: ScoreDestination | None = None,
) -> Tensor:
    """Score 1 to MAX_PROMPTS packed prompts in one launch; a larger score means a longer expected answer.

    Never synchronises, and allocates nothing but the scores, so it can be captured in a CUDA graph. Contents
    of `cu_seqlens` are the caller's word. Tokens past its last offset are left out, and a prompt without
    tokens scores NaN and changes no other, so a batch can be padded to a bucket of a graph. Ids out of range
    count as the nearest in range.

    Args:
        weights: L layers, hidden size H, inner size I; fp16, bf16 or fp32.
        input_ids: (T,) int32, contiguous; prompts lie end to end.
        cu_seqlens: (B + 1,) int32, contiguous; prompt i owns ids cu_seqlens[i]:cu_seqlens[i + 1].
        max_seqlen: no prompt is longer; 1 to MAX_SEQLEN and to the weights' positions.
        workspace: of these weights, with room for T tokens; the launches that use it follow one another.
        num_programs: programs of the persistent grid, at most one an SM; None: all SMs. In the interpreter 1:
            it runs one program after the other, so the first would wait for the second forever.
        destination: as `pool_score`'s: the scores go to their slots as well.
    Returns: (B,) fp32 scores, no unit; fp32 accumulation, the same bits each time.
    Raises: ValueError: if a shape, dtype, layout, device or number is not as above, or the batch is empty, or
        it is larger than the destination's capacity.
    Source: PARS (arXiv 2510.03243); see the module docstring.
    """
    H, device = weights.hidden_size, weights.device
    if weights.dtype not in DTYPES:
        raise ValueError(f"weights must be float16, bfloat16 or float32, got {weights.dtype}")
    for name, tensor in (("input_ids", input_ids), ("cu_seqlens", cu_seqlens)):
        if tensor.dim() != 1 or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be one-dimensional contiguous int32, got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} must lie on {device} like the weights, got {tensor.device}")
    num_tokens, num_prompts = len(input_ids), len(cu_seqlens) - 1
    if num_tokens == 0 or num_prompts < 1:
        raise ValueError(f"an empty batch cannot be scored: {num_tokens} tokens, {num_prompts} prompts")
    if num_prompts > MAX_PROMPTS:
        raise ValueError(f"a small batch is at most {MAX_PROMPTS} prompts, got {num_prompts}")
    longest = min(MAX_SEQLEN, len(weights.position_embedding))
    if not 1 <= max_seqlen <= longest:
        raise ValueError(f"max_seqlen must be 1 to {longest}, got {max_seqlen}")
    if destination is not None and num_prompts > len(destination.tokens):
        raise ValueError(f"the destination takes {len(destination.tokens)} prompts, got {num_prompts}")
    if num_tokens > workspace.max_tokens:
        raise ValueError(f"workspace has room for {workspace.max_tokens} tokens, got {num_tokens}")
    room = (workspace.x.shape[1], workspace.inner.shape[1], workspace.x.dtype, workspace.x.device)
    if room != (H, weights.intermediate_size, weights.dtype, device):
        raise ValueError(
            f"workspace must be of these weights: hidden size {H}, inner size {weights.intermediate_size}, "
            f"{weights.dtype} on {device}, got {', '.join(map(str, room))}"
        )
    compiled = isinstance(_small_batch_score_kernel, triton.JITFunction)
    max_programs = _num_sms(device) if compiled else 1
    num_programs = max_programs if num_programs is None else num_programs
    if not 1 <= num_programs <= max_programs:
        raise ValueError(f"num_programs must be 1 to {max_programs}, got {num_programs}")

    head_size = H // weights.num_heads
    score = torch.empty(num_prompts, dtype=torch.float32, device=device)
    _small_batch_score_kernel[(num_programs,)](
        input_ids, cu_seqlens, score,
        weights.word_embedding, weights.position_embedding, weights.token_type_embedding,
        weights.embedding_norm_weight, weights.embedding_norm_bias,
        weights.qkv_weight, weights.qkv_bias,
        weights.attention_out_weight, weights.attention_out_bias,
        weights.attention_norm_weight, weights.attention_norm_bias,
        weights.up_weight, weights.up_bias, weights.down_weight, weights.down_bias,
        weights.output_norm_weight, weights.output_norm_bias, weights.head_weight, weights.head_bias,
        workspace.x, workspace.residual, workspace.qkv, workspace.context, workspace.inner, workspace.counter,
        num_tokens=num_tokens, num_prompts=num_prompts, max_seqlen=max_seqlen, num_layers=weights.num_layers,
        vocab_size=len(weights.word_embedding), max_positions=len(weights.position_embedding),
        eps=weights.norm_eps, scale=math.log2(math.e) / math.sqrt(head_size),
        H=H, INNER=weights.intermediate_size, HEADS=weights.num_heads, CLS=weights.pooling == "cls",
        BLOCK_H=triton.next_power_of_2(H), BLOCK_D=max(16, triton.next_power_of_2(head_size)),
        PREFETCH=compiled, PUBLISH=destination is not None, launch_cooperative_grid=True,
        **publish_arguments(destination),
        **launch_config(num_tokens, H, weights.intermediate_size, weights.dtype, num_programs),
    )  # fmt: skip
    return score


def small_batch_score_reference(weights: PackedWeights, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The same in float64, one prompt at a time; reads `cu_seqlens` on the host and wants ids in range."""
    H, heads, eps = weights.hidden_size, weights.num_heads, weights.norm_eps

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (H,), weight.double(), bias.double(), eps)

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight.double(), bias.double())

    def score(ids: Tensor) -> Tensor:
        x = weights.word_embedding[ids].double() + weights.position_embedding[: len(ids)].double()
        x = norm(
            x + weights.token_type_embedding.double(),
            weights.embedding_norm_weight, weights.embedding_norm_bias,
        )  # fmt: skip
        for i in range(weights.num_layers):
            qkv = linear(x, weights.qkv_weight[i], weights.qkv_bias[i]).view(len(ids), 3, heads, H // heads)
            query, key, value = qkv.permute(1, 2, 0, 3)
            attention = (query @ key.mT / (H // heads) ** 0.5).softmax(-1) @ value
            context = attention.transpose(0, 1).reshape(len(ids), H)
            x = x + linear(context, weights.attention_out_weight[i], weights.attention_out_bias[i])
            x = norm(x, weights.attention_norm_weight[i], weights.attention_norm_bias[i])
            inner = F.gelu(linear(x, weights.up_weight[i], weights.up_bias[i]))
            x = x + linear(inner, weights.down_weight[i], weights.down_bias[i])
            x = norm(x, weights.output_norm_weight[i], weights.output_norm_bias[i])
        pooled = x[0] if weights.pooling == "cls" else x.mean(dim=0)
        return pooled @ weights.head_weight.double() + weights.head_bias.double()[0]

    prompts = input_ids[: cu_seqlens[-1]].split(cu_seqlens.diff().tolist())
    return torch.stack([score(prompt) for prompt in prompts])
