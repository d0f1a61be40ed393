"""The suite's own rules: `bench_*.py` files and functions, all cores, and provenance for each run."""

from typing import Any

import pytest
import torch

from pars_fast.bench_results import all_threads, machine


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


def pytest_sessionstart() -> None:
    torch.set_num_threads(all_threads())


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    # The table is the CPU's, whatever else the machine has.
    machine_info["provenance"] = machine(torch.get_num_threads()) | {"gpu": ""}
