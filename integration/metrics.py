"""Counters from EngineCore to the server's `/metrics`.

The counters live in the EngineCore process, `/metrics` in the API server. Each engine writes its counters
to a small memory-mapped file of doubles, a write of a few hundred nanoseconds; a Prometheus collector in
the API server reads the files of all engines when it is scraped.
"""

import mmap
import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# name, type, help. The order is the layout of the file.
METRICS: tuple[tuple[str, str, str], ...] = (
    ("pars_scored", "counter", "Waiting requests that got a score"),
    ("pars_submitted", "counter", "Prompts sent to the ranker"),
    ("pars_fallback_prompt", "counter", "Prompts that could not be scored"),
    ("pars_fallback_ranker", "counter", "Times the ranker failed or hung and the order fell back to arrival"),
    ("pars_fallback_error", "counter", "Exceptions in the integration, answered with arrival order"),
    ("pars_overtakes", "counter", "Admissions ahead of an older waiting request"),
    ("pars_guard_promotions", "counter", "Admissions decided by the guard"),
    ("pars_active", "gauge", "1 while the queue is ranked, 0 while it is in arrival order"),
    ("pars_waiting", "gauge", "Requests in the ranked waiting queue"),
    ("pars_step_overhead_us_p50", "gauge", "Median time that ranking adds to a scheduling step, in us"),
)
NAMES = tuple(name for name, _, _ in METRICS)
_LAYOUT = struct.Struct(f"{len(METRICS)}d")


class CounterFile:
    """The counters of one engine; `write` shows `values` to readers. Without a folder they stay in memory."""

    def __init__(self, directory: str | None, engine: int) -> None:
        self.values = dict.fromkeys(NAMES, 0.0)
        self._map: mmap.mmap | None = None
        if directory:
            with open(Path(directory) / f"engine_{engine}.bin", "w+b") as file:
                file.truncate(_LAYOUT.size)
                self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        self.write()

    def write(self) -> None:
        if self._map is not None:
            _LAYOUT.pack_into(self._map, 0, *self.values.values())


def read_counters(directory: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """{engine: {name: value}} of all engines that write to `directory`."""
    return {
        path.stem.removeprefix("engine_"): dict(zip(NAMES, _LAYOUT.unpack(content), strict=True))
        for path in sorted(Path(directory).glob("engine_*.bin"))
        if len(content := path.read_bytes()) == _LAYOUT.size
    }


class _Collector:
    """Prometheus collector over the counter files; label `engine` is vLLM's data-parallel rank."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        counters = read_counters(self._directory)
        for name, kind, description in METRICS:
            base, _, reason = name.partition("_fallback_")
            if reason:
                continue
            family_cls = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            family = family_cls(base, description, labels=["engine"])
            for engine, values in counters.items():
                family.add_metric([engine], values[name])
            yield family
        labels = ["engine", "reason"]
        fallback = CounterMetricFamily("pars_fallback", "Fallbacks to arrival order", labels=labels)
        for engine, values in counters.items():
            for name in NAMES:
                if name.startswith("pars_fallback_"):
                    fallback.add_metric([engine, name.removeprefix("pars_fallback_")], values[name])
        yield fallback


def register_collector(directory: str) -> None:
    """Show the counters in this process's Prometheus registry, which vLLM's `/metrics` serves."""
    from prometheus_client import REGISTRY

    collector = _Collector(directory)
    REGISTRY.register(collector)
    weakref.finalize(collector, _remove_folder, directory)


def _remove_folder(directory: str) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)
