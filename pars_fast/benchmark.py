"""All predictors on all length files: what `pars-fast evaluate --all` prints.

Each predictor may have several seeds: its measures are the mean over them, under the same resamples of the
prompts as everybody else's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pars_fast.baselines import Predictor
from pars_fast.data import LengthFile, LengthRow, Split, read_length_file
from pars_fast.distribution import LEVELS
from pars_fast.errors import DataError
from pars_fast.metrics import kendall_tau
from pars_fast.paired_bootstrap import (
    MEASURES,
    Floats,
    interval,
    paired_difference,
    resample_weights,
    resampled_quality,
)
from pars_fast.ranker import Ranker

CEILING = "ceiling"
MIN_CEILING_MODELS = 3
MIN_ROWS = 10  # a model column of fewer rows says nothing about order
DOMAINS = {  # of the public files the project is measured on, by file name
    "alpaca_eval": "chat",
    "arena_hard_v0.1": "chat",
    "flask": "chat",
    "just_eval": "chat",
    "gpteacher_roleplay": "role play",
    "codealpaca_2k": "code",
    "gpteacher_codegen": "code",
    "zeroeval_crux": "code",
    "gsm8k_models": "maths",
    "zeroeval_gsm": "maths",
    "zeroeval_math_l5": "maths",
    "farel_reasoning": "reasoning",
    "mmlu_pro": "reasoning",
}


def read_length_files(directory: Path) -> list[LengthFile]:
    """Every `lengths_*.jsonl` or `.jsonl.gz` of a folder, by name. Raises: DataError: if there is none."""
    paths = sorted({*directory.glob("lengths_*.jsonl"), *directory.glob("lengths_*.jsonl.gz")})
    if not paths:
        raise DataError(f"{directory}: no lengths_*.jsonl or lengths_*.jsonl.gz there; give --data-dir")
    return [read_length_file(path) for path in paths]


def benchmark(
    files: Sequence[LengthFile],
    predictors: Mapping[str, Sequence[Predictor]],
    *,
    max_prompts_per_file: int | None = None,
    resamples: int = 300,
    seed: int = 0,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, result) of each file as it is done, and at last ("all", the means over files).

    Args:
        files: measured on test; on val where a file has no test rows.
        predictors: seeds of each by name; the first is compared with every other. Each has at least one.
        max_prompts_per_file: a seeded sample of so many where a file has more; None measures all.
        resamples: of the prompts, for intervals and tests.

    A result holds, per predictor, the mean over model columns of each measure with its 95 % interval, the
    paired difference of the first predictor from it, the spread of tau over seeds, and every column's own
    measures. `ceiling` is the order by the other models' real lengths (their consensus), where a file has at
    least three models.
    """
    ours = next(iter(predictors))
    by_file: dict[str, dict[str, Floats]] = {}
    for index, file in enumerate(files):
        rows, split = held_out_rows(file)
        rows = _sample(rows, max_prompts_per_file, seed)
        lengths = _lengths(rows, file.models)
        columns = [i for i in range(len(file.models)) if _is_rankable(lengths[:, i])]
        if not columns:
            continue
        prompts = [row.prompt for row in rows]
        scores = {
            name: [predictor.score(prompts).double().numpy() for predictor in seeds]
            for name, seeds in predictors.items()
        }
        weights = resample_weights(len(rows), resamples, seed + index)
        quality = _quality(scores, lengths, columns, weights)
        by_file[file.name] = {name: np.nanmean(q, axis=(0, 1)) for name, q in quality.items()}
        summary = {name: _summary(by_file[file.name], name, ours) for name in quality}
        for name, q in quality.items():
            summary[name]["models"] = {
                file.models[i]: _column(q.mean(axis=0)[j], lengths[:, i]) for j, i in enumerate(columns)
            }
        for name, seeds in predictors.items():
            taus = np.nanmean(quality[name][:, :, 0, 0], axis=1)
            summary[name] |= {
                "seeds": len(seeds),
                "tau_std_over_seeds": float(taus.std(ddof=1)) if len(seeds) > 1 else None,
                "tau_by_prompt_length": _by_prompt_length(scores[name], prompts, lengths, columns),
                "coverage": _coverage(seeds[0], scores[name][0], lengths),
            }
        domain = DOMAINS.get(file.name)
        yield file.name, {"split": split, "n": len(rows), "domain": domain, "predictors": summary}
    if not by_file:
        raise DataError("no file has a test or val split with lengths to rank")
    means = {name: np.mean([quality[name] for quality in by_file.values()], axis=0) for name in predictors}
    summary = {name: _summary(means, name, ours) for name in means}
    yield "all", {"predictors": summary, "tau_by_domain": _by_domain(by_file, list(predictors))}


