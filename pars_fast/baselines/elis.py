"""ELIS's regressor (arXiv 2505.09142): a frozen encoder and eight linear layers.

The paper predicts the tokens that remain, from the prompt and the answer so far, again every 50 tokens. The
length files hold no answers, so this is its first prediction, made from the prompt alone; predicting again
is left open. BGE-base is replaced by the encoder of the other baselines, so that they compare, and the
target is the log of the length, which lasts longer under outliers.
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

HIDDEN = (256,) * 7  # seven and the output: eight linear layers; the paper's widths are not given


class Elis(Baseline):
    name = "elis"
    encoder: FrozenEncoder

    def __init__(self, network: nn.Sequential, encoder: FrozenEncoder) -> None:
        self.network, self.encoder = network, encoder

    @classmethod
    def fit(
        cls, prompts: Sequence[str], log_lengths: NDArray[np.float64], encoder: FrozenEncoder, seed: int
    ) -> Self:
        return cls(fit_mlp(encoder.embed(prompts), log_lengths, HIDDEN, seed), encoder)

    @torch.inference_mode()
    def _score(self, prompts: Sequence[str]) -> Tensor:
        return self.network(torch.from_numpy(self.encoder.embed(prompts)))[:, 0]

    def tensors(self) -> dict[str, Tensor]:
        return mlp_tensors(self.network)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], encoder: FrozenEncoder | None) -> Self:
        if encoder is None:
            raise CheckpointError("elis needs an encoder; its config.json names none")
        return cls(mlp_from_tensors(tensors), encoder)
