"""Pooled score head against float64, on sizes that fit no block, and every error it raises."""

from itertools import accumulate
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pars_fast.kernels.pool_score import pool_score, pool_score_reference

Pooling = Literal["cls", "mean"]

# Inputs are exact in their own dtype and sums are fp32 in all of them, so only the order of addition differs
# from float64: about 2**-24 * sqrt(H * tokens) of sums of size 1. One tolerance therefore serves every dtype.
ATOL = 2e-5
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="bf16 is tested on a GPU only"),
        ],
    ),
]


def packed_inputs(
    lengths: list[int], hidden_size: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(lengths), hidden_size, generator=generator)
    weight = torch.randn(hidden_size, generator=generator) / hidden_size**0.5
    bias = torch.randn(1, generator=generator)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return hidden.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype), cu_seqlens.to(device)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("lengths", [[1], [128], [3, 1, 17], [1, 511, 16, 15]], ids=str)
@pytest.mark.parametrize("hidden_size", [1, 96, 384, 1100])  # 1100: more than one block for cls too
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(
    pooling: Pooling, lengths: list[int], hidden_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = packed_inputs(lengths, hidden_size, dtype, device)
    score = pool_score(*inputs, pooling=pooling)
    assert score.dtype == torch.float32
    torch.testing.assert_close(
        score.double(), pool_score_reference(*inputs, pooling=pooling), atol=ATOL, rtol=1e-5
    )


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    hidden_size=st.integers(1, 300),
    pooling=st.sampled_from(["cls", "mean"]),
)
def test_matches_reference_on_any_batch(
    lengths: list[int], hidden_size: int, pooling: Pooling, device: torch.device
) -> None:
    inputs = packed_inputs(lengths, hidden_size, torch.float32, device)
    expected = pool_score_reference(*inputs, pooling=pooling)
    torch.testing.assert_close(pool_score(*inputs, pooling=pooling).double(), expected, atol=ATOL, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_score_does_not_depend_on_its_batch(pooling: Pooling, device: torch.device) -> None:
    hidden, weight, bias, cu_seqlens = packed_inputs([5, 40, 1], 96, torch.float16, device)
    alone = pool_score(hidden[5:45], weight, bias, cu_seqlens[1:3] - 5, pooling=pooling)
    together = pool_score(hidden, weight, bias, cu_seqlens, pooling=pooling)
    assert torch.equal(alone[0], together[1])


def test_rows_may_be_strided_and_head_may_be_fp32(device: torch.device) -> None:
    hidden, weight, bias, cu_seqlens = packed_inputs([7, 20], 192, torch.float16, device)
    inputs = (hidden[:, :96], weight[:96].float(), bias.float(), cu_seqlens)
    torch.testing.assert_close(
        pool_score(*inputs, pooling="mean").double(),
        pool_score_reference(*inputs, pooling="mean"), atol=ATOL, rtol=1e-5,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's 0 / 0
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_empty_prompt_scores_nan_and_leaves_its_neighbours_alone(
    pooling: Pooling, device: torch.device
) -> None:
    hidden, weight, bias, _ = packed_inputs([3, 4], 96, torch.float32, device)
    cu_seqlens = torch.tensor([0, 3, 3, 7, 7], dtype=torch.int32, device=device)
    score = pool_score(hidden, weight, bias, cu_seqlens, pooling=pooling)
    assert score.isnan().tolist() == [False, True, False, True]


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "pooling": ({"pooling": "max"}, "pooling must be 'cls' or 'mean', got 'max'"),
    "hidden 1-d": ({"hidden": torch.zeros(8)}, r"hidden must be \(total_tokens, H\).*shape \(8,\)"),
    "hidden strided": ({"hidden": torch.zeros(8, 4).T}, r"contiguous last dimension.*strides \(1, 4\)"),
    "hidden dtype": ({"hidden": torch.zeros(4, 8).double()}, "hidden must be float16, .* got torch.float64"),
    "weight dtype": ({"weight": torch.zeros(8).int()}, "weight must be float16, .* got torch.int32"),
    "bias dtype": ({"bias": torch.zeros(1).int()}, "bias must be float16, .* got torch.int32"),
    "weight shape": ({"weight": torch.zeros(9)}, r"weight must be .*\(8,\) to match hidden, got \(9,\)"),
    "bias shape": ({"bias": torch.zeros(2)}, r"bias must be \(1,\), got \(2,\)"),
    "offsets dtype": ({"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens must be .*got \(2,\) torch.int64"),
    "no prompt": ({"cu_seqlens": torch.zeros(1).int()}, "an empty batch cannot be scored"),
    "device": ({"bias": torch.zeros(1, device="meta")}, "one device, got hidden on cpu.*bias on meta"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong(case: str) -> None:
    change, message = ERRORS[case]
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(4, 8), "weight": torch.zeros(8), "bias": torch.zeros(1),
        "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "pooling": "cls",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pool_score(**(arguments | change))
