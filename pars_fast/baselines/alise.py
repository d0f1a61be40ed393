"""ALISE's predictor (arXiv 2410.23537): lengths of the nearest stored prompts, a network when none is near.

The paper leaves open how near is near and how many neighbours count; both are set here. Its embedding model
is replaced by the encoder of the other baselines, so that they compare.
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

NEIGHBOURS = 8
MIN_SIMILARITY = 0.7  # cosine
HIDDEN = (256, 64)


class Alise(Baseline):
    """`stored` is (N, H) float16 of unit length, `log_lengths` (N,) float32 of the same prompts."""

    name = "alise"
    encoder: FrozenEncoder

    def __init__(
        self, stored: Tensor, log_lengths: Tensor, network: nn.Sequential, encoder: FrozenEncoder
    ) -> None:
        self.stored, self.log_lengths, self.network, self.encoder = stored, log_lengths, network, encoder

    @classmethod
    def fit(
        cls, prompts: Sequence[str], log_lengths: NDArray[np.float64], encoder: FrozenEncoder, seed: int
    ) -> Self:
        features = encoder.embed(prompts)
        network = fit_mlp(features, log_lengths, HIDDEN, seed)
        stored = nn.functional.normalize(torch.from_numpy(features)).half()
        return cls(stored, torch.from_numpy(log_lengths.astype(np.float32)), network, encoder)

    @torch.inference_mode()
    def _score(self, prompts: Sequence[str]) -> Tensor:
        features = torch.from_numpy(self.encoder.embed(prompts))
        similarity = nn.functional.normalize(features) @ self.stored.float().T
        nearest = similarity.topk(min(NEIGHBOURS, len(self.stored)))
        weight = nearest.values * (nearest.values >= MIN_SIMILARITY)
        recalled = (weight * self.log_lengths[nearest.indices]).sum(dim=1) / weight.sum(dim=1)
        return torch.where(weight.sum(dim=1) > 0, recalled, self.network(features)[:, 0])

    def tensors(self) -> dict[str, Tensor]:
        return {"stored": self.stored, "log_lengths": self.log_lengths, **mlp_tensors(self.network)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], encoder: FrozenEncoder | None) -> Self:
        if encoder is None:
            raise CheckpointError("alise needs an encoder; its config.json names none")
        return cls(tensors["stored"], tensors["log_lengths"], mlp_from_tensors(tensors), encoder)
