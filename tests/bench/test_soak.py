"""What the soak concludes from its samples; the soak itself runs by hand."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="the soak's users; vLLM brings it")

from bench.soak import _resident_mib, _write_csv, of_process


def test_growth_is_from_the_third_quarter_to_the_last() -> None:
    mib = [10.0, 50.0, 90.0, 100.0, 100.0, 100.0, 130.0, 110.0]
    memory = [(5.0 * sample, {"engine": resident}) for sample, resident in enumerate(mib)]
    assert of_process(memory, "engine") == {"mib_start": 10, "mib_end": 110, "mib_max": 130, "growth": 0.2}
    assert of_process(memory, "ranker")["growth"] == 0.0  # there was none
    assert "growth" not in of_process(memory[:3], "engine")


def test_memory_is_counted_by_process() -> None:
    code = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, "ranker_process"]
    before = _resident_mib(os.getpid())
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()  # it runs
        now = _resident_mib(os.getpid())
        child.communicate()
    assert now["ranker"] > before["ranker"]
    assert now["engine"] == before["engine"]


def test_csv_has_a_row_for_each_process(tmp_path: Path) -> None:
    figures = of_process([(0.0, {"engine": 100.0, "ranker": 50.0})], "engine")
    report: dict[str, Any] = {
        "minutes": 1.0, "wrong": 0, "processes": {"engine": figures, "ranker": figures},
        "counters": {"pars_scored_total": 7.0}, "machine": {"cpu": "some"}, "memory_mib": [],
    }
    _write_csv(tmp_path / "soak.csv", report)
    with (tmp_path / "soak.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["process"] for row in rows] == ["engine", "ranker"]
    assert rows[0] | {"mib_end": "100.0", "pars_scored_total": "7.0", "cpu": "some"} == rows[0]
