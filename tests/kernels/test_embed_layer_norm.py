"""Embedding and LayerNorm against float64; rows and prompts that a graph's bucket pads with; errors."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pars_fast.kernels.embed_layer_norm import embed_layer_norm, embed_layer_norm_reference

Check = Callable[[Tensor, Tensor, Tensor], None]
VOCAB, POSITIONS, EPS = 50, 512, 1e-12


def random_inputs(
    lengths: list[int], hidden_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "word": (VOCAB, hidden_size),
        "position": (POSITIONS, hidden_size),
    }
    shapes |= dict.fromkeys(("token_type", "norm_weight", "norm_bias"), (hidden_size,))
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    ids = torch.randint(VOCAB, (sum(lengths),), generator=generator, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    inputs = {"input_ids": ids, "cu_seqlens": cu_seqlens, **weights}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def assert_matches(inputs: dict[str, Any], check: Check) -> None:
    expected = embed_layer_norm_reference(**inputs, eps=EPS)
    check(
        embed_layer_norm(**inputs, eps=EPS)[: len(expected)],
        embed_layer_norm_reference(**inputs, eps=EPS, dtype=inputs["word"].dtype),
        expected,
    )


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(
    ("hidden_size", "lengths"),
    [(96, [511, 512]), (384, [1]), (384, [3, 1, 17]), (768, [1]), (768, [3, 1, 17])],
    ids=str,
)
def test_matches_reference(
    hidden_size: int, lengths: list[int], dtype: torch.dtype, device: torch.device, assert_as_exact_as: Check
) -> None:
    assert_matches(random_inputs(lengths, hidden_size, dtype, device), assert_as_exact_as)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=20).filter(any),
    hidden_size=st.integers(2, 100),
)
def test_every_token_finds_its_prompt(
    lengths: list[int], hidden_size: int, device: torch.device, assert_as_exact_as: Check
) -> None:
    assert_matches(random_inputs(lengths, hidden_size, torch.float32, device), assert_as_exact_as)


@pytest.mark.usefixtures("nan_filled_empty")
def test_rows_past_the_prompts_change_nothing_and_are_finite(
    device: torch.device, assert_as_exact_as: Check
) -> None:
    """More than POSITIONS of them, so that their positions end too."""
    inputs = random_inputs([5, 9, 0, 0], 96, torch.float16, device)
    padding = torch.zeros(POSITIONS + 50, dtype=torch.int32, device=device)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], padding])
    assert_matches(inputs, assert_as_exact_as)
    assert embed_layer_norm(**inputs, eps=EPS).isfinite().all()


@pytest.mark.usefixtures("nan_filled_empty")
def test_ids_outside_the_vocabulary_read_its_ends(device: torch.device) -> None:
    inputs = random_inputs([4], 96, torch.float32, device)
    inputs["input_ids"] = torch.tensor([-1, -(2**31), VOCAB, 2**31 - 1], dtype=torch.int32, device=device)
    clamped = inputs | {"input_ids": inputs["input_ids"].clamp(0, VOCAB - 1)}
    assert torch.equal(embed_layer_norm(**inputs, eps=EPS), embed_layer_norm(**clamped, eps=EPS))


@pytest.mark.usefixtures("nan_filled_empty")
def test_a_capped_grid_gives_the_same_bits(device: torch.device) -> None:
    inputs = random_inputs([40, 3, 70], 384, torch.float16, device)
    capped = embed_layer_norm(**inputs, eps=EPS, max_programs=2)
    assert torch.equal(capped, embed_layer_norm(**inputs, eps=EPS))


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "word dtype": ({"word": torch.zeros(50, 8).double()}, "word must be .* float16, bfloat16 or float32"),
    "word strided": (
        {"word": torch.zeros(8, 50).T},
        r"word must be a contiguous matrix .* strides \(1, 50\)",
    ),
    "ids dtype": ({"input_ids": torch.zeros(4).long()}, "input_ids must be .* torch.int32 .* torch.int64"),
    "ids 2-d": ({"input_ids": torch.zeros(2, 2).int()}, r"input_ids must be contiguous \(4,\).*got \(2, 2\)"),
    "no ids": ({"input_ids": torch.zeros(0).int()}, "an empty batch cannot be scored"),
    "offsets dtype": ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens must be .* torch.int32"),
    "no prompt": ({"cu_seqlens": torch.zeros(1).int()}, "an empty batch cannot be scored"),
    "position": ({"position": torch.zeros(9, 7)}, r"position must be contiguous \(9, 8\) .* got \(9, 7\)"),
    "token_type": ({"token_type": torch.zeros(7)}, r"token_type must be contiguous \(8,\) .* got \(7,\)"),
    "norm_weight": ({"norm_weight": torch.zeros(8).half()}, "norm_weight must be .* got .* torch.float16"),
    "norm_bias": ({"norm_bias": torch.zeros(1, 8)}, r"norm_bias must be .* got \(1, 8\)"),
    "device": ({"norm_bias": torch.zeros(8, device="meta")}, "norm_bias must be .* on cpu, got .* on meta"),
    "max_programs": ({"max_programs": 0}, "max_programs must be at least 1 or None, got 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong(case: str) -> None:
    change, message = ERRORS[case]
    arguments: dict[str, Any] = {
        "input_ids": torch.zeros(4).int(), "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32),
        "word": torch.zeros(50, 8), "position": torch.zeros(9, 8), "token_type": torch.zeros(8),
        "norm_weight": torch.zeros(8), "norm_bias": torch.zeros(8), "eps": EPS,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        embed_layer_norm(**(arguments | change))
