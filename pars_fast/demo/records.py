"""What a demo run records, and the columns made from it (`design.md`: always the same columns)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pars_fast.latency_columns import latency_columns, rounded
from pars_fast.simulation.step_time import StepTime

Named = Literal["saturated", "light", "burst"]
Load = Named | float  # a number is the offered tokens/s over the engine's capacity
STEP_TIMES = ("base_s", "prefill_token_s", "decode_seq_s", "kv_token_s")  # columns: what `StepTime` has
_RESAMPLES = 2000  # of a bootstrap


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """One request as its client saw it; times in seconds since the start of the run.

    `index` is the request's place in the arrivals, the same request in every run. `output_tokens` is the
    recorded real length that was asked for. `first_token_s` is None if no token came, `finish_s` if not all
    of them did.
    """

    index: int
    source: str
    prompt_tokens: int
    output_tokens: int
    received_tokens: int
    arrival_s: float
    first_token_s: float | None
    finish_s: float | None

    @property
    def completed(self) -> bool:
        return self.finish_s is not None and self.received_tokens == self.output_tokens

    @property
    def time_to_first_token(self) -> float:
        assert self.first_token_s is not None
        return self.first_token_s - self.arrival_s

    @property
    def end_to_end_latency(self) -> float:
        assert self.finish_s is not None
        return self.finish_s - self.arrival_s

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds per token after the first; None for a one-token answer."""
        if self.output_tokens < 2:
            return None
        return (self.end_to_end_latency - self.time_to_first_token) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Run:
    """All requests served under one policy at one load.

    `scored_total`, `fallback_total`, `preemptions` and `prefix_hit_tokens` (of prompts) are the server's
    counters over this run, and `mean_score_latency_s` is the time from a prompt's hand-over to the ranker
    until its score was taken. `stock` marks the run on a server without pars-fast. `step_time` is fitted to
    the steps of this run, None where they were not written down or too few.
    """

    policy: str
    load: Load
    repeat: int
    requests: tuple[ServedRequest, ...]
    scored_total: int = 0
    fallback_total: int = 0
    step_overhead_us_p50: float | None = None
    stock: bool = False
    preemptions: int = 0
    mean_score_latency_s: float | None = None
    step_time: StepTime | None = None
    prefix_hit_tokens: int = 0

    def columns(self) -> dict[str, Any]:
        """The row of this run in tables and JSON."""
        return {
            "policy": self.policy,
            "load": self.load,
            "repeat": self.repeat,
            "stock": self.stock,
            **latency_columns(*self.times_s(), np.array([r.output_tokens for r in self.requests], np.int64)),
            "preemptions": self.preemptions,
            "scored_total": self.scored_total,
            "fallback_total": self.fallback_total,
            "mean_score_latency_s": self.mean_score_latency_s and rounded(self.mean_score_latency_s),
            "step_overhead_us_p50": self.step_overhead_us_p50,
            **self.step_times(),
        }

    def times_s(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Arrival, first token and finish of all requests, each (n,); the last two are NaN if one did not
        complete."""
        times = [(r.arrival_s, r.first_token_s, r.finish_s) if r.completed else (r.arrival_s, None, None)
                 for r in self.requests]
        arrival_s, first_token_s, finish_s = np.array(times, dtype=np.float64).reshape(-1, 3).T
        return arrival_s, first_token_s, finish_s

    def step_times(self) -> dict[str, float | None]:
        """Columns `STEP_TIMES`, seconds."""
        return {name: getattr(self.step_time, name, None) for name in STEP_TIMES}


def mean_over_repeats(runs: Sequence[Run], policy: str, load: Load, column: str) -> float | None:
    """Mean of one column over the repeats of (policy, load) on the ranked server; None without a value."""
    chosen = [run for run in runs if (run.policy, run.load, run.stock) == (policy, load, False)]
    values = [run.columns()[column] for run in chosen]
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept else None


def gain_captured(fcfs: float, policy: float, oracle: float) -> float | None:
    """(FCFS - x) / (FCFS - oracle); None where the oracle gains under 5 %, since the ratio is noise there."""
    if fcfs - oracle < 0.05 * fcfs:
        return None
    return (fcfs - policy) / (fcfs - oracle)


def paired_ratio(runs: Sequence[Run], policy: str, base: str, load: Load,
                 measure: Callable[[ServedRequest], float | None]) -> dict[str, Any] | None:
    """Mean of a measure under `policy` over that under `base`, with a 95 % bootstrap interval.

    A pair is the same request of the same repeat under both policies; pairs are resampled. None without any.
    """
    pairs = {
        name: {(run.repeat, request.index): value
               for run in runs if (run.policy, run.load) == (name, load)
               for request in run.requests if request.completed and (value := measure(request)) is not None}
        for name in (policy, base)
    }
    common = sorted(pairs[policy].keys() & pairs[base].keys())
    if not common:
        return None
    ours, others = (np.array([pairs[name][key] for key in common]) for name in (policy, base))
    picks = np.random.default_rng(0).integers(len(common), size=(_RESAMPLES, len(common)))
    low, high = np.percentile(ours[picks].mean(axis=1) / others[picks].mean(axis=1), [2.5, 97.5])
    return {"mean": float(ours.mean() / others.mean()), "ci95": [float(low), float(high)]}
