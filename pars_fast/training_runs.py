"""Rankers trained for a study: each once, in a folder of its own, and measured on the held-out splits."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pars_fast.baselines import Predictor
from pars_fast.benchmark import held_out_rows, mean_tau
from pars_fast.data import LengthFile
from pars_fast.errors import ParsFastError
from pars_fast.training import Recipe, starting_directory, train


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

    `on_run` is told the name of a run that starts. Raises: as `train`; ParsFastError: if the ranker that is
    there was made of something else.
    """
    done = directory / "done"
    if not done.exists():
        on_run(directory.name)
        train(training, init, recipe, directory, exclude=exclude)
        done.write_text(_made_of(training, init, recipe, exclude) + "\n")
    elif done.read_text().strip() != _made_of(training, init, recipe, exclude):
        raise ParsFastError(
            f"{directory} is of a run with another recipe, other starting weights or data, or of an earlier "
            "version; give another --out, or remove it"
        )
    return directory


def _made_of(training: Sequence[LengthFile], init: str, recipe: Recipe, exclude: Sequence[LengthFile]) -> str:
    """A hash of what a ranker comes from: recipe, starting weights, and the rows of both kinds of files."""
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    for name in ("config.json", "model.safetensors"):
        digest.update((starting_directory(init) / name).read_bytes())
    for files in (training, exclude):
        rows = [[(row.split, row.prompt, row.output_tokens) for row in file.rows] for file in files]
        digest.update(json.dumps(rows).encode())
    return digest.hexdigest()


def validation_accuracy(run: Path) -> float:
    """Pair accuracy of a trained ranker on the validation split."""
    return float(json.loads((run / "training.json").read_text())["validation_pair_accuracy"])


def held_out_taus(predictor: Predictor, files: Sequence[LengthFile]) -> list[dict[str, Any]]:
    """A row for each file: `file`, `split`, and `kendall_tau`, the mean over its models."""
    measured = []
    for file in files:
        rows, split = held_out_rows(file)
        scores = predictor.score([row.prompt for row in rows]).double().numpy()
        tau = mean_tau(scores, rows, file.models)
        measured.append({"file": file.name, "split": split, "kendall_tau": tau})
    return measured
