"""A trace served by a real server under each policy, and by the faithful simulator beside it.

The words of the prompts are made up; all else is the trace's: times of arrival, stretched to a load, lengths,
what prompts share, scores (sent as `pars_score`), and the application that a request belongs to (`pars_app`,
`pars_app_type`). So an order can be tried on traffic of one's own, and what it does to prefix-cache hits, or
to applications that share the engine, can be seen in a live engine.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pars_fast.bench_results import commit
from pars_fast.demo.display import Display
from pars_fast.demo.model import MAX_MODEL_LEN
from pars_fast.demo.records import Run
from pars_fast.demo.run import (
    CAPACITY_REQUESTS,
    Served,
    conditions,
    measure_capacity,
    rotated,
    serve_switched,
    served_model,
    switchable_server,
    warm_up,
)
from pars_fast.demo.sample import load_sample
from pars_fast.demo.scheduler_switch import parse_policy
from pars_fast.errors import DataError
from pars_fast.latency_columns import rounded
from pars_fast.packaged import AUTO
from pars_fast.policies import POLICIES
from pars_fast.policies.applications import Application
from pars_fast.settings import Settings
from pars_fast.simulation.columns import Served as Outcome
from pars_fast.simulation.columns import columns
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.fairness import Applications
from pars_fast.simulation.live_check import step_time_of
from pars_fast.simulation.workload import HASHED_TOKENS, Workload, at_load

COMPLETION = ("mean_completion_s", "p99_completion_s")
CACHED = "prefix_hit_share"
_WORDS = range(256, 512)  # ids that every vocabulary has and few special tokens are among


@dataclass(frozen=True, slots=True)
class Replay:
    """What is served: a trace, at each load under each policy, so many times.

    `demand` is a file of `pars-fast fairness demand`, for `justitia`.
    Raises: DataError: if a request does not fit the served model, the policies need scores that the trace
        lacks, or one is not for a live engine.
    """

    workload: Workload
    policies: Sequence[str]
    loads: Sequence[float]
    repeats: int
    demand: Path | None = None

    def __post_init__(self) -> None:
        tokens = self.workload.prompt_tokens + self.workload.output_tokens
        if tokens.max() > MAX_MODEL_LEN:
            raise DataError(f"{self.workload.name}: prompt and answer of request {int(tokens.argmax()) + 1} "
                            f"are {tokens.max():,} tokens, the served model takes {MAX_MODEL_LEN:,}; "
                            "leave such requests out by --skip-too-long")
        unscored = np.isnan(self.workload.expected_tokens).any()
        for name in map(_name_of, self.policies):
            if reason := POLICIES[name].not_live:
                raise DataError(f"{name} is not for a live engine: {reason}")
            if POLICIES[name].uses_ranker and unscored:
                raise DataError(f"{self.workload.name}: {name} orders by scores, and not every request has "
                                "one; give a column score, or noisy ones by --tau")


@dataclass(frozen=True, slots=True)
class TracePrompt:
    """A prompt of made-up words."""

    source: str
    prompt: list[int]
    output_tokens: int


def replay(
    plan: Replay, model: str | None, arguments: tuple[str, ...], *, display: Display,
    on_row: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Serve every policy, load and repeat on one real server.

    Args:
        model: a model for vLLM to serve; None makes a tiny random one.
        arguments: of `vllm serve`, over those that a replay has by itself.
        on_row: told each run as soon as it is done: `policy`, `load`, `repeat`, the columns of a simulation,
            `CACHED`, of the prompts' tokens, the columns of `COMPLETION`, None where the trace names no
            applications, and those of `STEP_TIMES`.

    Returns: how it was measured, with the capacity (tokens/s in arrival order) that is load 1.
    Raises: ServerError: if the server does not start, ends, or answers nothing.
    """
    workload = plan.workload
    fresh_prompts = map(partial(prompts_of, workload), count())
    with tempfile.TemporaryDirectory(prefix="pars-fast-replay-") as name:
        served = _with_settings(served_model(model, Path(name), load_sample()), arguments, plan.demand)
        display.say(f"starting vLLM with pars-fast, serving {served.description}")
        with switchable_server(served, AUTO, Path(name)) as server:
            warm_up(server.url, served, next(fresh_prompts), display)
            rounds = range(math.ceil(CAPACITY_REQUESTS / len(workload)))
            sample = [prompt for _ in rounds for prompt in next(fresh_prompts)]
            capacity_tok_s = measure_capacity(server.url, served, sample, display)
            display.say(f"capacity {capacity_tok_s:.0f} tokens/s")
            for repeat in range(plan.repeats):
                for place, load in enumerate(plan.loads):
                    offered = at_load(workload, load, capacity_tok_s)
                    for policy in rotated(plan.policies, repeat + place):
                        case = Run(policy, load, repeat, ())
                        xargs = xargs_of(offered, POLICIES[_name_of(policy)].uses_ranker)
                        run = serve_switched(server, served, case, next(fresh_prompts), offered.arrival_s,
                                             display, xargs)
                        on_row({"policy": policy, "load": load, "repeat": repeat,
                                **_figures(offered, outcome_of(run)), **run.step_times()})
            engine = server.step_log.engine
    return {"workload": workload.name, "arrivals_sha256": workload.sha256(), "requests": len(workload),
            "served_model": served.description, "vllm_arguments": arguments,
            "engine_settings": asdict(engine),
            "capacity_tok_s": round(capacity_tok_s, 2), "commit": commit(), **conditions()}