def _quality(
    scores: Mapping[str, Sequence[Floats]],
    lengths: Floats,
    columns: Sequence[int],
    weights: NDArray[np.float32],
) -> dict[str, Floats]:
    """(seeds, columns, measures, 1 + resamples) of each predictor, and of the ceiling where there is one."""
    quality = {
        name: np.array([[resampled_quality(s, lengths[:, i], weights) for i in columns] for s in of_seeds])
        for name, of_seeds in scores.items()
    }
    if lengths.shape[1] >= MIN_CEILING_MODELS:
        others = ((_others(lengths, i), lengths[:, i]) for i in columns)
        known = [resampled_quality(o, np.where(np.isnan(o), np.nan, t), weights) for o, t in others]
        quality[CEILING] = np.array([known])
    return quality


def _by_domain(by_file: Mapping[str, Mapping[str, Floats]], names: Sequence[str]) -> dict[str, Any]:
    """Mean tau over the files of each domain, of files whose domain is known."""
    domains = dict.fromkeys(filter(None, map(DOMAINS.get, by_file)))
    return {
        domain: {
            name: _number(
                float(np.mean([q[name][0, 0] for f, q in by_file.items() if DOMAINS.get(f) == domain]))
            )
            for name in names
        }
        for domain in domains
    }


def held_out_rows(file: LengthFile) -> tuple[tuple[LengthRow, ...], Split]:
    """The test rows of a file, or its val rows where it has none; a prompt that repeats stays once."""
    split: Split = "test" if file.select("test").rows else "val"
    rows = {row.prompt: row for row in file.select(split).rows}
    return tuple(rows.values()), split


def mean_tau(scores: Floats, rows: Sequence[LengthRow], models: Sequence[str]) -> float:
    """Mean over models of tau-b of (n,) scores with the lengths of the n rows.

    A model that answered fewer than `MIN_ROWS` of them, or always at one length, is left out; NaN if none is
    left.
    """
    taus = [
        kendall_tau(scores[there], lengths[there])
        for lengths in _lengths(rows, models).T
        if (there := ~np.isnan(lengths)).sum() >= MIN_ROWS
    ]
    return float(np.nanmean(taus)) if np.isfinite(taus).any() else math.nan


def _sample(rows: tuple[LengthRow, ...], most: int | None, seed: int) -> tuple[LengthRow, ...]:
    if most is None or len(rows) <= most:
        return rows
    return tuple(rows[i] for i in np.sort(np.random.default_rng(seed).permutation(len(rows))[:most]))


def _lengths(rows: Sequence[LengthRow], models: Sequence[str]) -> Floats:
    """(n, M) tokens, NaN where a model has no answer."""
    return np.array([[row.output_tokens.get(model, np.nan) for model in models] for row in rows], dtype=float)


def _is_rankable(lengths: Floats) -> bool:
    there = lengths[~np.isnan(lengths)]
    return len(there) >= MIN_ROWS and len(np.unique(there)) > 1


def _others(lengths: Floats, model: int) -> Floats:
    """(n,) mean over the other models of log length minus that model's mean; NaN where none answered."""
    logs = np.log(np.delete(lengths, model, axis=1))
    logs = logs[:, ~np.isnan(logs).all(axis=0)]
    deviations = logs - np.nanmean(logs, axis=0)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.nansum(deviations, axis=1) / (~np.isnan(deviations)).sum(axis=1)
    return mean


def _summary(quality: Mapping[str, Floats], name: str, ours: str) -> dict[str, Any]:
    measures = {
        measure: {"mean": _number(row[0]), "ci95": interval(row)}
        for measure, row in zip(MEASURES, quality[name], strict=True)
    }
    if name == ours:
        return measures
    return {**measures, "ours_minus_this": asdict(paired_difference(quality[ours][0], quality[name][0]))}


def _column(quality: Floats, lengths: Floats) -> dict[str, Any]:
    tau, accuracy, impact = (_number(row[0]) for row in quality)
    return {
        "n": int((~np.isnan(lengths)).sum()),
        "kendall_tau": tau,
        "ci95": interval(quality[0]),
        "pair_accuracy": accuracy,
        "impact_accuracy": impact,
    }


def _by_prompt_length(
    of_seeds: Sequence[Floats], prompts: Sequence[str], lengths: Floats, columns: Sequence[int]
) -> list[float | None]:
    """Mean tau within the shortest, middle and longest third of the file's prompts, by characters."""
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    thirds: list[float | None] = []
    for third in np.array_split(order, 3):
        taus = [
            kendall_tau(scores[third][there], lengths[third, i][there])
            for scores in of_seeds
            for i in columns
            if (there := ~np.isnan(lengths[third, i])).sum() >= MIN_ROWS
        ]
        thirds.append(_number(float(np.nanmean(taus))) if np.isfinite(taus).any() else None)
    return thirds


def _coverage(predictor: Predictor, scores: Floats, lengths: Floats) -> dict[str, float] | None:
    """Share of all answers inside the intervals that the predictor gives; None if it gives none."""
    if not isinstance(predictor, Ranker) or predictor.distribution is None:
        return None
    prompt, model = np.nonzero(~np.isnan(lengths))
    weights = 1 / (~np.isnan(lengths)).sum(axis=1)[prompt]
    logs = np.log(lengths[prompt, model])
    return {
        str(level): predictor.distribution.coverage(scores[prompt], logs, weights, level) for level in LEVELS
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
