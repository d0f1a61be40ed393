"""Processes that a test knows by their numbers, and waiting for what they do."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 300.0  # a loaded machine takes its time to import torch


def is_running(pid: int) -> bool:
    """False for a zombie, too: nobody may be there to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], Any], timeout_s: float = START_TIMEOUT_S) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
    return value
