"""What the demo's page is drawn from: the recorded runs, and what several parts of the page need of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pars_fast.demo.records import Load, Run, ServedRequest
from pars_fast.page import DASH as _DASH
from pars_fast.page import as_float as _as_float

BASELINE, OURS, ORACLE = "fcfs", "pars_fast", "oracle"
DESCRIPTIONS = {BASELINE: "arrival order", ORACLE: "knows every length"}


@dataclass(frozen=True)
class Data:
    """The input, with what several parts of the page need from it."""

    runs: tuple[Run, ...]  # without stock runs
    rows: tuple[dict[str, Any], ...]  # columns of each run
    expected_tokens: tuple[float, ...]
    summary: Mapping[str, Any]
    policies: tuple[str, ...]
    sources: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[Run], expected_tokens: Sequence[float], summary: Mapping[str, Any]) -> "Data":
        kept = tuple(run for run in runs if not run.stock)
        known = (BASELINE, OURS, ORACLE)
        found = {run.policy for run in kept}
        policies = tuple(p for p in known if p in found) + tuple(sorted(found.difference(known)))
        sources = tuple(sorted({request.source for run in kept for request in run.requests}))
        rows = tuple(run.columns() for run in kept)
        return cls(kept, rows, tuple(expected_tokens), summary, policies, sources)

    def values(self, policy: str, load: Load, column: str) -> list[float]:
        """One value per repeat, repeats without one left out."""
        return [row[column] for row in self.rows
                if (row["policy"], row["load"]) == (policy, load) and row[column] is not None]

    def mean(self, policy: str, column: str, load: Load = "saturated") -> float | None:
        values = self.values(policy, load, column)
        return float(np.mean(values)) if values else None

    def requests(self, policy: str, load: Load = "saturated") -> list[ServedRequest]:
        """Requests of all repeats, end to end."""
        runs = [run for run in self.runs if (run.policy, run.load) == (policy, load)]
        return [request for run in runs for request in run.requests]

    def first_repeat(self) -> dict[str, Run]:
        """The saturated run of each policy in the first repeat that all of them have."""
        by_repeat: dict[int, dict[str, Run]] = {}
        for run in self.runs:
            if run.load == "saturated":
                by_repeat.setdefault(run.repeat, {})[run.policy] = run
        if not by_repeat:
            return {}
        return by_repeat[min(by_repeat, key=lambda repeat: (-len(by_repeat[repeat]), repeat))]

    def expected(self, index: int) -> float | None:
        if not 0 <= index < len(self.expected_tokens):
            return None
        value = self.expected_tokens[index]
        return value if value is not None and math.isfinite(value) and value > 0 else None

    def get(self, *keys: str) -> Any:
        value: Any = self.summary
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def text(self, *keys: str) -> str:
        value = self.get(*keys)
        return _DASH if value is None else str(value)

    def style(self, policy: str) -> str:
        """CSS class of a policy: its one colour on the whole page."""
        if policy in (BASELINE, OURS, ORACLE):
            return policy
        others = [p for p in self.policies if p not in (BASELINE, OURS, ORACLE)]
        return f"other{others.index(policy) % 2}"


def end_to_end_latency(request: ServedRequest) -> float:
    return request.end_to_end_latency


def latency_per_token(request: ServedRequest) -> float:
    return request.end_to_end_latency / request.output_tokens


def unique_requests(data: Data) -> dict[int, ServedRequest]:
    found: dict[int, ServedRequest] = {}
    for run in data.runs:
        if run.load == "saturated":
            for request in run.requests:
                found.setdefault(request.index, request)
    return dict(sorted(found.items()))


def mean_waits(data: Data, policy: str) -> dict[int, float]:
    waits: dict[int, list[float]] = {}
    for request in data.requests(policy):
        if request.first_token_s is not None:
            waits.setdefault(request.index, []).append(request.time_to_first_token)
    return {index: float(np.mean(values)) for index, values in waits.items()}


def light_interval(data: Data) -> tuple[float, float, float] | None:
    """Mean, low and high of the paired ratio of TTFT."""
    interval = data.get("light_ttft_ratio", "ci95")
    mean = _as_float(data.get("light_ttft_ratio", "mean"))
    if mean is None or not isinstance(interval, Sequence) or len(interval) != 2:
        return None
    low, high = _as_float(interval[0]), _as_float(interval[1])
    return None if low is None or high is None else (mean, low, high)


def light_runs(data: Data) -> list[Run]:
    return [run for run in data.runs if (run.policy, run.load) == (OURS, "light")]
