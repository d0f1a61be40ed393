"""The processes of a pool work, and none is left when whoever started them is killed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from pars_fast.worker_pool import worker_pool
from tests.processes import is_running

OWNER = """
import os, time
from pars_fast.worker_pool import worker_pool

if __name__ == "__main__":
    with worker_pool(2) as pool:
        print(*{future.result() for future in [pool.submit(os.getpid) for _ in range(8)]}, flush=True)
        time.sleep(600)
"""


def test_it_works() -> None:
    with worker_pool(2, os.chdir, ("/",)) as pool:
        assert [future.result() for future in [pool.submit(os.getcwd) for _ in range(3)]] == ["/"] * 3


def test_its_processes_end_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            pids = [int(pid) for pid in owner.stdout.readline().split()]
            assert pids
        finally:
            owner.kill()
    wait_for_the_end(pids)


def test_an_error_inside_does_not_wait_for_what_runs() -> None:
    pids: set[int] = set()

    def give_up() -> None:
        with worker_pool(2) as pool:
            pids.update(future.result() for future in [pool.submit(os.getpid) for _ in range(8)])
            for _ in range(8):
                pool.submit(time.sleep, 600.0)
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        give_up()
    assert pids
    wait_for_the_end(pids)


def wait_for_the_end(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + 60.0
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
