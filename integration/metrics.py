"""Counters from EngineCore to the server's `/metrics`.

The counters live in the EngineCore process, `/metrics` in the API servers. Each engine keeps its counters in
a small memory-mapped file of doubles, where a write takes a few hundred nanoseconds; a Prometheus collector
in every API server reads the files of all engines when it is scraped.
"""

import atexit
import logging
import mmap
import os
import shutil
import struct
import tempfile
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

logger = logging.getLogger("vllm.pars_fast")

# name, type, help. The order is the layout of the file; histograms follow.
METRICS: tuple[tuple[str, str, str], ...] = (
    ("pars_scored", "counter", "Scores taken, of waiting requests and of running ones predicted anew"),
    ("pars_submitted", "counter", "Prompts sent to the ranker, those predicted anew among them"),
    ("pars_fallback_prompt", "counter", "Prompts that could not be scored"),
    ("pars_fallback_ranker", "counter", "Times the ranker failed or hung and the order fell back to arrival"),
    ("pars_fallback_calibration", "counter", "Times the order fell back to arrival since scores did not fit"),
    ("pars_fallback_error", "counter", "Exceptions in the integration, answered with arrival order"),
    ("pars_overtaken", "counter", "Admissions ahead of an older waiting request"),
    ("pars_guard_promotions", "counter", "Admissions decided by the guard"),
    ("pars_recorded", "counter", "Finished requests that the recording holds"),
    ("pars_record_dropped", "counter", "Finished requests that the recording could not keep"),
    ("pars_active", "gauge", "1 while the queue is ranked, 0 while it is in arrival order"),
    ("pars_waiting", "gauge", "Requests in the ranked waiting queue"),
    ("pars_kendall_tau", "gauge", "Kendall's tau-b of scores and answer lengths, NaN until known"),
    ("pars_kendall_tau_low", "gauge", "Lower end of the 95 % interval of pars_kendall_tau"),
    ("pars_kendall_tau_high", "gauge", "Upper end of the 95 % interval of pars_kendall_tau"),
    ("pars_applications", "gauge", "Applications whose expected tokens are corrected by their answers"),
    ("pars_step_overhead_us_p50", "gauge", "Median time that ranking adds to a scheduling step, in us"),
)
NAMES = tuple(name for name, _, _ in METRICS)
_UNKNOWN_AT_FIRST = ("pars_kendall_tau", "pars_kendall_tau_low", "pars_kendall_tau_high")

# name, help, upper bounds of the buckets in seconds
HISTOGRAMS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("pars_queue_wait_seconds", "Arrival to first admission, noted when the request has finished",
     (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)),
    ("pars_score_latency_seconds", "Hand-over of a prompt to the ranker until its score is taken",
     (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)),
)
_SCALARS = struct.Struct(f"{len(METRICS)}d")
_CELLS = tuple(len(bounds) + 2 for _, _, bounds in HISTOGRAMS)  # a count a bucket, +Inf included, and the sum
_LAYOUT = struct.Struct(f"{len(METRICS) + sum(_CELLS)}d")


class Histogram:
    """Counts by bucket and the sum, in cells that readers see at once."""

    def __init__(self, cells: "memoryview[float]", bounds: tuple[float, ...]) -> None:
        self._cells, self._bounds = cells, bounds

    def observe(self, value: float) -> None:
        self._cells[bisect_left(self._bounds, value)] += 1.0
        self._cells[-1] += value


