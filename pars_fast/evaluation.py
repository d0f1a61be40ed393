"""How well a ranker orders the answers of each model of a length file."""

from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from pars_fast.baselines import Predictor
from pars_fast.data import LengthFile, Split
from pars_fast.metrics import ranking_quality


def evaluate(ranker: Predictor, file: LengthFile, split: Split | Literal["all"]) -> dict[str, Any]:
    """Quality per model column: `{"models": {name: {...}}, "mean_kendall_tau"}`, with the fields of
    `RankingQuality`.

    A column that cannot be ranked (no rows, one row, all lengths or all scores equal) has None for its
    measures and why in `reason`, and is left out of the mean; the mean is None if nothing is left.
    """
    rows = file.select(split).rows
    prompts = list(dict.fromkeys(row.prompt for row in rows))  # once each: equal prompts are exact ties
    score_of = dict(zip(prompts, ranker.score(prompts).tolist(), strict=True)) if prompts else {}
    scores = np.array([score_of[row.prompt] for row in rows])
    models = {name: _column(name, rows, scores, split) for name in file.models}
    taus = [column["kendall_tau"] for column in models.values() if column["kendall_tau"] is not None]
    return {"models": models, "mean_kendall_tau": float(np.mean(taus)) if taus else None}


def _column(model: str, rows: Any, scores: Any, split: str) -> dict[str, Any]:
    present = np.array([model in row.output_tokens for row in rows], dtype=bool)
    lengths = np.array([row.output_tokens[model] for row in rows if model in row.output_tokens], dtype=float)
    kept = scores[present]
    if len(lengths) < 2:
        reason = f"the {split} split has {len(lengths)} rows"
    elif len(np.unique(lengths)) == 1:
        reason = "all lengths are equal"
    elif len(np.unique(kept)) == 1:
        reason = "all scores are equal"
    else:
        return asdict(ranking_quality(kept, lengths))
    measures = ("kendall_tau", "ci95", "pair_accuracy", "impact_accuracy")
    return {"n": len(lengths), **dict.fromkeys(measures), "reason": reason}
