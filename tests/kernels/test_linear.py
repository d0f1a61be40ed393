"""Linear layer against float64, on sizes that fit no tile, and every error it raises."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pars_fast.kernels import linear as module
from pars_fast.kernels.linear import Activation, launch_config, linear, linear_reference

Check = Callable[[Tensor, Tensor, Tensor], None]


def random_inputs(
    num_rows: int, N: int, K: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((num_rows, K), (N, K), (N,)))
    return x.to(device, dtype), (weight / K**0.5).to(device, dtype), bias.to(device, dtype)


def assert_matches(inputs: tuple[Tensor, Tensor, Tensor], activation: Activation, check: Check) -> None:
    check(
        linear(*inputs, activation=activation),
        linear_reference(*inputs, activation=activation, dtype=inputs[0].dtype),
        linear_reference(*inputs, activation=activation),
    )


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("fills_gpu", [1, 128], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize(("num_rows", "N", "K"), [(1, 96, 384), (33, 200, 96), (130, 130, 100)])
def test_matches_reference(
    num_rows: int, N: int, K: int, fills_gpu: int, activation: Activation, dtype: torch.dtype,
    device: torch.device, assert_as_exact_as: Check, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "FILLS_GPU", fills_gpu)
    assert_matches(random_inputs(num_rows, N, K, dtype, device), activation, assert_as_exact_as)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(("N", "K"), [(1152, 384), (768, 3072)])
def test_matches_reference_at_the_rankers_sizes(
    N: int, K: int, device: torch.device, assert_as_exact_as: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILLS_GPU", 1)
    assert_matches(random_inputs(3, N, K, torch.float16, device), "gelu", assert_as_exact_as)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_rows=st.integers(1, 70), N=st.integers(1, 90), K=st.integers(1, 150), half=st.booleans())
def test_matches_reference_at_any_size(
    num_rows: int, N: int, K: int, half: bool, device: torch.device, assert_as_exact_as: Check
) -> None:
    inputs = random_inputs(num_rows, N, K, torch.float16 if half else torch.float32, device)
    assert_matches(inputs, "gelu", assert_as_exact_as)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("max_programs", [1, 4, 1000])
def test_a_capped_grid_gives_the_same_bits(
    max_programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than GROUP_M rows of tiles, so that the last group is a short one."""
    inputs = random_inputs(32 * 9 + 1, 70, 16, torch.float16, device)
    capped = linear(*inputs, activation="gelu", max_programs=max_programs)
    assert torch.equal(capped, linear(*inputs, activation="gelu"))


def test_one_prompt_is_spread_over_the_gpu_and_a_batch_takes_large_tiles() -> None:
    assert launch_config(128, 1152, torch.float16)["BLOCK_M"] == 32
    assert launch_config(16384, 1152, torch.float16)["BLOCK_M"] == 128


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"activation": "relu"}, "activation must be 'none' or 'gelu', got 'relu'"),
    "x 1-d": ({"x": torch.zeros(8)}, r"x must be a contiguous matrix .* got shape \(8,\)"),
    "x strided": ({"x": torch.zeros(8, 4).T}, r"x must be a contiguous matrix .* strides \(1, 4\)"),
    "x dtype": ({"x": torch.zeros(4, 8).double()}, "x must be .* float16, bfloat16 or float32.*float64"),
    "empty": ({"x": torch.zeros(0, 8)}, "an empty batch cannot be scored"),
    "weight shape": (
        {"weight": torch.zeros(6, 9)}, r"weight must be contiguous \(6, 8\) .* got \(6, 9\)"
    ),
    "weight dtype": ({"weight": torch.zeros(6, 8).half()}, "weight must be .*float32.* got .* torch.float16"),
    "weight strided": ({"weight": torch.zeros(8, 6).T}, r"weight must be contiguous .* strides \(1, 6\)"),
    "bias shape": ({"bias": torch.zeros(2, 3)}, r"bias must be contiguous \(6,\) .* got \(2, 3\)"),
    "device": ({"bias": torch.zeros(6, device="meta")}, "bias must be .* on cpu, got .* on meta"),
    "max_programs": ({"max_programs": 0}, "max_programs must be at least 1 or None, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong(case: str) -> None:
    change, message = ERRORS[case]
    arguments: dict[str, Any] = {
        "x": torch.zeros(4, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6), "activation": "none"
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear(**(arguments | change))
