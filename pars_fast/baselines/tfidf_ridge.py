"""TF-IDF of words and characters, and ridge regression on log length.

Terms are hashed (Weinberger et al. 2009), so that no vocabulary has to be kept: 2^18 buckets of words and
word pairs, as many of runs of 3 to 5 characters. Source of the weighting: scikit-learn's TfidfTransformer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pars_fast.baselines.base import Baseline
from pars_fast.baselines.encoder import FrozenEncoder
from pars_fast.errors import require_extra

BUCKETS = 2**18
MAX_CHARS = 2000  # bounds the cost of a prompt
ALPHA = 1.0


class TfidfRidge(Baseline):
    """`idf` and `weight` are (2 * BUCKETS,) float32, words first; `bias` is a float, in log tokens."""

    name = "tfidf_ridge"

    def __init__(self, idf: NDArray[np.float32], weight: NDArray[np.float32], bias: float) -> None:
        self.idf, self.weight, self.bias = idf, weight, bias

    @classmethod
    def fit(cls, prompts: Sequence[str], log_lengths: NDArray[np.float64]) -> Self:
        """Raises: MissingExtraError: without scikit-learn."""
        linear_model = require_extra("sklearn.linear_model", "train")
        counts = _counts(prompts)
        seen = np.bincount(counts.indices, minlength=counts.shape[1])  # prompts that hold a term
        idf = (np.log((1 + len(prompts)) / (1 + seen)) + 1).astype(np.float32)
        ridge = linear_model.Ridge(alpha=ALPHA, solver="sparse_cg", tol=1e-4)
        ridge.fit(_weighted(counts, idf), log_lengths)
        return cls(idf, ridge.coef_.astype(np.float32), float(ridge.intercept_))

    def _score(self, prompts: Sequence[str]) -> Tensor:
        scores = _weighted(_counts(prompts), self.idf) @ self.weight + self.bias
        return torch.from_numpy(np.asarray(scores, dtype=np.float32))

    def tensors(self) -> dict[str, Tensor]:
        return {
            "idf": torch.from_numpy(self.idf),
            "weight": torch.from_numpy(self.weight),
            "bias": torch.tensor([self.bias]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], encoder: FrozenEncoder | None) -> Self:
        return cls(tensors["idf"].numpy(), tensors["weight"].numpy(), float(tensors["bias"]))


def _counts(prompts: Sequence[str]) -> Any:
    """(B,) prompts -> (B, 2 * BUCKETS) sparse term counts, damped by log(1 + n)."""
    import scipy.sparse

    text = require_extra("sklearn.feature_extraction.text", "train")
    common = {"n_features": BUCKETS, "alternate_sign": False, "norm": None, "dtype": np.float32}
    words = text.HashingVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", **common)
    characters = text.HashingVectorizer(analyzer="char", ngram_range=(3, 5), **common)
    heads = [prompt[:MAX_CHARS] for prompt in prompts]
    counts = scipy.sparse.hstack([words.transform(heads), characters.transform(heads)], format="csr")
    counts.data = np.log1p(counts.data)
    return counts


def _weighted(counts: Any, idf: NDArray[np.float32]) -> Any:
    """Counts times idf, each row of unit length."""
    preprocessing = require_extra("sklearn.preprocessing", "train")
    return preprocessing.normalize(counts.multiply(idf[None, :]).tocsr())
