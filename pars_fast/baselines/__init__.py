"""Other predictors of answer length, each in one file, trained by `pars-fast baseline NAME`."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pars_fast.baselines.alise import Alise
from pars_fast.baselines.base import Baseline, Predictor
from pars_fast.baselines.elis import Elis
from pars_fast.baselines.encoder import FrozenEncoder
from pars_fast.baselines.frozen_ridge import fit_frozen_ridge
from pars_fast.baselines.head import Head
from pars_fast.baselines.prompt_length import PromptLength
from pars_fast.baselines.tfidf_ridge import TfidfRidge
from pars_fast.calibration import fit_token_map
from pars_fast.data import CONSENSUS, LengthFile, split_prompts
from pars_fast.errors import CheckpointError, ParsFastError
from pars_fast.losses import LOSSES
from pars_fast.packaged import checkpoint_directory
from pars_fast.ranker import Ranker, read_config

__all__ = ["BASELINES", "Baseline", "Predictor", "fit_baseline", "load_predictor"]

SAMPLE_SEED = 42  # seeds of a baseline vary what it learns, not what it learns from
Fit = Callable[[Sequence[str], NDArray[np.float64], str, int], Predictor]


def _fit_head(
    loss: str, prompts: Sequence[str], lengths: NDArray[np.float64], encoder: str, seed: int
) -> Predictor:
    return Head.fit(prompts, lengths, FrozenEncoder.of(encoder), seed, loss=loss)


BASELINES: dict[str, Fit] = {
    "prompt_length": lambda prompts, lengths, encoder, seed: PromptLength(),
    "tfidf_ridge": lambda prompts, lengths, encoder, seed: TfidfRidge.fit(prompts, lengths),
    "frozen_ridge": lambda prompts, lengths, encoder, seed: fit_frozen_ridge(
        prompts, lengths, FrozenEncoder.of(encoder)
    ),
    "alise": lambda prompts, lengths, encoder, seed: Alise.fit(
        prompts, lengths, FrozenEncoder.of(encoder), seed
    ),
    "elis": lambda prompts, lengths, encoder, seed: Elis.fit(
        prompts, lengths, FrozenEncoder.of(encoder), seed
    ),
}
for _loss in LOSSES:
    BASELINES[f"head_{_loss}"] = functools.partial(_fit_head, _loss)

_CLASSES: dict[str, type[Baseline]] = {
    kind.name: kind for kind in (Alise, Elis, Head, PromptLength, TfidfRidge)
}


def fit_baseline(
    name: str,
    files: Sequence[LengthFile],
    *,
    exclude: Sequence[LengthFile] = (),
    encoder: str = "minilm",
    model_column: str = CONSENSUS,
    max_prompts_per_file: int | None = None,
    seed: int = 42,
) -> Predictor:
    """Train a baseline on the train split; its map to expected tokens comes from the validation split.

    Arguments as of `pars_fast.training.train`: the same prompts, the same labels.

    Raises: DataError, CheckpointError, MissingExtraError; ParsFastError: if there is no baseline `name`.
    """
    if name not in BASELINES:
        raise ParsFastError(f"baseline must be one of {', '.join(BASELINES)}, got {name!r}")
    training, validation = split_prompts(files, model_column, exclude)
    training, validation = (
        split.at_most(max_prompts_per_file, SAMPLE_SEED) for split in (training, validation)
    )
    predictor = BASELINES[name](training.prompts, training.log_length, encoder, seed)
    scores = predictor.score(validation.prompts).numpy()
    predictor.token_map = fit_token_map(scores, np.exp(validation.log_length))
    return predictor


def load_predictor(path: str | Path) -> Predictor:
    """Load a ranker or a baseline: a directory, `default`, `small`, or `prompt_length`, which learns nothing.

    Raises: CheckpointError: as `Ranker.from_pretrained`.
    """
    if str(path) == PromptLength.name and not Path(path).exists():
        return PromptLength()
    directory = checkpoint_directory(path)
    settings = read_config(directory)
    if "baseline" not in settings:
        return Ranker.from_pretrained(directory)
    if settings["baseline"] not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise CheckpointError(f"{directory}: baseline must be one of {known}, got {settings['baseline']!r}")
    return _CLASSES[settings["baseline"]].load(directory, settings)
