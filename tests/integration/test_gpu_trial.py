"""The trial of the kernels in a child process, however it ends; what it does is in `test_gpu_scoring.py`."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pars_fast.errors import CheckpointError, KernelError
from pars_fast.integration.gpu_trial import try_kernels
from tests.processes import children, is_running, wait_for


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the trial passes")
def test_a_trial_without_a_gpu_fails_and_says_why(ranker_dir: Path) -> None:
    with pytest.raises(KernelError, match=r"failed their trial: \w+Error: .+; PARS_DEVICE=cpu"):
        try_kernels(str(ranker_dir), "cuda:0", None)


@pytest.fixture
def hanging_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes started from here on hang when they import torch, as they may in a driver."""
    (tmp_path / "torch.py").write_text("import time; time.sleep(3600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("hanging_torch")
def test_a_trial_that_hangs_ends_itself(ranker_dir: Path) -> None:
    with pytest.raises(KernelError, match=r"failed their trial: it took more than 0\.5 s; PARS"):
        try_kernels(str(ranker_dir), "cuda:0", None, 0.5)


@pytest.mark.usefixtures("hanging_torch")
def test_a_trial_ends_with_the_engine_that_started_it(ranker_dir: Path) -> None:
    code = ("from pars_fast.integration.gpu_trial import try_kernels\n"
            f"try_kernels({str(ranker_dir)!r}, 'cuda:0', None)")
    engine = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    (trial,) = wait_for(lambda: children(engine.pid))
    time.sleep(1.0)  # it waits for its end of standard input by now
    assert is_running(trial)
    engine.kill()
    engine.wait()
    wait_for(lambda: not is_running(trial), 60.0)


@pytest.mark.parametrize(("code", "error", "said"), [
    ("raise SystemExit(3)", KernelError, "failed their trial: its process ended with code 3;"),
    ("import os; os.abort()", KernelError, "failed their trial: its process ended with code -6;"),
    ('import os, sys; print("mine: no weights", file=sys.stderr); sys.exit(os.EX_DATAERR)', CheckpointError,
     "^mine: no weights$"),
])  # fmt: skip
def test_a_trial_whose_process_dies_says_so(
    code: str, error: type[Exception], said: str, ranker_dir: Path, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A ranker that cannot be loaded is no fault of the GPU."""
    executable = tmp_path / "python"
    executable.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}'\n")
    executable.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(executable))
    with pytest.raises(error, match=said):
        try_kernels(str(ranker_dir), f"cuda:{code}", None)
