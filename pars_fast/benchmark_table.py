"""The terminal's view of `pars_fast.benchmark`: tau of every predictor on every file, then the tests."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pars_fast.benchmark import CEILING


class BenchmarkTable:
    """Add the results as `benchmark` yields them, then print."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._taus = Table("file", "split", "n", *names, CEILING, title="Kendall tau-b, mean over models")
        headers = ("against", "tau", "95 % interval", f"{names[0]} minus it", "95 % interval", "p")
        self._tests = Table(*headers, title="mean over files, paired bootstrap over prompts")

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        predictors = result["predictors"]
        taus = (_cell(predictors.get(column)) for column in (*self._names, CEILING))
        self._taus.add_row(name, result.get("split", ""), str(result.get("n", "")), *taus)
        if "split" in result:
            return
        for predictor, measures in predictors.items():
            tau, row = measures["kendall_tau"], [predictor]
            row += [f"{tau['mean']:.3f}", _span(tau["ci95"])]
            if (difference := measures.get("ours_minus_this")) is not None:
                row += [
                    f"{difference['mean']:+.3f}",
                    _span(difference["ci95"]),
                    f"{difference['p_value']:.3f}",
                ]
            self._tests.add_row(*row)

    def print(self) -> None:
        console = Console()
        console.print(self._taus)
        console.print(self._tests)


def _cell(measures: Mapping[str, Any] | None) -> str:
    if measures is None or measures["kendall_tau"]["mean"] is None:
        return "-"
    return f"{measures['kendall_tau']['mean']:.3f}"


def _span(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f} .. {ends[1]:.3f}"
