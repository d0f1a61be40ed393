"""Task-parallel applications, made from recorded lengths: requests that one job sends at once.

Every prompt and answer length is recorded, every time of arrival is a trace's; made up are which requests
belong together, the shares of the types, and their fan-outs (`TYPES`). An application sends all its requests
when it arrives. Where a type samples one prompt several times, the lengths are those of different models'
answers to it. Shapes follow the agents that Justitia (arXiv 2510.17015) serves: self-consistency, branching
reasoning, code in units, map-reduce over a long document, and plain requests.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pars_fast.data import LengthFile, LengthRow, read_length_file
from pars_fast.errors import DataError
from pars_fast.simulation.workload import CHARS_PER_TOKEN, Workload, make_workload, read_trace

Half = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class ApplicationType:
    """A kind of application.

    Attributes:
        source: length file (`lengths_SOURCE.jsonl[.gz]`), or trace (`trace_SOURCE.csv[.gz]`).
        share: of all applications.
        fan_out: requests, from and to, drawn uniformly.
        one_prompt: whether they are samples of one prompt, or different prompts.
    """

    source: str
    share: float
    fan_out: tuple[int, int]
    one_prompt: bool = False


TYPES: dict[str, ApplicationType] = {
    "chat": ApplicationType("just_eval", 0.30, (1, 1)),
    "best_of_n": ApplicationType("alpaca_eval", 0.20, (4, 8), one_prompt=True),
    "code_units": ApplicationType("gpteacher_codegen", 0.20, (4, 12)),
    "self_consistency": ApplicationType("zeroeval_gsm", 0.15, (8, 16), one_prompt=True),
    "branches": ApplicationType("zeroeval_math_l5", 0.10, (10, 20), one_prompt=True),
    "map_reduce": ApplicationType("arxiv_lengths_noarrival", 0.05, (8, 24)),
}

Requests = tuple[NDArray[np.int64], NDArray[np.int64]]  # prompt tokens, output tokens


class Sources:
    """What the types draw from, one half of it: prompts of a train or of a test split.

    Validation prompts count as test; a trace's requests are halved by their number.
    """

    def __init__(self, lengths: Mapping[str, LengthFile], traces: Mapping[str, Workload], half: Half) -> None:
        splits = ("train",) if half == "train" else ("val", "test")
        self._rows = {
            name: [row for row in file.rows if row.split in splits and row.output_tokens]
            for name, file in lengths.items()
        }
        first = 0 if half == "train" else 1
        self._traces = {name: trace.take(np.arange(first, len(trace), 2)) for name, trace in traces.items()}
        for name, kept in (self._rows | self._traces).items():
            if not len(kept):
                raise DataError(f"{name}: no prompts of the {half} half")

    def draw(self, kind: ApplicationType, rng: np.random.Generator) -> Requests:
        """The requests of one application."""
        count = int(rng.integers(kind.fan_out[0], kind.fan_out[1] + 1))
        if kind.source in self._traces:
            trace = self._traces[kind.source]
            picks = rng.integers(len(trace), size=count)
            return trace.prompt_tokens[picks], trace.output_tokens[picks]
        rows = self._rows[kind.source]
        if kind.one_prompt:
            row = rows[rng.integers(len(rows))]
            outputs = rng.choice(
                list(row.output_tokens.values()), count, replace=count > len(row.output_tokens)
            )
            return np.full(count, _prompt_tokens(row)), outputs.astype(np.int64)
        picked = [rows[i] for i in rng.integers(len(rows), size=count)]
        outputs = np.array([rng.choice(list(row.output_tokens.values())) for row in picked], np.int64)
        return np.array([_prompt_tokens(row) for row in picked]), outputs


def _prompt_tokens(row: LengthRow) -> int:
    return max(1, len(row.prompt) // CHARS_PER_TOKEN)


def read_sources(folder: Path, half: Half) -> Sources:
    """The files that `TYPES` name, from a folder.

    Raises: DataError: names a file that is missing or cannot be read.
    """
    lengths, traces = {}, {}
    for name in {kind.source for kind in TYPES.values()}:
        found = [
            path
            for pattern in (f"lengths_{name}.jsonl*", f"trace_{name}.csv*")
            for path in sorted(folder.glob(pattern))
        ]
        if not found:
            raise DataError(f"{folder}: has neither lengths_{name}.jsonl[.gz] nor trace_{name}.csv[.gz]")
        if found[0].name.startswith("trace_"):
            traces[name] = read_trace(found[0])
        else:
            lengths[name] = read_length_file(found[0])
    return Sources(lengths, traces, half)


def make_applications(sources: Sources, arrivals: Workload, count: int, *, seed: int) -> Workload:
    """`count` applications at the first `count` times of a trace, counted from the first.

    A request's `app` is `type/number`, numbered in order of arrival.

    Raises: DataError: if `arrivals` has fewer than `count` requests.
    """
    if len(arrivals) < count:
        raise DataError(f"{arrivals.name}: {len(arrivals)} arrivals for {count} applications")
    rng = np.random.default_rng((seed, 5))
    kinds = rng.choice(list(TYPES), count, p=[kind.share for kind in TYPES.values()])
    drawn = [sources.draw(TYPES[kind], rng) for kind in kinds]
    sizes = [len(outputs) for _, outputs in drawn]
    times = arrivals.arrival_s[:count] - arrivals.arrival_s[0]
    apps = [f"{kind}/{number}" for number, kind in enumerate(kinds)]
    return make_workload(
        f"applications@{arrivals.name}",
        np.repeat(times, sizes),
        np.concatenate([prompts for prompts, _ in drawn]),
        np.concatenate([outputs for _, outputs in drawn]),
        app=np.repeat(apps, sizes),
    )


def write_trace(path: Path, workload: Workload) -> None:
    """Write a workload with applications as `read_trace` reads it, without scores."""
    apps = [""] * len(workload) if workload.app is None else workload.app.tolist()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("arrival_s", "prompt_tokens", "output_tokens", "app"))
        writer.writerows(
            zip(
                workload.arrival_s.tolist(),
                workload.prompt_tokens.tolist(),
                workload.output_tokens.tolist(),
                apps,
                strict=True,
            )
        )
