"""A longer prompt has a longer answer: the order that costs nothing."""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from pars_fast.baselines.base import Baseline
from pars_fast.baselines.encoder import FrozenEncoder


class PromptLength(Baseline):
    """Score: log of the prompt's characters."""

    name = "prompt_length"

    def _score(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([len(prompt) for prompt in prompts], dtype=torch.float32).log()

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], encoder: FrozenEncoder | None) -> Self:
        return cls()
