"""What the encoder's launchers share. None of it waits for the GPU: tensors' contents are not looked at."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raises: ValueError: unless the tensor is contiguous and has this shape, dtype and device."""
    if (
        tensor.shape != shape
        or tensor.dtype != dtype
        or tensor.device != device
        or not tensor.is_contiguous()
    ):
        layout = "contiguous" if tensor.is_contiguous() else f"with strides {tensor.stride()}"
        raise ValueError(
            f"{name} must be contiguous {shape} {dtype} on {device}, "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, {layout}"
        )


def check_matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    """The shape of an op's first operand.

    Raises: ValueError: unless it is a contiguous matrix of floats that is not empty.
    """
    if tensor.dim() != 2 or not tensor.is_contiguous() or tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be a contiguous matrix of float16, bfloat16 or float32, got shape "
            f"{tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}"
        )
    if 0 in tensor.shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}: an empty batch cannot be scored")
    return tensor.shape[0], tensor.shape[1]


def count_prompts(cu_seqlens: Tensor, device: torch.device) -> int:
    """B. Raises: ValueError: unless `cu_seqlens` is contiguous (B + 1,) int32 on `device`, with B >= 1."""
    check_tensor("cu_seqlens", cu_seqlens, (cu_seqlens.numel(),), torch.int32, device)
    if len(cu_seqlens) < 2:
        raise ValueError("cu_seqlens describes no prompt: an empty batch cannot be scored")
    return len(cu_seqlens) - 1


def num_programs(tiles: int, max_programs: int | None) -> int:
    """Programs of a persistent grid: one a tile, or `max_programs`, which then take several tiles each.

    A program lives on one SM, so `max_programs` bounds the SMs a kernel takes from whatever runs beside it.

    Raises: ValueError: if `max_programs` is not positive.
    """
    if max_programs is None:
        return tiles
    if max_programs < 1:
        raise ValueError(f"max_programs must be at least 1 or None, got {max_programs}")
    return min(tiles, max_programs)
