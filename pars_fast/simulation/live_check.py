"""Does the faithful simulator say what a real server showed? The demo's arrivals, served again in simulation.

The demo's JSON names capacity and seed, and its arrivals follow from them, so the same requests arrive at the
same times. The engine and its step time are this machine's (`pars-fast profile`).
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from pars_fast.demo.arrivals import arrival_times, arrivals_hash
from pars_fast.demo.model import DESCRIPTION
from pars_fast.demo.run import expected_tokens, served_model
from pars_fast.demo.sample import SamplePrompt, load_sample
from pars_fast.errors import DataError
from pars_fast.simulation.columns import columns
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.faithful import simulate
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.workload import Workload, make_workload

COMPARED = ("mean_e2e_s", "mean_latency_per_token_s", "mean_ttft_s")
TOLERANCE = 0.15
_KEYS = {"runs", "capacity_tok_s", "seed", "repeats", "arrivals_sha256", "served_model"}
BATCH_DELAY_S = 0.15  # a guess: 4 prompts of 2 ms, and the wait for a core that a full server leaves


def live_check(
    demo: dict[str, Any], step_time: StepTime, engine: EngineSettings, *, ranker: str, ranker_delay_s: float
) -> dict[str, Any]:
    """Compare the rows of a demo with their simulation.

    Returns: `{"rows": one for each policy and load, "worst_mean_error", "worst_ratio_error", "agrees"}`. A
        row has, for each of `COMPARED`, the live mean over the repeats, the simulated one, the error of the
        latter as a ratio less 1, and that of `policy / fcfs`. The worst errors and `agrees` are of the mean
        end-to-end latency and of the mean latency per token.
    Raises: DataError: if the demo's figures do not belong to the shipped sample.
    """
    sample = load_sample()
    repeats: int = demo["repeats"]
    if arrivals_hash(sample, [demo["seed"] + repeat for repeat in range(repeats)]) != demo["arrivals_sha256"]:
        raise DataError("the demo's arrivals are not those of the shipped sample; run `pars-fast demo` again")
    prompt_tokens = _prompt_tokens(demo["served_model"], sample)
    expected = expected_tokens(ranker, sample)
    simulated: dict[tuple[str, str, int], dict[str, Any]] = {}
    live = [row for row in demo["runs"] if not row["stock"]]
    for row in live:
        arrivals = arrival_times(sample, row["load"], demo["capacity_tok_s"], demo["seed"] + row["repeat"])
        outputs = [prompt.output_tokens for prompt in sample]
        workload: Workload = make_workload("demo", arrivals, prompt_tokens, outputs, expected)
        served = simulate(workload, row["policy"], None, engine, step_time, ranker_delay_s=ranker_delay_s)
        simulated[row["policy"], row["load"], row["repeat"]] = columns(workload, served)
    rows = _compare(live, simulated)
    judged = COMPARED[:2]
    mean_error = max(abs(row[f"{column}_error"]) for row in rows for column in judged)
    ratio_error = max(abs(row[f"{column}_ratio_error"]) for row in rows for column in judged)
    return {
        "rows": rows,
        "worst_mean_error": mean_error,
        "worst_ratio_error": ratio_error,
        "agrees": max(mean_error, ratio_error) <= TOLERANCE,
    }


def read_demo(path: Path) -> dict[str, Any]:
    """What `pars-fast demo --json` wrote.

    Raises: DataError: if it is something else.
    """
    try:
        demo: dict[str, Any] = json.loads(path.read_text())
        missing = _KEYS - demo.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a file that `pars-fast demo --json` wrote ({error})") from error
    if missing:
        raise DataError(f"{path}: not a file that `pars-fast demo --json` wrote (no {sorted(missing)[0]})")
    return demo


def _prompt_tokens(served: str, sample: Sequence[SamplePrompt]) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        model = served_model(None if served == DESCRIPTION else served, Path(folder), sample).model
        tokenizer = AutoTokenizer.from_pretrained(model)
        return [len(ids) for ids in tokenizer([prompt.prompt for prompt in sample])["input_ids"]]


def _compare(
    live: Sequence[dict[str, Any]], simulated: dict[tuple[str, str, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    means: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for policy, load in dict.fromkeys((row["policy"], row["load"]) for row in live):
        chosen = [row for row in live if (row["policy"], row["load"]) == (policy, load)]
        means[policy, load] = {
            column: (
                float(np.mean([row[column] for row in chosen])),
                float(np.mean([simulated[policy, load, row["repeat"]][column] for row in chosen])),
            )
            for column in COMPARED
        }
    rows = []
    for (policy, load), of in means.items():
        row: dict[str, Any] = {"policy": policy, "load": load}
        for column, (real, model) in of.items():
            real_fcfs, model_fcfs = means["fcfs", load][column]
            row |= {
                f"live_{column}": real,
                f"simulated_{column}": model,
                f"{column}_error": model / real - 1,
                f"{column}_ratio_error": (model / model_fcfs) / (real / real_fcfs) - 1,
            }
        rows.append(row)
    return rows
