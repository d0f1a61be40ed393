"""Linear layer, residual and LayerNorm against float64, in one launch and in two, and every error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pars_fast.kernels import linear_layer_norm as module
from pars_fast.kernels.linear_layer_norm import linear_layer_norm, linear_layer_norm_reference

Check = Callable[[Tensor, Tensor, Tensor], None]
EPS = 1e-12  # BERT's
NAMES = ("x", "weight", "bias", "residual", "norm_weight", "norm_bias")


def random_inputs(
    num_rows: int, hidden_size: int, K: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_rows, K), (hidden_size, K), (hidden_size,), (num_rows, hidden_size), (hidden_size,),
              (hidden_size,))  # fmt: skip
    inputs = {
        name: torch.randn(shape, generator=generator) for name, shape in zip(NAMES, shapes, strict=True)
    }
    inputs["weight"] /= K**0.5
    inputs["residual"] += 3.0  # a mean that is not 0 has to be taken off
    return {name: tensor.to(device, dtype) for name, tensor in inputs.items()}


def assert_matches(inputs: dict[str, Any], check: Check) -> None:
    check(
        linear_layer_norm(**inputs, eps=EPS),
        linear_layer_norm_reference(**inputs, eps=EPS, dtype=inputs["x"].dtype),
        linear_layer_norm_reference(**inputs, eps=EPS),
    )


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("fills_gpu", [1, 128], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize("num_rows", [1, 67])
@pytest.mark.parametrize(("hidden_size", "K"), [(384, 96), (96, 384), (400, 100), (16, 24), (768, 64)])
def test_matches_reference(
    hidden_size: int, K: int, num_rows: int, fills_gpu: int, dtype: torch.dtype,
    device: torch.device, assert_as_exact_as: Check, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "FILLS_GPU", fills_gpu)
    assert_matches(random_inputs(num_rows, hidden_size, K, dtype, device), assert_as_exact_as)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.integers(1, 40),
    # Of two or three values that are nearly alike, normalising magnifies the rounding of the sum before it.
    hidden_size=st.integers(8, 130) | st.sampled_from([512, 513]),
    K=st.integers(1, 80),
)
def test_matches_reference_at_any_size(
    num_rows: int, hidden_size: int, K: int, device: torch.device, assert_as_exact_as: Check
) -> None:
    assert_matches(random_inputs(num_rows, hidden_size, K, torch.float32, device), assert_as_exact_as)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("hidden_size", [96, 520], ids=["one launch", "two launches"])
def test_a_capped_grid_gives_the_same_bits(hidden_size: int, device: torch.device) -> None:
    inputs = random_inputs(75, hidden_size, 16, torch.float16, device)
    capped = linear_layer_norm(**inputs, eps=EPS, max_programs=2)
    assert torch.equal(capped, linear_layer_norm(**inputs, eps=EPS))


@pytest.mark.parametrize("hidden_size", [96, 520], ids=["one launch", "two launches"])
def test_eps_is_added_to_the_variance(hidden_size: int, device: torch.device) -> None:
    """A row without variance is its norm_bias, not NaN."""
    inputs = random_inputs(3, hidden_size, 16, torch.float32, device)
    inputs["x"].zero_(), inputs["bias"].zero_(), inputs["residual"].fill_(2.0)
    y = linear_layer_norm(**inputs, eps=1e-5)
    torch.testing.assert_close(y, inputs["norm_bias"].expand_as(y))


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "x dtype": ({"x": torch.zeros(4, 8).int()}, "x must be .* float16, bfloat16 or float32.*int32"),
    "empty": ({"x": torch.zeros(0, 8)}, "an empty batch cannot be scored"),
    "weight shape": ({"weight": torch.zeros(6, 9)}, r"weight must be contiguous \(6, 8\) .* got \(6, 9\)"),
    "residual shape": (
        {"residual": torch.zeros(3, 6)}, r"residual must be contiguous \(4, 6\) .* got \(3, 6\)"
    ),
    "residual strided": (
        {"residual": torch.zeros(6, 4).T}, r"residual must be contiguous .* strides \(1, 4\)"
    ),
    "bias dtype": ({"bias": torch.zeros(6).half()}, r"bias must be contiguous \(6,\) torch.float32"),
    "norm_weight": ({"norm_weight": torch.zeros(5)}, r"norm_weight must be contiguous \(6,\) .* got \(5,\)"),
    "norm_bias": ({"norm_bias": torch.zeros(5)}, r"norm_bias must be contiguous \(6,\) .* got \(5,\)"),
    "device": ({"residual": torch.zeros(4, 6, device="meta")}, "residual must be .* on cpu, got .* on meta"),
    "max_programs": ({"max_programs": -1}, "max_programs must be at least 1 or None, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong(case: str) -> None:
    change, message = ERRORS[case]
    arguments: dict[str, Any] = {
        "x": torch.zeros(4, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6),
        "residual": torch.zeros(4, 6), "norm_weight": torch.zeros(6), "norm_bias": torch.zeros(6), "eps": EPS,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_layer_norm(**(arguments | change))
