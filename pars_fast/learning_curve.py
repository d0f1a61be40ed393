"""What limits a ranker: the number of prompts, of models that answered each, or the encoder.

One of the three is varied at a time around a small recipe that can be trained in minutes, by regression on
log length, whose scores are on one scale in all files. Fewer prompts are a sample of those of more; fewer
models a prompt are a sample of those that answered it, whose consensus is then the label.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pars_fast.benchmark import DOMAINS
from pars_fast.data import LengthFile
from pars_fast.errors import ParsFastError
from pars_fast.ranker import Ranker
from pars_fast.training import Recipe
from pars_fast.training_runs import held_out_taus, trained_once

BUDGET = Recipe(
    loss="huber", pooling="cls", epochs=3, batch_prompts=32, learning_rate=3e-4,
    max_prompts_per_file=400, layers=1,
)  # fmt: skip
PROMPTS = (50, 100, 200, 400, 800, None)  # of a file at most; None: all of them
MODELS = (1, 2, 4)  # beside all that answered, which the curve over prompts has
LAYERS = (2, 3, 6)
DOMAIN_NAMES = tuple(dict.fromkeys(DOMAINS.values()))
_STEPS_WORTH = 400  # prompts a file whose number of steps fewer prompts get, too, by more epochs


@dataclass(frozen=True, slots=True)
class Point:
    """One run: None stands for all prompts, or all models."""

    axis: str  # what is varied
    prompts: int | None
    models: int | None
    layers: int
    seed: int

    @property
    def name(self) -> str:
        return f"p{self.prompts or 'all'}-m{self.models or 'all'}-l{self.layers}-{self.seed}"


def points(seeds: Sequence[int], layer_seeds: Sequence[int]) -> Iterator[Point]:
    """All runs, the cheap axes first."""
    base = BUDGET.max_prompts_per_file
    for seed in seeds:
        for prompts in PROMPTS:
            yield Point("prompts", prompts, None, 1, seed)
        for models in MODELS:
            yield Point("models", base, models, 1, seed)
    for seed in layer_seeds:
        for layers in LAYERS:
            yield Point("layers", base, None, layers, seed)


def learning_curve(
    training: Sequence[LengthFile],
    measured: Sequence[LengthFile],
    out: Path,
    *,
    init: str = "minilm",
    exclude: Sequence[LengthFile] = (),
    seeds: Sequence[int] = (0, 1, 2),
    layer_seeds: Sequence[int] = (0,),
    on_run: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Train what is missing under `out`, one folder a run, and measure it.

    Yields: a row per run and file: the fields of its `Point` (None for all) and those of `held_out_taus`.
    Raises: as `trained_once`; ParsFastError: without a seed.
    """
    if not (seeds or layer_seeds):
        raise ParsFastError("a learning curve needs a run; give --seeds or --layer-seeds of at least 1")
    for point in points(seeds, layer_seeds):
        recipe = replace(
            BUDGET,
            max_prompts_per_file=point.prompts,
            layers=point.layers,
            seed=point.seed,
            epochs=BUDGET.epochs * max(1, _STEPS_WORTH // (point.prompts or _STEPS_WORTH)),
        )
        files = [answered_by(file, point.models, point.seed) for file in training]
        run = trained_once(out / point.name, files, init, recipe, exclude=exclude, on_run=on_run)
        ranker = Ranker.from_pretrained(run, device="cpu")
        given = {name: getattr(point, name) for name in ("axis", "prompts", "models", "layers", "seed")}
        for taus in held_out_taus(ranker, measured):
            yield {**given, **taus}


def answered_by(file: LengthFile, models: int | None, seed: int) -> LengthFile:
    """The file with so many of the answers of each training row, chosen anew for each; None for all."""
    if models is None:
        return file
    rng = np.random.default_rng(seed)
    rows = []
    for row in file.rows:
        names = list(row.output_tokens)
        if row.split == "train" and len(names) > models:
            kept = [names[i] for i in sorted(rng.permutation(len(names))[:models])]
            row = replace(row, output_tokens={name: row.output_tokens[name] for name in kept})
        rows.append(row)
    return replace(file, rows=tuple(rows))


def print_curve(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of each axis: mean over files, and over seeds with its spread."""
    for axis in dict.fromkeys(row["axis"] for row in rows):
        table = Table(axis, "tau-b", "seeds", *DOMAIN_NAMES, title=f"by {axis}")
        values = dict.fromkeys(row[axis] for row in rows if row["axis"] == axis)
        for value in values:
            at = [row for row in rows if row["axis"] == axis and row[axis] == value]
            by_seed = _means(at, "seed")
            spread = f" ± {np.std(by_seed, ddof=1):.3f}" if len(by_seed) > 1 else ""
            domains = [[row["kendall_tau"] for row in at if DOMAINS.get(row["file"]) == name]
                       for name in DOMAIN_NAMES]  # fmt: skip
            cells = (f"{np.mean(taus):.3f}" if taus else "-" for taus in domains)
            table.add_row(str(value or "all"), f"{np.mean(by_seed):.3f}{spread}", str(len(by_seed)), *cells)
        Console().print(table)


def _means(rows: Sequence[Mapping[str, Any]], column: str) -> list[float]:
    """Mean tau over files, one for each value of the column."""
    return [
        float(np.mean([row["kendall_tau"] for row in rows if row[column] == value]))
        for value in dict.fromkeys(row[column] for row in rows)
    ]
