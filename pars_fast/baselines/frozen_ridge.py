"""Ridge regression on a frozen encoder's mean-pooled states.

A linear map of a pooled state is just what a score head is, so the result is an ordinary ranker with an
encoder that was never trained on lengths, and runs wherever rankers do.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pars_fast.baselines.encoder import FrozenEncoder
from pars_fast.errors import require_extra
from pars_fast.ranker import Ranker

ALPHAS = tuple(10.0**power for power in range(-2, 5))


def fit_frozen_ridge(
    prompts: Sequence[str], log_lengths: NDArray[np.float64], encoder: FrozenEncoder
) -> Ranker:
    """A ranker whose score head is the ridge; its strength is chosen by leave-one-out on these prompts.

    Raises: MissingExtraError: without scikit-learn.
    """
    linear_model = require_extra("sklearn.linear_model", "train")
    features = encoder.embed(prompts).astype(np.float64)
    centre, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    ridge = linear_model.RidgeCV(alphas=ALPHAS).fit((features - centre) / spread, log_lengths)
    weight = ridge.coef_ / spread
    ranker = Ranker.from_encoder(encoder.directory, pooling="mean", max_tokens=encoder.ranker.max_tokens)
    with torch.no_grad():
        ranker.model.score_head.weight.copy_(torch.from_numpy(weight)[None])
        ranker.model.score_head.bias.fill_(float(ridge.intercept_ - weight @ centre))
    return ranker
