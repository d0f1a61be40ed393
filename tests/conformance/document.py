"""`docs/conformance.md`, written from the results of all versions."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

HEAD = """# Conformance with vLLM

Written by `make conformance VLLM=x.y.z`, which makes an environment with the CPU build of that vLLM and
nothing else, takes vLLM's own tests from its source archive, and runs every file of `tests/v1` that builds
a scheduler (core, KV and EC connectors, streaming, speculation) three times: stock; with every scheduler
replaced by the ranked one and scores in order of arrival; the same with scores reversed. Every request has
its score as soon as it is queued, so the load gate is open all the time, no guard comes between, and every
step is planned ahead, as an engine does while its model runs.

What stock fails says nothing and is left out. On 0.32 these are 98 of 708: 61 build the configuration of a
model (LLaVA, Qwen) whose files are not at hand, 20 are coroutines and want a plug-in of pytest, 11 want a
GPU, 6 a module, a fixture or a file that is not there. So the scheduling of multimodal requests is not
tested here.

The command fails if, of the tests that stock passes, one fails in order of arrival, or one fails reversed
that is not named below with its reason; or if no request was popped from our queue.
"""

REVERSED = """
## Order of arrival

Tests that fail when scores are reversed, since they assert what vLLM's arrival order gives.
"""


class Ranked(TypedDict):
    """vLLM's tests under the ranked scheduler; `failed` are those that stock passes."""

    popped: int
    failed: list[str]


class Result(TypedDict):
    """What one version gave; counts by outcome: passed, failed, skipped."""

    environment: dict[str, str]
    stock: dict[str, int]
    arrival: Ranked
    reversed: Ranked


def base(test: str) -> str:
    """A test's name without its parameters."""
    return test.partition("[")[0]


def write_document(path: Path, results: Mapping[str, Result], expected: Mapping[str, str]) -> None:
    versions = sorted(results, key=_numbers, reverse=True)
    lines = [
        "| vLLM | stock passes | of these, by arrival | reversed | requests popped | environment |",
        "|---|---|---|---|---|---|",
    ]
    for version in versions:
        result = results[version]
        stock, arrival, backwards = result["stock"], result["arrival"], result["reversed"]
        cells = (
            version,
            f"{stock['passed']} of {sum(stock.values())}",
            stock["passed"] - len(arrival["failed"]),
            stock["passed"] - len(backwards["failed"]),
            f"{arrival['popped']} and {backwards['popped']}",
            ", ".join(f"{key} {value}" for key, value in result["environment"].items()),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [REVERSED, "| test | reason | in |", "|---|---|---|"]
    for test, reason in sorted(expected.items()):
        where = [version for version in versions if test in map(base, results[version]["reversed"]["failed"])]
        lines.append(f"| `{test.removeprefix('tests.v1.')}` | {reason} | {', '.join(where) or 'none'} |")
    path.write_text(HEAD + "\n" + "\n".join(lines) + "\n")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