def simulated(plan: Replay, row: Mapping[str, Any], server: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that `replay` has of a run, from the faithful simulator with the times that its steps had.

    Scores take no time, since they come with the request.

    Args:
        row: a run, as `on_row` was told.
        server: what `replay` returned.
    Returns: `policy`, `load` and the figures, of which there are none where the run had too few steps.
    """
    from pars_fast.simulation.faithful import simulate

    case = {"policy": row["policy"], "load": row["load"]}
    step_time = step_time_of(row)
    if step_time is None:
        return case | dict.fromkeys(row.keys() - case.keys())
    name, guard = parse_policy(row["policy"])
    rules = Settings(policy=name, demand=plan.demand).make_policy()
    offered = at_load(plan.workload, row["load"], server["capacity_tok_s"])
    engine = EngineSettings(**server["engine_settings"])
    return case | _figures(offered, simulate(offered, rules, guard, engine, step_time))


def prompts_of(workload: Workload, run: int) -> list[TracePrompt]:
    """Prompts of the lengths of a trace, in words that no other run has: alike as far as the trace says that
    they are, and new to the prefix cache."""
    @cache
    def words(*name: int) -> list[int]:
        rng = np.random.default_rng((run, *name))
        return rng.integers(_WORDS.start, _WORDS.stop, HASHED_TOKENS).tolist()

    prompts = []
    for request, length in enumerate(workload.prompt_tokens.tolist()):
        names: Iterable[tuple[int, ...]] = ((request, block) for block in range(-(-length // HASHED_TOKENS)))
        if workload.hash_ids is not None:
            names = ((hash_id,) for hash_id in workload.hash_ids[request])
        prompts.append([word for name in names for word in words(*name)][:length])
    return [
        TracePrompt(workload.name, prompt, output)
        for prompt, output in zip(prompts, workload.output_tokens.tolist(), strict=True)
    ]


def xargs_of(workload: Workload, scored: bool) -> list[dict[str, Any]]:
    """What each request says of itself: its application, and its score if the policy reads it."""
    said: list[dict[str, Any]] = [{} for _ in range(len(workload))]
    if workload.app is not None:
        for request, app in zip(said, workload.app.tolist(), strict=True):
            request |= Application.parse(app).xargs() if app else {}
    if scored:
        for request, score in zip(said, workload.expected_tokens.tolist(), strict=True):
            request["pars_score"] = score
    return said


def outcome_of(run: Run) -> Outcome:
    """A real run in the form of a simulated one. When a request was admitted, its client does not see."""
    _, first_token_s, finished_s = run.times_s()
    admitted_s = np.full(len(run.requests), np.nan)
    return Outcome(admitted_s, first_token_s, finished_s, run.preemptions, steps=0, refused=0,
                   prefix_hit_tokens=run.prefix_hit_tokens)


def _figures(workload: Workload, outcome: Outcome) -> dict[str, Any]:
    row = columns(workload, outcome)
    del row["steps"]  # which nobody counts on a live server
    hits = outcome.prefix_hit_tokens
    cached = None if hits is None else rounded(hits / float(workload.prompt_tokens.sum()))
    return {**row, CACHED: cached, **_completion(workload, outcome)}


def _completion(workload: Workload, outcome: Outcome) -> dict[str, float | None]:
    """How long applications took, from their first arrival to their last answer."""
    if workload.app is None or not all(workload.app):
        return dict.fromkeys(COMPLETION)
    applications = Applications.of(workload)
    took: NDArray[np.float64] = applications.finished_s(outcome) - applications.arrival_s
    took = took[np.isfinite(took)]
    if not len(took):
        return dict.fromkeys(COMPLETION)
    values = float(took.mean()), float(np.quantile(took, 0.99))
    return {name: rounded(value) for name, value in zip(COMPLETION, values, strict=True)}


def _with_settings(served: Served, arguments: tuple[str, ...], demand: Path | None) -> Served:
    variables: Mapping[str, str] = {"PARS_TRUST_CALLER": "1", "PARS_CALIBRATION": "0"}
    if demand is not None:
        variables = {**variables, "PARS_DEMAND": str(demand.resolve())}
    return replace(served, arguments=(*served.arguments, "--enable-prefix-caching", *arguments),
                   environment={**served.environment, **variables})


def _name_of(policy: str) -> str:
    return parse_policy(policy)[0]
