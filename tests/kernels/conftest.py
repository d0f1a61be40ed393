"""`device`: each kernel test runs on the CPU through Triton's interpreter, or on the GPU where there is one.

The interpreter itself is switched on in tests/conftest.py: by the time this file is read, other tests may
have imported Triton.
"""

import pytest
import torch

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
