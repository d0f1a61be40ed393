"""Attention of packed prompts: out = softmax(q k^T / sqrt(D)) v, each token over all tokens of its own prompt

qkv holds query, key, value of all heads side by side, as one linear layer wrote them. Softmax is online: a
program keeps the running maximum m and sum l of its BLOCK_M queries while it walks the prompt's keys,

    m' = max(m, max s),  l' = l 2^(m - m') + sum 2^(s - m'),  acc' = acc 2^(m - m') + 2^(s - m') v

with s = log2(e) / sqrt(D) q k^T, so no score leaves the chip and nothing is padded.

4 S H FLOPs for a token of a prompt of S tokens, H = heads * D. Bytes: 4 H * itemsize a token, if the keys
and values that several programs of a prompt and head read come from L2. In 16 bits that is S / 2 FLOPs a
byte, so prompts up to about 360 tokens are bound by HBM (H200: 780 TFLOP/s bf16, 4.3 TB/s); at H = 384 and
S = 128, 0.20 MFLOP and 3.1 KB a token. Such a prompt is two steps of the loop, so latency may count for more
(not measured).

Source: Milakov & Gimelshein 2018 (arXiv 1805.02867) for the online softmax; Dao et al. 2022, FlashAttention
(arXiv 2205.14135), and Triton's tutorial 06 for the tiling.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# A kernel's arguments have Triton's types, not Python's; the comments beside them say which.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pars_fast.kernels.launch import check_matrix, count_prompts, num_programs

MAX_HEAD_SIZE = 128


@triton.jit
def _load_rows(ptr, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tile of rows; columns at and past D are read as 0."""
    if BLOCK_D > D:
        mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(ptr, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_items", "tiles"])
def _attention_kernel(
    qkv_ptr,  # (T, 3 * HEADS * D)
    cu_seqlens_ptr,  # (B + 1,) int32
    out_ptr,  # (T, HEADS * D), out
    num_items,  # B * HEADS * tiles
    tiles,  # tiles of queries in the longest prompt
    scale,  # log2(e) / sqrt(D)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_d = tl.arange(0, BLOCK_D)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        head = item // tiles % HEADS
        prompt = item // (tiles * HEADS)
        start = tl.load(cu_seqlens_ptr + prompt).to(tl.int64)  # T * 3 * H may pass 2**31
        length = tl.load(cu_seqlens_ptr + prompt + 1) - start.to(tl.int32)
        first_m = item % tiles * BLOCK_M
        if first_m < length:
            offs_m = first_m + tl.arange(0, BLOCK_M)
            mask_m = (offs_m < length)[:, None]
            query = qkv_ptr + start * (3 * HEADS * D) + head * D + offs_d[None, :]
            q = _load_rows(query + offs_m[:, None] * (3 * HEADS * D), mask_m, D, BLOCK_D)
            m = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
            l = tl.zeros([BLOCK_M], dtype=tl.float32)  # noqa: E741
            acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            for first_n in range(0, length, BLOCK_N):
                offs_n = first_n + tl.arange(0, BLOCK_N)
                mask_n = offs_n < length
                rows = query + offs_n[:, None] * (3 * HEADS * D)
                k = _load_rows(rows + HEADS * D, mask_n[:, None], D, BLOCK_D)
                v = _load_rows(rows + 2 * HEADS * D, mask_n[:, None], D, BLOCK_D)
                s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                s = tl.where(mask_n[None, :], s, -float("inf"))
                new_m = tl.maximum(m, tl.max(s, axis=1))
                p = tl.exp2(s - new_m[:, None])
                shrink = tl.exp2(m - new_m)
                l = l * shrink + tl.sum(p, axis=1)  # noqa: E741
                acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
                m = new_m
            context = (acc / l[:, None]).to(out_ptr.dtype.element_ty)
            out = out_ptr + (start + offs_m)[:, None] * (HEADS * D) + head * D + offs_d[None, :]
            tl.store(out, context, mask=mask_m & (offs_d < D)[None, :])


def launch_config(head_size: int, max_seqlen: int, dtype: torch.dtype) -> dict[str, int]:
    """64 queries by 64 keys in 4 warps, a warp 16 rows of either product; less where prompts are shorter.

    fp32 runs on the CUDA cores, where operands live in registers: 32 by 32.
    """
    block = min(64 if dtype != torch.float32 else 32, max(16, triton.next_power_of_2(max_seqlen)))
    BLOCK_D = max(16, triton.next_power_of_2(head_size))
    return {"BLOCK_M": block, "BLOCK_N": block, "BLOCK_D": BLOCK_D, "num_warps": 4, "num_stages": 2}


def attention(
    qkv: Tensor, cu_seqlens: Tensor, *, num_heads: int, max_seqlen: int, max_programs: int | None = None
) -> Tensor:
    """Bidirectional attention within each prompt, without synchronising.

    Args:
        qkv: (T, 3 * H) fp16, bf16 or fp32, contiguous: query, key, value, each num_heads * head size wide.
            Rows past cu_seqlens[-1] may follow: their output is not written.
        cu_seqlens: (B + 1,) int32, contiguous; prompt i owns rows cu_seqlens[i]:cu_seqlens[i + 1], or none.
        num_heads: divides H, head size at most 128 (32 and 64 are what it is made for).
        max_seqlen: no prompt has more tokens; on the host's word, since looking would wait for the GPU. Of a
            longer prompt, tokens past the last whole tile are not written.
        max_programs: at most so many programs, and so SMs; None: one a prompt, head and tile of queries.
    Returns: (T, H) in the dtype of `qkv`; scores and sums in fp32, fp32 inputs without TF32.
    Raises: ValueError: if a shape, dtype, layout, device or number is not as above, or the batch is empty.
    """
    num_rows, width = check_matrix("qkv", qkv)
    num_prompts = count_prompts(cu_seqlens, qkv.device)
    if num_heads < 1 or width % (3 * num_heads):
        raise ValueError(f"qkv must be 3 * num_heads * head size wide, got {width} for {num_heads} heads")
    head_size = width // (3 * num_heads)
    if head_size > MAX_HEAD_SIZE:
        raise ValueError(f"head size must be at most {MAX_HEAD_SIZE}, got {head_size}")
    if max_seqlen < 1:
        raise ValueError(f"max_seqlen must be at least 1, got {max_seqlen}")
    config = launch_config(head_size, max_seqlen, qkv.dtype)
    tiles = triton.cdiv(max_seqlen, config["BLOCK_M"])
    num_items = num_prompts * num_heads * tiles
    out = torch.empty((num_rows, width // 3), dtype=qkv.dtype, device=qkv.device)
    _attention_kernel[(num_programs(num_items, max_programs),)](
        qkv, cu_seqlens, out, num_items, tiles, math.log2(math.e) / head_size**0.5,
        HEADS=num_heads, D=head_size, **config,
    )  # fmt: skip
    return out


def attention_reference(
    qkv: Tensor, cu_seqlens: Tensor, *, num_heads: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The same in PyTorch, one prompt at a time, in float64 or another dtype; rows of prompts alone.

    Reads `cu_seqlens` on the host.
    """
    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    context = []
    for prompt in qkv.to(dtype)[: sum(lengths)].split(lengths):
        q, k, v = prompt.view(len(prompt), 3, num_heads, -1).permute(1, 2, 0, 3)
        context.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
    return torch.cat(context)
