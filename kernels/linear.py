"""Linear layer: y = activation(x weight^T + bias); the activation is none or the exact GELU

GELU(z) = z / 2 * (1 + erf(z / sqrt 2)), applied to the fp32 accumulator, so the wide inner layer crosses HBM
once, already activated.

2 N K FLOPs a token. Bytes: T (K + N) + N K elements if each operand crosses HBM once. At H = 384 in 16 bits
the projection to query, key, value is 0.88 MFLOP and 3.1 KB a token, the layer's widening (N = 1536)
1.18 MFLOP and 3.8 KB: 290 and 310 FLOP a byte for a large T, beside a ridge of 180 (H200, bf16), so a
batch is bound by the tensor cores; a single prompt by reading weights.

Tiles of y are taken in groups of GROUP_M rows of tiles, so that programs running at a time share rows of x
and of weight in L2. The grid is persistent: with `max_programs` a program takes several tiles.

Source: grouped order and accumulation as in Triton's tutorial 03, persistent loop as in 09; GELU: Hendrycks &
Gimpel 2016 (arXiv 1606.08415).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# A kernel's arguments have Triton's types, not Python's; the comments beside them say which.

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pars_fast.kernels.launch import check_matrix, check_tensor, num_programs

Activation = Literal["none", "gelu"]
FILLS_GPU = 128  # tiles that keep every SM of an A100, H100, H200 or B200 busy, nearly


@triton.jit(do_not_specialize=["T"])
def _linear_kernel(
    x_ptr,  # (T, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,)
    y_ptr,  # (T, N), out
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_m = tl.cdiv(T, BLOCK_M)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    offs_k = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        first_m = tile // (GROUP_M * tiles_n) * GROUP_M
        group_m = tl.minimum(tiles_m - first_m, GROUP_M)
        in_group = tile % (GROUP_M * tiles_n)
        offs_m = (first_m + in_group % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = in_group // group_m * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows past the end are read as the last one and not stored: cheaper than masks in the loop.
        x = x_ptr + tl.minimum(offs_m, T - 1).to(tl.int64)[:, None] * K + offs_k[None, :]
        weight = weight_ptr + tl.minimum(offs_n, N - 1)[None, :] * K + offs_k[:, None]
        z = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                x_tile = tl.load(x + k)
                weight_tile = tl.load(weight + k)
            else:
                x_tile = tl.load(x + k, mask=offs_k[None, :] < K - k, other=0.0)
                weight_tile = tl.load(weight + k, mask=offs_k[:, None] < K - k, other=0.0)
            z = tl.dot(x_tile, weight_tile, z, input_precision="ieee")

        mask_n = offs_n < N
        z += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if GELU:
            z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
        y = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(y, z.to(y_ptr.dtype.element_ty), mask=(offs_m < T)[:, None] & mask_n[None, :])


def launch_config(num_rows: int, N: int, dtype: torch.dtype) -> dict[str, int]:
    """The largest tile that still gives every SM one: 128 x 128 reads least, 32 x 32 is for a single prompt.

    fp32 runs on the CUDA cores, where operands live in registers: a small tile, and a short K.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}
    block = next((b for b in (128, 64) if triton.cdiv(num_rows, b) * triton.cdiv(N, b) >= FILLS_GPU), 32)
    return {
        "BLOCK_M": block, "BLOCK_N": block, "BLOCK_K": 64, "GROUP_M": 8,
        "num_warps": 8 if block == 128 else 4,
        "num_stages": 4,  # three or four tiles of each operand in shared memory: 96 or 128 KB
    }  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, *, activation: Activation, max_programs: int | None = None
) -> Tensor:
    """A linear layer on packed tokens, without synchronising.

    Args:
        x: (T, K) fp16, bf16 or fp32, contiguous.
        weight: (N, K), bias: (N,), contiguous, in the dtype of `x`.
        activation: "none" or "gelu" (the exact one).
        max_programs: at most so many programs, and so SMs; None: one a tile.
    Returns: (T, N) in the dtype of `x`; accumulated in fp32, fp32 inputs without TF32.
    Raises: ValueError: if a shape, dtype, layout, device or activation is not as above, or there is no row.
    """
    if activation not in ("none", "gelu"):
        raise ValueError(f"activation must be 'none' or 'gelu', got {activation!r}")
    num_rows, K = check_matrix("x", x)
    N = bias.numel()
    check_tensor("weight", weight, (N, K), x.dtype, x.device)
    check_tensor("bias", bias, (N,), x.dtype, x.device)
    config = launch_config(num_rows, N, x.dtype)
    tiles = triton.cdiv(num_rows, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    y = torch.empty((num_rows, N), dtype=x.dtype, device=x.device)
    _linear_kernel[(num_programs(tiles, max_programs),)](
        x, weight, bias, y, num_rows, N=N, K=K, GELU=activation == "gelu", **config
    )
    return y


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, activation: Activation, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The same in PyTorch, in float64 or another dtype."""
    z = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    return F.gelu(z) if activation == "gelu" else z
