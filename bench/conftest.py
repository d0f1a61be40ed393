"""The suite's own rules: `bench_*.py` files and functions, all cores, and a machine record for each run."""

import os
from typing import Any

import pytest
import torch

from pars_fast.bench_table import software_versions


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


def pytest_sessionstart() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["versions"] = software_versions()
