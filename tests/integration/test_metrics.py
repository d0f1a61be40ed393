"""Counters from the engine's file to the text that Prometheus reads."""

import math
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from pars_fast.integration.metrics import (
    METRICS,
    CounterFile,
    _Collector,
    read_counters,
    register_collector,
)
from pars_fast.integration.overhead import OverheadMedian


def test_counters_travel_through_the_file(tmp_path: Path) -> None:
    engines = [CounterFile(str(tmp_path), engine) for engine in (0, 1)]
    engines[0].values["pars_scored"] += 5
    engines[1].values["pars_waiting"] = -0.25
    assert read_counters(tmp_path)["0"]["pars_scored"] == 0  # not yet written
    for engine in engines:
        engine.write()
    counters = read_counters(tmp_path)
    assert counters.keys() == {"0", "1"}
    for rank, changed in (("0", {"pars_scored": 5.0}), ("1", {"pars_waiting": -0.25})):
        values = counters[rank]
        unknown = {name for name, value in values.items() if math.isnan(value)}
        assert unknown == {"pars_kendall_tau", "pars_kendall_tau_low", "pars_kendall_tau_high"}
        known = {name: value for name, value in values.items() if name not in unknown}
        assert known == dict.fromkeys(known, 0.0) | changed


def test_a_restarted_engine_starts_from_zero(tmp_path: Path) -> None:
    first = CounterFile(str(tmp_path), 0)
    first.values["pars_scored"] = 9.0
    first.write()
    CounterFile(str(tmp_path), 0)
    assert read_counters(tmp_path)["0"]["pars_scored"] == 0


def test_two_engines_of_one_number_do_not_touch_each_others_counters(tmp_path: Path) -> None:
    """As two `LLM`s of one process; to cut a file that is mapped would end its engine by a signal."""
    first, second = CounterFile(str(tmp_path), 0), CounterFile(str(tmp_path), 0)
    second.values["pars_scored"] = 2.0
    second.write()
    first.values["pars_scored"] = 9.0
    first.write()
    assert read_counters(tmp_path)["0"]["pars_scored"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["engine_0.bin"]


def test_a_folder_that_is_gone_stops_no_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counters = CounterFile(str(tmp_path / "gone"), 0)
    counters.values["pars_scored"] += 1
    counters.write()
    assert "pars-fast: counters do not come to /metrics: [Errno 2] No such file or directory" in caplog.text


def test_without_a_folder_counters_stay_in_memory() -> None:
    counters = CounterFile(None, 0)
    counters.values["pars_scored"] += 1
    counters.write()
    assert counters.values["pars_scored"] == 1


def test_files_that_are_not_ours_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "engine_0.bin").write_bytes(b"short")
    (tmp_path / "notes.txt").write_text("hello")
    assert read_counters(tmp_path) == {}
    assert read_counters(tmp_path / "gone") == {}


def test_what_prometheus_reads(tmp_path: Path) -> None:
    counters = CounterFile(str(tmp_path), 3)
    counters.values |= {"pars_scored": 7.0, "pars_fallback_ranker": 2.0, "pars_waiting": 11.0}
    counters.write()
    for wait_s in (0.01, 0.04, 700.0):  # on a bound, inside, past the last
        counters.histograms["pars_queue_wait_seconds"].observe(wait_s)
    registry = CollectorRegistry()
    registry.register(_Collector(str(tmp_path)))
    text = generate_latest(registry).decode()
    for line in (
        "# TYPE pars_scored_total counter",
        'pars_scored_total{engine="3"} 7.0',
        'pars_fallback_total{engine="3",reason="ranker"} 2.0',
        'pars_fallback_total{engine="3",reason="prompt"} 0.0',
        'pars_fallback_total{engine="3",reason="error"} 0.0',
        'pars_kendall_tau{engine="3"} NaN',
        "# TYPE pars_queue_wait_seconds histogram",
        'pars_queue_wait_seconds_bucket{engine="3",le="0.001"} 0.0',
        'pars_queue_wait_seconds_bucket{engine="3",le="0.01"} 1.0',
        'pars_queue_wait_seconds_bucket{engine="3",le="600.0"} 2.0',
        'pars_queue_wait_seconds_bucket{engine="3",le="+Inf"} 3.0',
        'pars_queue_wait_seconds_sum{engine="3"} 700.05',
        'pars_score_latency_seconds_count{engine="3"} 0.0',
        "# TYPE pars_waiting gauge",
        'pars_waiting{engine="3"} 11.0',
    ):
        assert line in text.splitlines()
    for name, _, description in METRICS:
        if "_fallback_" not in name:
            assert f"{description}\n" in text


def test_the_collector_lives_in_the_default_registry(tmp_path: Path) -> None:
    before = set(REGISTRY._collector_to_names)
    CounterFile(str(tmp_path), 0)
    register_collector(str(tmp_path))
    (collector,) = set(REGISTRY._collector_to_names) - before
    try:
        assert b"pars_scored_total" in generate_latest(REGISTRY)
    finally:
        REGISTRY.unregister(collector)


@pytest.mark.parametrize(
    ("spent_ns", "median_us"),
    [([], 0.0), ([1500], 1.5), ([1000, 2000, 9_999_999], 2.5), ([10**12], 1999.5), ([999, 5000, 5999], 5.5)],
)
def test_overhead_median(spent_ns: list[int], median_us: float) -> None:
    overhead = OverheadMedian()
    for value in spent_ns:
        overhead.add(value)
    assert overhead.median_us() == median_us
