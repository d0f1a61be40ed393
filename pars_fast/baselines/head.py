"""A small network on a frozen encoder, trained by any of the training losses: what a loss is worth by itself.

The encoder's states are computed once, so that a loss is compared with another over many seeds in minutes;
fine-tuning the encoder, which `pars-fast train` does, costs hours.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pars_fast.baselines.base import Baseline
from pars_fast.baselines.encoder import FrozenEncoder
from pars_fast.baselines.mlp import fit_mlp, mlp_from_tensors, mlp_tensors
from pars_fast.errors import CheckpointError
from pars_fast.losses import LOSSES

HIDDEN = (256,)


class Head(Baseline):
    name = "head"
    encoder: FrozenEncoder

    def __init__(self, network: nn.Sequential, encoder: FrozenEncoder) -> None:
        self.network, self.encoder = network, encoder

    @classmethod
    def fit(
        cls,
        prompts: Sequence[str],
        log_lengths: NDArray[np.float64],
        encoder: FrozenEncoder,
        seed: int,
        *,
        loss: str,
    ) -> Self:
        """`loss` is a name in `LOSSES`."""
        return cls(fit_mlp(encoder.embed(prompts), log_lengths, HIDDEN, seed, LOSSES[loss]), encoder)

    @torch.inference_mode()
    def _score(self, prompts: Sequence[str]) -> Tensor:
        return self.network(torch.from_numpy(self.encoder.embed(prompts)))[:, 0]

    def tensors(self) -> dict[str, Tensor]:
        return mlp_tensors(self.network)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], encoder: FrozenEncoder | None) -> Self:
        if encoder is None:
            raise CheckpointError("a head needs an encoder; its config.json names none")
        return cls(mlp_from_tensors(tensors), encoder)
