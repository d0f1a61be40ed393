"""What a server that learns how long each application's answers are adds to a ranker's order.

    python -m bench.mixed_applications --data DIR [--ranker default small] [--csv F]

Every file is an application, with the answers of one of its models, and their held-out prompts come in random
order. After every `COHORT_SIZE` requests the factors are fitted to what has ended, as in the serving path, of
which the newest cohort never has. Beside it the order by the applications' factors alone, the same for all
prompts of one. `system_prompt` is one file with a model's answers to its prompts as they are, and behind a
system prompt that asks for thinking step by step: two applications whose prompts do not differ. Gains are of
arrival order towards an oracle without a guard, in the fast simulator at load 1.2, Poisson arrivals, under
`pars_fast` with its own guard.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.by_ranker import run
from pars_fast.application_factors import fit_application_factors
from pars_fast.benchmark import held_out_rows
from pars_fast.data import LengthFile
from pars_fast.demo.records import gain_captured
from pars_fast.guards import Guard, NoGuard
from pars_fast.integration.calibration import SCALE_WINDOW
from pars_fast.live_calibration import COHORT_SIZE, Ending, Observation
from pars_fast.metrics import kendall_tau
from pars_fast.ranker import Ranker
from pars_fast.simulation.columns import columns
from pars_fast.simulation.fast import capacity_tok_s, simulate
from pars_fast.simulation.step_time import load_profile
from pars_fast.simulation.study import PROFILE
from pars_fast.simulation.workload import CHARS_PER_TOKEN, at_load, make_workload, poisson

RESULTS = Path(__file__).parent / "results" / "mixed_applications.csv"
REQUESTS = 3000
LOAD = 1.2
SEEDS = range(5)
WITH_SYSTEM_PROMPT = "-sys"  # columns of farel_reasoning


class Served(NamedTuple):
    """(n,) each, in order of arrival."""

    expected_tokens: NDArray[np.float64]
    output_tokens: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    application: NDArray[np.int64]


Application = Sequence[tuple[float, int, int]]  # expected, real and prompt tokens of its requests


def mixed(applications: Sequence[Application], seed: int) -> Served:
    """Requests of applications in equal shares."""
    rng = np.random.default_rng(seed)
    which = rng.integers(len(applications), size=REQUESTS)
    drawn = [applications[i][int(rng.integers(len(applications[i])))] for i in which.tolist()]
    expected, real, prompt = zip(*drawn, strict=True)
    return Served(np.array(expected), np.array(real, dtype=np.float64), np.array(prompt), which)


def learnt_factors(served: Served) -> NDArray[np.float64]:
    """(n,) what each request's expected tokens are multiplied by, from those that ended before it came."""
    window: deque[Observation] = deque(maxlen=SCALE_WINDOW)
    under_way: list[Observation] = []
    factors = np.ones(len(served.expected_tokens))
    for start in range(0, len(factors), COHORT_SIZE):
        known = fit_application_factors(window)
        window.extend(under_way)
        cohort = slice(start, start + COHORT_SIZE)
        factors[cohort] = [known.get(application, 1.0) for application in served.application[cohort].tolist()]
        came = zip(*(each[cohort].tolist() for each in served), strict=True)
        under_way = [
            Observation(expected, None, application, output_tokens=int(tokens), ending=Ending.COMPLETE)
            for expected, tokens, _, application in came
        ]
    return factors


def figures(served: Served, seed: int) -> dict[str, float | None]:
    """tau-b over all requests that came after the first window was full, and gains over all."""
    late = slice(SCALE_WINDOW + COHORT_SIZE, None)
    alone = served._replace(expected_tokens=np.full_like(served.expected_tokens, 100.0))
    orders = {
        "ranker": served.expected_tokens,
        "ranker_and_factors": served.expected_tokens * learnt_factors(served),
        "factors": learnt_factors(alone) * alone.expected_tokens,
    }
    real = served.output_tokens[late]
    found: dict[str, float | None] = {
        f"tau_{name}": round(kendall_tau(order[late], real), 4) for name, order in orders.items()
    }
    step_time, engine = load_profile(PROFILE)
    arrived = poisson(make_workload("mixed", np.arange(len(served.application)), served.prompt_tokens,
                                    served.output_tokens.astype(np.int64)), seed=seed)
    offered = at_load(arrived, LOAD, capacity_tok_s(arrived, engine, step_time))

    def latency(policy: str, expected: NDArray[np.float64], guard: Guard | None) -> tuple[float, float]:
        outcome = simulate(replace(offered, expected_tokens=expected), policy, guard, engine, step_time)
        row = columns(offered, outcome)
        return row["mean_latency_per_token_s"], row["mean_e2e_s"]

    ends = [latency(policy, served.expected_tokens, NoGuard()) for policy in ("fcfs", "oracle")]
    for name, expected in orders.items():
        ours = latency("pars_fast", expected, None)
        for kind, fcfs, value, oracle in zip(("", "_e2e"), ends[0], ours, ends[1], strict=True):
            gain = gain_captured(fcfs, value, oracle)
            found[f"gain{kind}_{name}"] = None if gain is None else round(gain, 4)
    return found


def measure(files: Sequence[LengthFile], ranker: Ranker, most: int | None) -> Iterator[dict[str, Any]]:
    """A row for each seed, which chooses models and arrivals, and what is mixed."""
    prompts = {file.name: [row for row in held_out_rows(file)[0][:most] if row.output_tokens]
               for file in files}
    expected = {name: ranker.expected_tokens([row.prompt for row in rows]).tolist()
                for name, rows in prompts.items()}

    def application(file: LengthFile, model: str) -> Application:
        return [(tokens, row.output_tokens[model], max(1, len(row.prompt) // CHARS_PER_TOKEN))
                for tokens, row in zip(expected[file.name], prompts[file.name], strict=True)
                if model in row.output_tokens]

    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        each = [application(file, str(rng.choice(file.models))) for file in files]
        files_mixed = mixed([known for known in each if known], seed)
        yield {"mixed": "files", "seed": seed, **figures(files_mixed, seed)}
        for file in files:
            both = [name for name in file.models if name + WITH_SYSTEM_PROMPT in file.models]
            if both:
                model = str(rng.choice(both))
                pair = [application(file, name) for name in (model, model + WITH_SYSTEM_PROMPT)]
                yield {"mixed": "system_prompt", "seed": seed, **figures(mixed(pair, seed), seed)}


if __name__ == "__main__":
    run(__doc__, measure, RESULTS)
