"""The end of both halves of a layer: y = LayerNorm(x weight^T + bias + residual)

LayerNorm(z) = (z - mean(z)) / sqrt(var(z) + eps) * norm_weight + norm_bias, biased variance, over a row of H.

H <= 512: one launch. A program owns BLOCK_M whole rows, so z stays in fp32 accumulators and both sums of
LayerNorm need no second program. A tile's side is a power of two and 384 is not, so a row is two tiles,
LEFT = 256 and RIGHT = 128 wide: no lane is wasted, where one tile of 512 would waste a quarter of the work.
Above (768, 1024): two launches, a linear layer and then residual and LayerNorm. 64 rows of 768 would be 192
accumulators a thread in 8 warps, too many; 32 rows do 31 FLOPs for a byte they read from L2 (in 16 bits
BLOCK_M * H / (BLOCK_M + H)), where 64 rows of 384 do 55 and the 128 x 128 tiles of the linear layer 64.

2 H K FLOPs a token, and about 10 H for the rest. Bytes: T (K + 2 H) + H K elements if each crosses HBM once;
two launches add 2 T H. At H = 384 in 16 bits the projection after attention is 0.29 MFLOP and 2.3 KB a token,
the narrowing of the inner layer (K = 1536) 1.18 MFLOP and 4.6 KB: 128 and 256 FLOPs a byte for a large T, on
either side of the ridge of 180 (H200, bf16).

Source: Devlin et al. 2019 (arXiv 1810.04805); Ba, Kiros, Hinton 2016 (arXiv 1607.06450); whole rows a
program, as in flash-attention's ops/triton/layer_norm.py.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# A kernel's arguments have Triton's types, not Python's; the comments beside them say which.

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pars_fast.kernels.launch import check_matrix, check_tensor, num_programs
from pars_fast.kernels.linear import FILLS_GPU, linear, linear_reference

MIN_FUSED, MAX_FUSED = 32, 512  # a tile of tl.dot is at least 16 wide, and a row is two of them


@triton.jit
def _columns(ptr, offs_n, mask_n):
    """A vector of H as a row of fp32."""
    return tl.load(ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["T"])
def _linear_layer_norm_kernel(
    x_ptr,  # (T, K)
    weight_ptr,  # (H, K)
    bias_ptr,  # (H,)
    residual_ptr,  # (T, H)
    norm_weight_ptr,  # (H,)
    norm_bias_ptr,  # (H,)
    y_ptr,  # (T, H), out
    T,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_k = tl.arange(0, BLOCK_K)
    left = tl.arange(0, LEFT)
    right = LEFT + tl.arange(0, RIGHT)
    mask_left = left < H
    mask_right = right < H
    weight_left = weight_ptr + left[None, :] * K + offs_k[:, None]
    weight_right = weight_ptr + tl.minimum(right, H - 1)[None, :] * K + offs_k[:, None]
    for tile in range(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.num_programs(0)):
        # One 64-bit address a tile and 32-bit offsets in it: 64-bit ones for each element would spill. Rows
        # past the end are read as the last one and not stored: cheaper than masks in the loop.
        first = tl.full([], tile * BLOCK_M, tl.int64)
        offs_m = tl.arange(0, BLOCK_M)
        rows = tl.minimum(offs_m, T - 1 - tile * BLOCK_M)[:, None]
        x = x_ptr + first * K + rows * K + offs_k[None, :]
        z_left = tl.zeros([BLOCK_M, LEFT], dtype=tl.float32)
        z_right = tl.zeros([BLOCK_M, RIGHT], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                x_tile = tl.load(x + k)
                w_left = tl.load(weight_left + k)
                w_right = tl.load(weight_right + k)
            else:
                x_tile = tl.load(x + k, mask=offs_k[None, :] < K - k, other=0.0)
                w_left = tl.load(weight_left + k, mask=offs_k[:, None] < K - k, other=0.0)
                w_right = tl.load(weight_right + k, mask=offs_k[:, None] < K - k, other=0.0)
            z_left = tl.dot(x_tile, w_left, z_left, input_precision="ieee")
            z_right = tl.dot(x_tile, w_right, z_right, input_precision="ieee")

        residual = residual_ptr + first * H
        z_left += tl.load(residual + (rows * H + left[None, :])).to(tl.float32)
        z_left += _columns(bias_ptr, left, mask_left)
        offs_right = rows * H + right[None, :]
        z_right += tl.load(residual + offs_right, mask=mask_right[None, :], other=0.0).to(tl.float32)
        z_right += _columns(bias_ptr, right, mask_right)
        z_right = tl.where(mask_right[None, :], z_right, 0.0)

        mean = (tl.sum(z_left, axis=1) + tl.sum(z_right, axis=1))[:, None] / H
        z_left -= mean
        z_right = tl.where(mask_right[None, :], z_right - mean, 0.0)
        variance = (tl.sum(z_left * z_left, axis=1) + tl.sum(z_right * z_right, axis=1))[:, None] / H
        scale = tl.rsqrt(variance + eps)
        z_left = z_left * scale * _columns(norm_weight_ptr, left, mask_left)
        z_left += _columns(norm_bias_ptr, left, mask_left)
        z_right = z_right * scale * _columns(norm_weight_ptr, right, mask_right)
        z_right += _columns(norm_bias_ptr, right, mask_right)

        y = y_ptr + first * H
        inside = (offs_m < T - tile * BLOCK_M)[:, None]
        tl.store(y + (rows * H + left[None, :]), z_left.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y + offs_right, z_right.to(y_ptr.dtype.element_ty), mask=inside & mask_right[None, :])


@triton.jit(do_not_specialize=["T"])
def _residual_layer_norm_kernel(
    z_ptr,  # (T, H)
    residual_ptr,  # (T, H)
    norm_weight_ptr,  # (H,)
    norm_bias_ptr,  # (H,)
    y_ptr,  # (T, H), out
    T,
    eps,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    norm_weight = _columns(norm_weight_ptr, offs_h, mask_h)
    norm_bias = _columns(norm_bias_ptr, offs_h, mask_h)
    for tile in range(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.num_programs(0)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        offs = offs_m.to(tl.int64)[:, None] * H + offs_h[None, :]
        mask = (offs_m < T)[:, None] & mask_h[None, :]
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(z, axis=1)[:, None] / H
        z = tl.where(mask_h[None, :], z - mean, 0.0)
        scale = tl.rsqrt(tl.sum(z * z, axis=1)[:, None] / H + eps)
        y = z * scale * norm_weight + norm_bias
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def launch_config(num_rows: int, hidden_size: int, dtype: torch.dtype) -> dict[str, int]:
    """The row's two tiles, and the most rows that spill no register; see bench/results/aot_compile.csv."""
    LEFT = triton.next_power_of_2(hidden_size) // 2
    RIGHT = max(16, triton.next_power_of_2(hidden_size - LEFT))
    if dtype == torch.float32:  # on the CUDA cores operands live in registers
        return {"BLOCK_M": 16, "LEFT": LEFT, "RIGHT": RIGHT, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    BLOCK_M = next((rows for rows in (64, 32) if triton.cdiv(num_rows, rows) >= FILLS_GPU), 16)
    return {
        "BLOCK_M": BLOCK_M, "LEFT": LEFT, "RIGHT": RIGHT, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3
    }  # fmt: skip


def norm_launch_config(hidden_size: int) -> dict[str, int]:
    """2048 elements a program in 4 warps: 16 fp32 a thread."""
    BLOCK_H = triton.next_power_of_2(hidden_size)
    return {"BLOCK_M": max(1, 2048 // BLOCK_H), "BLOCK_H": BLOCK_H, "num_warps": 4}


def linear_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    max_programs: int | None = None,
) -> Tensor:
    """Linear layer, residual and LayerNorm on packed tokens, without synchronising.

    Args:
        x: (T, K) fp16, bf16 or fp32, contiguous.
        weight: (H, K), residual: (T, H), bias, norm_weight, norm_bias: (H,), contiguous, in the dtype of `x`.
        eps: added to the variance.
        max_programs: at most so many programs, and so SMs; None: one a tile.
    Returns: (T, H) in the dtype of `x`; accumulated in fp32, fp32 inputs without TF32. Above H = 512 the
        product with bias is rounded to the dtype of `x` before the residual is added.
    Raises: ValueError: if a shape, dtype, layout or device is not as above, or the batch is empty.
    """
    num_rows, K = check_matrix("x", x)
    hidden_size = bias.numel()
    check_tensor("weight", weight, (hidden_size, K), x.dtype, x.device)
    check_tensor("residual", residual, (num_rows, hidden_size), x.dtype, x.device)
    for name, tensor in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_tensor(name, tensor, (hidden_size,), x.dtype, x.device)
    y = torch.empty((num_rows, hidden_size), dtype=x.dtype, device=x.device)
    if MIN_FUSED <= hidden_size <= MAX_FUSED:
        config = launch_config(num_rows, hidden_size, x.dtype)
        tiles = triton.cdiv(num_rows, config["BLOCK_M"])
        _linear_layer_norm_kernel[(num_programs(tiles, max_programs),)](
            x, weight, bias, residual, norm_weight, norm_bias, y, num_rows, eps, H=hidden_size, K=K, **config
        )
        return y
    z = linear(x, weight, bias, activation="none", max_programs=max_programs)
    config = norm_launch_config(hidden_size)
    tiles = triton.cdiv(num_rows, config["BLOCK_M"])
    _residual_layer_norm_kernel[(num_programs(tiles, max_programs),)](
        z, residual, norm_weight, norm_bias, y, num_rows, eps, H=hidden_size, **config
    )
    return y


def linear_layer_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The same in PyTorch, in float64 or another dtype."""
    z = linear_reference(x, weight, bias, activation="none", dtype=dtype) + residual.to(dtype)
    return F.layer_norm(z, z.shape[1:], norm_weight.to(dtype), norm_bias.to(dtype), eps)
