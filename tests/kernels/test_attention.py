"""Attention against float64; rows and prompts that a graph's bucket pads with; errors."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pars_fast.kernels.attention import attention, attention_reference

Check = Callable[[Tensor, Tensor, Tensor], None]


def random_inputs(
    lengths: list[int], num_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = 2 * torch.randn(sum(lengths), 3 * num_heads * head_size, generator=generator)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return qkv.to(device, dtype), cu_seqlens.to(device)


def assert_matches(qkv: Tensor, cu_seqlens: Tensor, num_heads: int, max_seqlen: int, check: Check) -> None:
    expected = attention_reference(qkv, cu_seqlens, num_heads=num_heads)
    check(
        attention(qkv, cu_seqlens, num_heads=num_heads, max_seqlen=max_seqlen)[: len(expected)],
        attention_reference(qkv, cu_seqlens, num_heads=num_heads, dtype=qkv.dtype),
        expected,
    )


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("lengths", [[1], [3, 1, 67], [129]], ids=str)
@pytest.mark.parametrize(("num_heads", "head_size"), [(3, 32), (1, 64), (4, 8), (2, 48)])
def test_matches_reference(
    lengths: list[int], num_heads: int, head_size: int, dtype: torch.dtype, device: torch.device,
    assert_as_exact_as: Check,
) -> None:  # fmt: skip
    inputs = random_inputs(lengths, num_heads, head_size, dtype, device)
    assert_matches(*inputs, num_heads, max(lengths), assert_as_exact_as)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("head_size", [32, 64])
def test_matches_reference_at_the_longest_prompts(
    head_size: int, device: torch.device, assert_as_exact_as: Check
) -> None:
    inputs = random_inputs([511, 512], 1, head_size, torch.float16, device)
    assert_matches(*inputs, 1, 512, assert_as_exact_as)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(any),
    num_heads=st.integers(1, 2),
    head_size=st.integers(1, 70),
    slack=st.integers(0, 100),
)
def test_matches_reference_on_any_batch(
    lengths: list[int], num_heads: int, head_size: int, slack: int,
    device: torch.device, assert_as_exact_as: Check,
) -> None:  # fmt: skip
    inputs = random_inputs(lengths, num_heads, head_size, torch.float32, device)
    assert_matches(*inputs, num_heads, max(lengths) + slack, assert_as_exact_as)


@pytest.mark.usefixtures("nan_filled_empty")
def test_rows_past_the_prompts_are_neither_read_nor_written(
    device: torch.device, assert_as_exact_as: Check
) -> None:
    qkv, cu_seqlens = random_inputs([5, 40, 0, 0], 2, 32, torch.float16, device)
    padding = torch.full((30, 192), torch.nan, dtype=qkv.dtype, device=device)
    qkv = torch.cat([qkv, padding])
    assert_matches(qkv, cu_seqlens, 2, 512, assert_as_exact_as)
    out = attention(qkv, cu_seqlens, num_heads=2, max_seqlen=512)
    assert out[45:].isnan().all()  # as torch.empty left them


def test_large_scores_do_not_overflow(device: torch.device, assert_as_exact_as: Check) -> None:
    """Without taking the maximum off, exp would be infinite."""
    qkv, cu_seqlens = random_inputs([70], 1, 32, torch.float32, device)
    qkv[:, :64] *= 20
    assert_matches(qkv, cu_seqlens, 1, 70, assert_as_exact_as)


@pytest.mark.usefixtures("nan_filled_empty")
def test_a_capped_grid_gives_the_same_bits(device: torch.device) -> None:
    qkv, cu_seqlens = random_inputs([70, 1, 20], 2, 32, torch.float16, device)
    whole, capped = (
        attention(qkv, cu_seqlens, num_heads=2, max_seqlen=70, max_programs=limit) for limit in (None, 5)
    )
    assert torch.equal(whole, capped)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "qkv dtype": ({"qkv": torch.zeros(4, 96).double()}, "qkv must be .* float16, bfloat16 or float32"),
    "qkv strided": ({"qkv": torch.zeros(96, 4).T}, r"qkv must be a contiguous matrix .* strides \(1, 4\)"),
    "empty": ({"qkv": torch.zeros(0, 96)}, "an empty batch cannot be scored"),
    "width": ({"qkv": torch.zeros(4, 90)}, r"3 \* num_heads \* head size wide, got 90 for 4 heads"),
    "no head": ({"num_heads": 0}, "got 96 for 0 heads"),
    "head size": ({"qkv": torch.zeros(4, 774), "num_heads": 2}, "head size must be at most 128, got 129"),
    "max_seqlen": ({"max_seqlen": 0}, "max_seqlen must be at least 1, got 0"),
    "offsets dtype": ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens must be .* torch.int32"),
    "no prompt": ({"cu_seqlens": torch.zeros(1).int()}, "an empty batch cannot be scored"),
    "device": ({"cu_seqlens": torch.zeros(2, device="meta").int()}, "on cpu, got .* on meta"),
    "max_programs": ({"max_programs": 0}, "max_programs must be at least 1 or None, got 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong(case: str) -> None:
    change, message = ERRORS[case]
    arguments: dict[str, Any] = {
        "qkv": torch.zeros(4, 96), "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32),
        "num_heads": 4, "max_seqlen": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        attention(**(arguments | change))
