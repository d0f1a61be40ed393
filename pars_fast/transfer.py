"""Does a ranker that learnt one model's lengths order another's, and one set's another set's?

Answered with a predictor cheap enough to be trained for every cell: ridge regression on a frozen encoder's
mean-pooled states and the log of the prompt's characters. What carries over for it is in the data; PARS
(arXiv 2510.03243) claims that it does across models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pars_fast.baselines.encoder import FrozenEncoder
from pars_fast.baselines.frozen_ridge import ALPHAS
from pars_fast.benchmark import held_out_rows, mean_tau
from pars_fast.data import CONSENSUS, LengthFile, LengthRow, distinct_prompts, label_prompts
from pars_fast.errors import DataError, require_extra
from pars_fast.metrics import kendall_tau

Floats = NDArray[np.float64]
MIN_ANSWERED = 0.95  # a model that answered fewer of a file's prompts is left out


@dataclass(frozen=True, slots=True)
class ModelTransfer:
    """Cells are tau-b, rows what is learnt from, columns what is measured.

    `tau[i][j]`: trained on model i, measured on model j. `own_tau[i][j]`: model i's real lengths as the score
    for model j, what a perfect predictor of model i would get. `others[j]`: trained on the consensus of all
    models but j. `held_out` are the rows that were measured, `scores` (rows, models) what each model's
    predictor gives them, in log tokens.
    """

    models: list[str]
    train_prompts: int
    test_prompts: int
    tau: list[list[float]]
    own_tau: list[list[float]]
    others: list[float]
    held_out: LengthFile
    scores: Floats

    def cells(self) -> dict[str, Any]:
        """All but the rows and their scores."""
        names = ("models", "train_prompts", "test_prompts", "tau", "own_tau", "others")
        return {name: getattr(self, name) for name in names}


def across_models(file: LengthFile, encoder: FrozenEncoder, max_models: int = 12) -> ModelTransfer:
    """All models of one file, trained and measured on the same prompts: those that all of them answered.

    Raises: DataError: if fewer than two models answered nearly all prompts, or too few prompts are left.
    """
    held_out, _ = held_out_rows(file)
    training = file.select("train").rows
    models = [
        model
        for model in file.models
        if all(_share(model, rows) >= MIN_ANSWERED for rows in (training, held_out))
    ][:max_models]
    training, held_out = (
        tuple(row for row in rows if all(model in row.output_tokens for model in models))
        for rows in (training, held_out)
    )
    if len(models) < 2 or min(len(training), len(held_out)) < 20:
        raise DataError(f"{file.path}: not two models with 20 prompts in common to train on, and to measure")
    lengths, measured = (
        np.log([[row.output_tokens[model] for model in models] for row in rows])
        for rows in (training, held_out)
    )
    centred = lengths - lengths.mean(axis=0)
    without = np.stack([np.delete(centred, j, axis=1).mean(axis=1) for j in range(len(models))], axis=1)
    targets = np.hstack([lengths, without])
    scores = _fit_and_score(
        encoder, [row.prompt for row in training], targets, [row.prompt for row in held_out]
    )
    count = len(models)
    return ModelTransfer(
        models,
        len(training),
        len(held_out),
        [[kendall_tau(scores[:, i], measured[:, j]) for j in range(count)] for i in range(count)],
        [[kendall_tau(measured[:, i], measured[:, j]) for j in range(count)] for i in range(count)],
        [kendall_tau(scores[:, count + j], measured[:, j]) for j in range(count)],
        replace(file, rows=held_out),
        scores[:, :count],
    )


@dataclass(frozen=True, slots=True)
class SetTransfer:
    """Mean tau over a file's models, learnt from this file alone, from all files, from all but this one."""

    name: str
    own: float
    all_files: float
    all_but_this: float


def across_sets(
    files: Sequence[LengthFile], encoder: FrozenEncoder, *, max_prompts_per_file: int, seed: int = 0
) -> list[SetTransfer]:
    """Each file once left out of training. Raises: DataError: with fewer than two files, or no labels."""
    if len(files) < 2:
        raise DataError("to leave one file out needs at least two")
    forbidden = distinct_prompts(files, "test") | distinct_prompts(files, "val")
    training = label_prompts(files, "train", CONSENSUS, forbidden=forbidden).at_most(
        max_prompts_per_file, seed
    )
    held_out = [held_out_rows(file)[0] for file in files]
    prompts = [row.prompt for rows in held_out for row in rows]
    everything = np.ones(len(training.prompts), dtype=bool)
    features = _features(encoder, training.prompts)
    measured = _features(encoder, prompts)
    starts = np.cumsum([0, *(len(rows) for rows in held_out)])
    results = []
    from_all = _ridge(features, training.log_length, everything, measured)
    for index, (file, rows) in enumerate(zip(files, held_out, strict=True)):
        here = slice(starts[index], starts[index + 1])
        own = _ridge(features, training.log_length, training.group == index, measured[here])
        others = _ridge(features, training.log_length, training.group != index, measured[here])
        taus = (mean_tau(scores, rows, file.models) for scores in (own, from_all[here], others))
        results.append(SetTransfer(file.name, *taus))
    return results


def _share(model: str, rows: Sequence[LengthRow]) -> float:
    return float(np.mean([model in row.output_tokens for row in rows])) if rows else 0.0


def _features(encoder: FrozenEncoder, prompts: list[str]) -> Floats:
    """(B, H + 1): pooled states and log characters."""
    characters = np.log([[len(prompt)] for prompt in prompts])
    return np.hstack([encoder.embed(prompts).astype(np.float64), characters])


def _fit_and_score(
    encoder: FrozenEncoder, prompts: list[str], targets: Floats, measured: list[str]
) -> Floats:
    everything = np.ones(len(prompts), dtype=bool)
    features = _features(encoder, prompts)
    return _ridge(features, targets, everything, _features(encoder, measured))


def _ridge(features: Floats, targets: Floats, rows: NDArray[np.bool_], measured: Floats) -> Floats:
    """Fit on some rows, predict `measured`; (n,) or (n, targets)."""
    linear_model = require_extra("sklearn.linear_model", "train")
    centre, spread = features[rows].mean(axis=0), features[rows].std(axis=0) + 1e-6
    ridge = linear_model.RidgeCV(alphas=ALPHAS, alpha_per_target=targets.ndim > 1)
    ridge.fit((features[rows] - centre) / spread, targets[rows])
    scores: Floats = ridge.predict((measured - centre) / spread)
    return scores
