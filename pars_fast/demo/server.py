"""Start and stop a vLLM OpenAI server on this machine, and read its counters."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pars_fast.errors import ParsFastError

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
END_TIMEOUT_S = 2.0


class ServerError(ParsFastError):
    """The vLLM server did not start, ended, or answered nothing; of one that ended, its log's end is told."""


@contextlib.contextmanager
def vllm_server(
    model: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[str]:
    """Serve `model` on a free loopback port while the block runs; gives the base URL.

    `environment` is added to this process's, less its own `PARS_*` variables. The log goes to `log`.

    Raises: ServerError: if the server is not healthy within START_TIMEOUT_S, or ended and the block failed.
    """
    port = _free_port()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PARS_")}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model,
               "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("wb") as output:
        # A process group of its own, so that the engine's child processes can be ended with it. Not a
        # session: Linux would schedule that as a group against ours (autogroup), and the
        # engine's loops on sched_yield were then seen to keep the client off the cores for seconds.
        process = subprocess.Popen(command, env={**inherited, **environment}, stdout=output,
                                   stderr=subprocess.STDOUT, process_group=0)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, process, log)
        try:
            yield url
        except Exception as error:
            if _has_ended(process):  # the likely cause, and its log may not outlive the block's caller
                raise ServerError(f"the vLLM server ended; {_tail(log)}") from error
            raise
    finally:
        _stop(process)


def read_metrics(url: str) -> dict[str, float]:
    """Samples of `/metrics` summed over their labels, by name."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name] = samples.get(sample.name, 0.0) + sample.value
    return samples


def _wait_until_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
            return
        time.sleep(0.25)
    raise ServerError(f"the vLLM server did not start; {_tail(log)}")


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Waits a little: one that takes no more connections may be about to end."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_TIMEOUT_S)
    return process.returncode is not None


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(["the end of its log:", *lines[-20:]])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
