"""PARS's margin loss against its rivals: same encoder, same prompts, same number of steps.

The losses of PARS (arXiv 2510.03243) with and without its filter of near pairs, of LTR (arXiv 2408.15792) and
plain regression on log length are on different scales, so each has its learning rate chosen, by validation
pair accuracy of the first seed. A seed sets the head's start, the order of the prompts and the dropout, and
is the same for all losses, so that their differences are paired.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pars_fast.data import LengthFile
from pars_fast.errors import ParsFastError
from pars_fast.losses import LOSSES
from pars_fast.ranker import Ranker
from pars_fast.training import Recipe
from pars_fast.training_runs import held_out_taus, trained_once, validation_accuracy

LEARNING_RATES = (3e-4, 1e-3)
BUDGET = Recipe(pooling="cls", epochs=3, batch_prompts=32, max_prompts_per_file=400, layers=1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is trained: every loss with every seed, its learning rate chosen by the first.

    `budget` is the recipe of all runs but for loss, learning rate and seed; `init` as of `train`.
    """

    training: Sequence[LengthFile]
    exclude: Sequence[LengthFile] = ()
    init: str = "minilm"
    budget: Recipe = BUDGET
    learning_rates: Sequence[float] = LEARNING_RATES
    losses: Sequence[str] = tuple(LOSSES)
    seeds: Sequence[int] = (0, 1, 2)

    def __post_init__(self) -> None:
        if len(self.seeds) < 2:
            raise ParsFastError("a comparison needs at least two seeds")


def compare_losses(
    comparison: Comparison,
    measured: Sequence[LengthFile],
    out: Path,
    on_run: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Train what is missing under `out`, one folder a run, and measure it.

    A run that is there is not repeated, so an interrupted comparison goes on where it was.

    Returns: a row per loss, seed and file: `layers` and `max_prompts_per_file` of the budget, `loss`,
        `learning_rate`, `seed`, `file`, `split`, `kendall_tau` (mean over the file's models),
        `validation_pair_accuracy`.
    Raises: as `trained_once`.
    """
    losses, seeds = comparison.losses, comparison.seeds
    chosen: dict[str, float] = {}
    for loss in losses:
        tried = {
            rate: _run(comparison, loss, rate, seeds[0], out, on_run) for rate in comparison.learning_rates
        }
        chosen[loss] = max(tried, key=lambda rate: validation_accuracy(tried[rate]))
    rows = []
    for seed in seeds:  # all losses of a seed before the next, so that what is there is comparable
        for loss in losses:
            run = _run(comparison, loss, chosen[loss], seed, out, on_run)
            given = {
                "layers": comparison.budget.layers,
                "max_prompts_per_file": comparison.budget.max_prompts_per_file,
                "loss": loss, "learning_rate": chosen[loss], "seed": seed,
            }  # fmt: skip
            accuracy = {"validation_pair_accuracy": validation_accuracy(run)}
            ranker = Ranker.from_pretrained(run, device="cpu")
            rows += [{**given, **taus, **accuracy} for taus in held_out_taus(ranker, measured)]
    return rows


def _run(
    comparison: Comparison, loss: str, rate: float, seed: int, out: Path, on_run: Callable[[str], None]
) -> Path:
    recipe = replace(comparison.budget, loss=loss, learning_rate=rate, seed=seed)
    return trained_once(
        out / f"{loss}-{rate:g}-{seed}",
        comparison.training,
        comparison.init,
        recipe,
        exclude=comparison.exclude,
        on_run=on_run,
    )


@dataclass(frozen=True, slots=True)
class Standing:
    """One loss over the seeds: mean over files, `half_width` of its 95 % interval by Student's t, and the
    paired difference of the first loss from it with its own half width and p value (None for the first)."""

    mean: float
    half_width: float
    difference: float | None
    difference_half_width: float | None
    p_value: float | None


def standings(rows: Sequence[Mapping[str, Any]], files: Sequence[str]) -> dict[str, Standing]:
    """Each loss on the mean of some files; seeds are the sample. Rows as of `compare_losses`."""
    from scipy.stats import t, ttest_rel

    by_loss: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["file"] in files:
            by_loss.setdefault(row["loss"], {}).setdefault(row["seed"], []).append(row["kendall_tau"])
    means = {loss: np.array([np.mean(taus) for taus in seeds.values()]) for loss, seeds in by_loss.items()}
    first = next(iter(means.values()))
    factor = float(t.ppf(0.975, len(first) - 1)) / np.sqrt(len(first))
    found = {}
    for loss, taus in means.items():
        mean, half_width = float(taus.mean()), float(factor * taus.std(ddof=1))
        if taus is first:
            found[loss] = Standing(mean, half_width, None, None, None)
            continue
        ahead = first - taus
        p_value = float(ttest_rel(first, taus).pvalue)
        found[loss] = Standing(
            mean, half_width, float(ahead.mean()), float(factor * ahead.std(ddof=1)), p_value
        )
    return found
