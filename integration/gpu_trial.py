"""A GPU's kernels tried in a process of their own, before they run in the engine's.

A kernel that faults or hangs takes the CUDA context with it that it runs in, and in EngineCore that is the
served model's. So a child with a context of its own is first to load the ranker, capture its graphs and test
them (`gpu_scoring.load_kernels`). What it compiled is in Triton's cache then for EngineCore's thread, which
shares the interpreter with the steps.
"""

import argparse
import faulthandler
import functools
import os
import subprocess
import sys
import threading

from pars_fast.errors import CheckpointError, KernelError

TRIAL_TIMEOUT_S = 180.0  # with compilation; of the time that a ranker's start may take, it leaves the rest
ADVICE = "; PARS_DEVICE=cpu ranks without them"


@functools.cache  # what has passed in this process is not tried again
def try_kernels(
    ranker: str, device: str, max_programs: int | None, timeout_s: float = TRIAL_TIMEOUT_S
) -> None:
    """Wait for the trial of a ranker on a device; `max_programs` is `make_gpu_scorer`'s.

    Raises: CheckpointError: if the ranker cannot be loaded. KernelError: if the child did not end well for
        another reason; says which.
    """
    command = [sys.executable, "-m", "pars_fast.integration.gpu_trial", "--ranker", ranker,
               "--device", device, "--timeout", str(timeout_s)]  # fmt: skip
    if max_programs is not None:
        command += ["--max-programs", str(max_programs)]
    environment = {name: value for name, value in os.environ.items() if name != "PARS_ENABLE"}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, errors="replace") as child:  # fmt: skip
        assert child.stderr is not None
        said = [line for line in child.stderr.read().splitlines() if line.strip()]
    if child.returncode == 0:
        return
    if child.returncode == os.EX_DATAERR:
        raise CheckpointError(said[-1])
    reason = f"its process ended with code {child.returncode}"
    if any(line.startswith("Timeout (") for line in said):  # the watchdog's
        reason = f"it took more than {timeout_s:g} s"
    elif said and child.returncode == 1:
        reason = said[-1].removesuffix(ADVICE)
    raise KernelError(f"the kernels failed their trial: {reason}{ADVICE}")


def main(arguments: list[str] | None = None) -> int:
    """The child. Its watchdog needs no GIL and asks no driver, so it ends one that hangs in either."""
    parser = argparse.ArgumentParser(description="Tries a ranker's kernels on a GPU; started by the engine.")
    parser.add_argument("--ranker", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--max-programs", type=int)
    parser.add_argument("--timeout", type=float, required=True)
    given = parser.parse_args(arguments)
    faulthandler.dump_traceback_later(given.timeout, exit=True)
    try:
        import torch

        from pars_fast.integration.gpu_scoring import load_kernels

        load_kernels(given.ranker, device=torch.device(given.device), max_programs=given.max_programs)
    except CheckpointError as error:
        print(_first_line(error), file=sys.stderr)
        return os.EX_DATAERR
    except Exception as error:
        print(f"{type(error).__name__}: {_first_line(error)}", file=sys.stderr)
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 0


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _end_with_parent() -> None:
    """Whose end of standard input closes when it dies: memory of the GPU must not outlive the engine."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = main()
    sys.stderr.flush()
    os._exit(code)  # a context that a kernel has broken may hang in its own end
