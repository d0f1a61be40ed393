"""`device`: each kernel test runs on the CPU through Triton's interpreter, or on the GPU where there is one.

The interpreter itself is switched on in tests/conftest.py: by the time this file is read, other tests may
have imported Triton.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if HAS_GPU else "cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN (floats) or a number no kernel writes (ints), so an unwritten element shows."""
    empty = torch.empty

    def filled_empty(*args: object, **kwargs: object) -> torch.Tensor:
        tensor: torch.Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 123_456_789)

    monkeypatch.setattr(torch, "empty", filled_empty)


@pytest.fixture(
    params=[
        torch.float32,
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not HAS_GPU, reason="the interpreter multiplies bf16 wrongly"),
            ],
        ),
    ],
    ids=str,
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def assert_as_exact_as() -> Callable[[Tensor, Tensor, Tensor], None]:
    """The error against float64, root mean square, is at most 1.5 times that of PyTorch in the same dtype.

    Where PyTorch happens to be nearly exact, one unit in the last place is allowed.
    """

    def rms(tensor: Tensor) -> float:
        return tensor.double().square().mean().sqrt().item()

    def check(actual: Tensor, torch_result: Tensor, reference: Tensor) -> None:
        assert (actual.shape, actual.dtype) == (reference.shape, torch_result.dtype)
        allowed = 1.5 * rms(torch_result - reference) + torch.finfo(actual.dtype).eps * rms(reference)
        assert rms(actual - reference) <= allowed
        # And no single element is far off, which a mean over many would hide.
        torch.testing.assert_close(actual.double(), reference, atol=50 * allowed, rtol=0)

    return check