class CounterFile:
    """The counters of one engine; `write` shows `values` to readers.

    They stay in memory without a folder, and where no file can be made in it, which is said. Readers see
    the newest of several engines of one number.

    Attributes:
        values: by name of METRICS.
        histograms: by name of HISTOGRAMS.
    """

    def __init__(self, directory: str | None, engine: int) -> None:
        self.values = {name: float("nan") if name in _UNKNOWN_AT_FIRST else 0.0 for name in NAMES}
        self._cells: mmap.mmap | bytearray = bytearray(_LAYOUT.size)
        if directory:
            try:
                self._cells = _new_cells(Path(directory), f"engine_{engine}.bin")
            except OSError as error:
                logger.warning("pars-fast: counters do not come to /metrics: %s", error)
        cells, first = memoryview(self._cells).cast("d"), len(METRICS)
        self.histograms: dict[str, Histogram] = {}
        for (name, _, bounds), size in zip(HISTOGRAMS, _CELLS, strict=True):
            self.histograms[name] = Histogram(cells[first : first + size], bounds)
            first += size
        self.write()

    def write(self) -> None:
        _SCALARS.pack_into(self._cells, 0, *self.values.values())


def _new_cells(directory: Path, name: str) -> mmap.mmap:
    """A file of zeros, in the place of any that was there: cut short, that one would kill whoever maps it."""
    with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
        file.write(bytes(_LAYOUT.size))  # a hole could not be filled on a full disk
        file.flush()
        cells = mmap.mmap(file.fileno(), _LAYOUT.size)
    os.replace(file.name, directory / name)
    return cells


def read_cells(directory: str | os.PathLike[str]) -> dict[str, tuple[float, ...]]:
    """{engine: all doubles of its file} of all engines that write to `directory`."""
    return {
        path.stem.removeprefix("engine_"): _LAYOUT.unpack(content)
        for path in sorted(Path(directory).glob("engine_*.bin"))
        if len(content := path.read_bytes()) == _LAYOUT.size
    }


def read_counters(directory: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """{engine: {name of METRICS: value}} of all engines that write to `directory`."""
    return {
        engine: dict(zip(NAMES, cells[: len(NAMES)], strict=True))
        for engine, cells in read_cells(directory).items()
    }


def families(directory: str | os.PathLike[str]) -> Iterator[Any]:
    """Prometheus families of all engines; label `engine` is vLLM's data-parallel rank."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    engines = read_cells(directory)
    labels = ["engine", "reason"]
    fallback = CounterMetricFamily("pars_fallback", "Fallbacks to arrival order", labels=labels)
    for cell, (name, kind, description) in enumerate(METRICS):
        base, _, reason = name.partition("_fallback_")
        if reason:
            for engine, cells in engines.items():
                fallback.add_metric([engine, reason], cells[cell])
            continue
        family_cls = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
        family = family_cls(base, description, labels=["engine"])
        for engine, cells in engines.items():
            family.add_metric([engine], cells[cell])
        yield family
    yield fallback
    first = len(METRICS)
    for (name, description, bounds), size in zip(HISTOGRAMS, _CELLS, strict=True):
        histogram = HistogramMetricFamily(name, description, labels=["engine"])
        for engine, cells in engines.items():
            *counts, total = cells[first : first + size]
            uppers = [*map(str, bounds), "+Inf"]
            histogram.add_metric([engine], list(zip(uppers, accumulate(counts), strict=True)), total)
        yield histogram
        first += size


class _Collector:
    """The families of one folder, as Prometheus's client asks for them."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def collect(self) -> Iterator[Any]:
        return families(self._directory)


def register_collector(directory: str) -> None:
    """Show the counters on this process's `/metrics`; call it once a process.

    vLLM serves prometheus_client's default registry; with several API servers every scrape makes a registry
    of its own around a `MultiProcessCollector`, so that one shows them, too.
    """
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    REGISTRY.register(_Collector(directory))
    collect = MultiProcessCollector.collect

    def collect_with_ours(self: MultiProcessCollector) -> Iterator[Any]:
        yield from collect(self)  # type: ignore[no-untyped-call]
        yield from families(directory)

    MultiProcessCollector.collect = collect_with_ours  # type: ignore[method-assign]


def remove_at_exit(directory: str) -> None:
    """Remove the folder when this process, which made it, ends."""
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
