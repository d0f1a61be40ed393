"""Linear layers in bf16 on a CPU that multiplies it natively (AVX512-BF16, AMX); all else stays in fp32.

Products of bf16 numbers are summed in fp32 and rounded once, as the GPU's kernels do. Weights are rounded
once, when the copy is made. docs/kernels.md has what it gains and what it costs in order.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pars_fast.model import ScoreModel


@cache
def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32; elsewhere it would be emulated."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class Bf16Linear(nn.Module):
    """(..., K) fp32 -> (..., N) fp32; `weight` (N, K) and `bias` are the original's, for who computes with
    them otherwise."""

    def __init__(self, exact: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.weight, self.bias = exact.in_features, exact.weight, exact.bias
        self.rounded = exact.weight.detach().bfloat16(), exact.bias.detach().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), *self.rounded).float()


class Bf16Products:
    """A model's copy for scoring, which shares all weights but those that it has rounded.

    Attributes:
        model: the copy.
    """

    def __init__(self, exact: ScoreModel) -> None:
        self._state = _state(exact)
        self.model = with_linears(exact, Bf16Linear)

    def is_of(self, exact: ScoreModel) -> bool:
        """Whether the copy is of these weights as they are now."""
        return self._state == _state(exact)


def with_linears(exact: ScoreModel, make: Callable[[nn.Linear], nn.Module]) -> ScoreModel:
    """A copy whose encoder has others in place of its linear layers; all weights are shared."""
    copy = deepcopy(exact, {id(parameter): parameter for parameter in exact.parameters()})
    for module in list(copy.encoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, make(child))
    return copy


def _state(model: ScoreModel) -> list[tuple[int, int]]:
    """Changes with every weight that is replaced, or changed in place."""
    return [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]
