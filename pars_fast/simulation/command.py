"""`pars-fast simulate`: from options to workloads, a sweep, and a table."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pars_fast import __version__
from pars_fast.calibration import TokenMap
from pars_fast.data import LengthFile, read_length_file
from pars_fast.distribution import LengthDistribution
from pars_fast.errors import ParsFastError
from pars_fast.policies import POLICIES, needs_distribution
from pars_fast.simulation.arrays import Floats
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.fleet import FAST_POLICIES, ROUTERS
from pars_fast.simulation.options import require_at_least
from pars_fast.simulation.step_time import load_profile
from pars_fast.simulation.sweep import grid, make_setup, parse_guards, run_sweep
from pars_fast.simulation.workload import (
    PromptScorer,
    Workload,
    from_lengths,
    poisson,
    read_trace,
    with_burst,
)

if TYPE_CHECKING:
    from pars_fast.baselines import Predictor

_DEFAULT_PROMPTS = 2000


def simulate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the sweep that the options of `pars-fast simulate` ask for; prints a table.

    Returns: `{"runs": [one row per case], ...}` and what is needed to remake it.
    Raises: ParsFastError: says which option cannot be.
    """
    require_at_least(1, "--fleet", *arguments.fleet)
    require_at_least(0, "--seed", *arguments.seed)
    routers = _chosen("router", arguments.router, list(ROUTERS))
    guards = parse_guards(arguments.guards)
    step_time, engine = load_profile(arguments.profile)
    engine = replace(engine, **{field.name: getattr(arguments, field.name) for field in fields(EngineSettings)
                                if hasattr(arguments, field.name)})
    workloads = {seed: make_workload(arguments, seed) for seed in arguments.seed}
    first = workloads[arguments.seed[0]]
    if first.hash_ids is not None and arguments.engine == "fast":
        raise ParsFastError(f"{first.name} says what its prompts share: only --engine faithful has that")
    has_scores = arguments.tau is not None or not np.isnan(first.expected_tokens).all()
    if arguments.policies == "all":
        policies = allowed_policies(arguments.engine, has_scores=has_scores)
    else:
        policies = _chosen("policy", arguments.policies, list(POLICIES))
    ranked = [policy for policy in policies if POLICIES[policy].uses_ranker]
    if ranked and not has_scores:
        raise ParsFastError(f"{first.name} has no scores for {', '.join(ranked)}: give --tau for noisy ones, "
                            "or prompts by --lengths for a ranker")
    cases = grid(policies, guards, arguments.load, seeds=arguments.seed, taus=arguments.tau or [None],
                 delays_s=arguments.ranker_delay, unscored=arguments.unscored, engines=arguments.fleet,
                 routers=routers)
    setup = replace(make_setup(workloads, engine, step_time, arguments.engine),
                    scores=_own_scores(arguments, policies), lengths=_lengths(arguments, policies))
    kept = arguments.json and arguments.json.with_name(arguments.json.name + ".rows.jsonl")
    bars = (TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn())
    with Progress(*bars, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"simulating {first.name}", total=len(cases))
        runs = run_sweep(setup, cases, kept=kept, workers=arguments.workers,
                         on_row=lambda done, total: progress.update(task, completed=done, total=total))
    print_table(first.name, runs)
    return {
        "runs": runs,
        "workload": first.name,
        "requests": len(first),
        "simulator": arguments.engine,
        "engine": asdict(engine),
        "step_time": asdict(step_time),
        "capacity_tok_s": setup.capacity_tok_s[arguments.seed[0]],
        "scores": "noisy" if arguments.tau else "real",
        "real_tau": real_tau(first),
        "version": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def allowed_policies(engine: str, *, has_scores: bool) -> list[str]:
    """All policies that a simulator has and a trace allows: none has priorities, some have scores."""
    return [name for name, policy in POLICIES.items()
            if name != "priority" and (has_scores or not policy.uses_ranker)
            and (engine == "faithful" or name in FAST_POLICIES)]


def make_workload(arguments: argparse.Namespace, seed: int) -> Workload:
    """The requests before any load is set."""
    if arguments.requests is not None:
        require_at_least(1, "--requests", arguments.requests)
    if arguments.lengths is not None:
        if arguments.poisson and arguments.trace is not None:
            raise ParsFastError("--poisson is not for the times of --trace: leave out one of them")
        return _drawn(arguments, read_length_file(arguments.lengths), seed, _scorer(arguments.ranker))
    workload = read_trace(arguments.trace)
    if arguments.requests is not None:
        workload = workload.take(np.arange(min(arguments.requests, len(workload))))
    if arguments.poisson:
        workload = poisson(workload, seed=seed)
    return _with_burst(arguments, workload, seed)


def _drawn(arguments: argparse.Namespace, file: LengthFile, seed: int,
           scorer: PromptScorer | None) -> Workload:
    """Prompts of a length file, at the times of `--trace` if there is one; the same ones with any scorer."""
    arrivals = None if arguments.trace is None else read_trace(arguments.trace)
    workload = from_lengths(file, arguments.model_column or file.first_model,
                            arguments.requests or _DEFAULT_PROMPTS, seed=seed, scorer=scorer,
                            arrivals=arrivals)
    return _with_burst(arguments, workload, seed)


def _with_burst(arguments: argparse.Namespace, workload: Workload, seed: int) -> Workload:
    return with_burst(workload, arguments.burst, seed=seed) if arguments.burst else workload


def _own_scores(arguments: argparse.Namespace, policies: Sequence[str]) -> dict[tuple[int, str], Floats]:
    """Expected tokens by seed and predictor, of the predictors in `--predictors` that a policy asks for."""
    if arguments.predictors is None or arguments.tau is not None:
        return {}
    if arguments.lengths is None:
        raise ParsFastError("--predictors needs prompts: give --lengths, at the times of --trace")
    from pars_fast.baselines import load_predictor

    file = read_length_file(arguments.lengths)
    scores: dict[tuple[int, str], Floats] = {}
    names = dict.fromkeys(name for policy in policies if (name := POLICIES[policy].predictor))
    for name in names:
        predictor = load_predictor(arguments.predictors / name)
        if (token_map := predictor.token_map) is None:
            raise ParsFastError(f"{name}: the predictor has no map from scores to tokens")
        for seed in arguments.seed:
            drawn = _drawn(arguments, file, seed, _in_tokens(predictor, token_map))
            scores[seed, name] = drawn.expected_tokens
    return scores


def _lengths(arguments: argparse.Namespace, policies: Sequence[str]) -> LengthDistribution | None:
    """The ranker's distribution, if there are prompts and a policy orders by it."""
    if arguments.lengths is None or arguments.tau is not None or arguments.ranker == "none":
        return None
    if not any(needs_distribution(policy) for policy in policies):
        return None
    from pars_fast.ranker import read_length_distribution

    return read_length_distribution(arguments.ranker)


def _in_tokens(predictor: "Predictor", token_map: TokenMap) -> PromptScorer:
    return lambda prompts: token_map(predictor.score(prompts).numpy())


def _scorer(ranker: str) -> PromptScorer | None:
    if ranker == "none":
        return None
    from pars_fast.ranker import Ranker

    return Ranker.from_pretrained(ranker).expected_tokens


def real_tau(workload: Workload) -> float | None:
    """Kendall's tau-b of the workload's own scores, None without any."""
    from pars_fast.metrics import kendall_tau

    scored = ~np.isnan(workload.expected_tokens)
    if scored.sum() < 2:
        return None
    tau = kendall_tau(workload.expected_tokens[scored], workload.output_tokens[scored].astype(np.float64))
    return None if np.isnan(tau) else round(tau, 4)


def _chosen(what: str, text: str, known: list[str]) -> list[Any]:
    chosen = known if text == "all" else text.split(",")
    for name in chosen:
        if name not in known:
            raise ParsFastError(f"no {what} {name!r}; there are: {', '.join(known)}")
    return chosen


def print_table(title: str, runs: Sequence[dict[str, Any]]) -> None:
    headers = {"policy": "policy", "guard": "guard", "load": "load", "tau": "tau", "engines": "engines",
               "mean_latency_per_token_s": "s/token", "mean_e2e_s": "e2e s", "p99_e2e_s": "p99 e2e s",
               "max_wait_s": "max wait s", "gain_captured": "gain", "gain_captured_e2e": "gain e2e"}
    table = Table(*headers.values(), title=title)
    for run in runs:
        values = (run[name] for name in headers)
        table.add_row(*("-" if v is None else v if isinstance(v, str) else f"{v:.4g}" for v in values))
    Console().print(table)
