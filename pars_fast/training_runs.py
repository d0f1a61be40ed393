"""Rankers trained for a study: each once, in a folder of its own, and measured on the held-out splits."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pars_fast.baselines import Predictor
from pars_fast.benchmark import MIN_ROWS, held_out_rows
from pars_fast.data import LengthFile
from pars_fast.metrics import kendall_tau
from pars_fast.training import Recipe, train


def trained_once(
    directory: Path,
    training: Sequence[LengthFile],
    init: str,
    recipe: Recipe,
    *,
    exclude: Sequence[LengthFile] = (),
    on_run: Callable[[str], None] = lambda line: None,
) -> Path:
    """The ranker of `directory`, trained if it is not there: an interrupted study goes on where it was.

    `on_run` is told the name of a run that starts. Raises: as `train`.
    """
    done = directory / "done"
    if not done.exists():
        on_run(directory.name)
        train(training, init, recipe, directory, exclude=exclude)
        done.touch()
    return directory


def validation_accuracy(run: Path) -> float:
    """Pair accuracy of a trained ranker on the validation split."""
    return float(json.loads((run / "training.json").read_text())["validation_pair_accuracy"])


def held_out_taus(predictor: Predictor, files: Sequence[LengthFile]) -> list[dict[str, Any]]:
    """A row for each file: `file`, `split`, and `kendall_tau`, the mean over its models."""
    measured = []
    for file in files:
        rows, split = held_out_rows(file)
        scores = predictor.score([row.prompt for row in rows]).double().numpy()
        lengths = np.array([[row.output_tokens.get(model, np.nan) for model in file.models] for row in rows])
        taus = [
            kendall_tau(scores[there], column[there])
            for column in lengths.T
            if (there := ~np.isnan(column)).sum() >= MIN_ROWS
        ]
        measured.append({"file": file.name, "split": split, "kendall_tau": float(np.nanmean(taus))})
    return measured
