"""A user of a server: plain HTTP, a thread a request."""

import contextlib
import json
import os
import signal
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

TIMEOUT_S = 400.0
PAUSE_S = 3.0  # between waves, since a ranker starts when a core has nothing else to do


def lengths(count: int) -> list[int]:
    """Output tokens of each request, 5 to 60."""
    return [5 + 23 * i % 56 for i in range(count)]


class Client:
    """Sends completions to one server; `ranker` is the folder of its ranker, which is this test's own."""

    def __init__(self, url: str, model: str, ranker: Path) -> None:
        self.url, self.model, self.ranker = url, model, ranker
        self._threads = ThreadPoolExecutor(60)

    def send(self, prompts: list[str], extra: Callable[[int], dict[str, Any]]) -> "list[Future[int]]":
        """Send all prompts at once; each future gives the number of tokens that came back."""
        bodies = (self._body(prompt, n) for prompt, n in zip(prompts, lengths(len(prompts)), strict=True))
        return [self._threads.submit(self._complete, body | extra(i)) for i, body in enumerate(bodies)]

    def wave(self, prompts: list[str], extra: Callable[[int], dict[str, Any]] = lambda i: {}) -> None:
        """Send all prompts at once and check that each got exactly its tokens."""
        check(self.send(prompts, extra))

    def wave_until(self, prompts: list[str], done: Callable[[], bool]) -> None:
        """Send waves until something has happened; at least one."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            self.wave(prompts)
            if done():
                return
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(PAUSE_S)

    def abort(self, prompt: str, max_tokens: int) -> None:
        """Send a request and hang up at once, as an impatient user does; vLLM aborts it."""
        content = json.dumps(self._body(prompt, max_tokens)).encode()
        address = urllib.parse.urlsplit(self.url)
        with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
            head += f"Content-Length: {len(content)}\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)

    def scrape(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            return str(response.read().decode())

    def metric(self, sample: str) -> float:
        """The value of a sample of `/metrics`, named as Prometheus writes it."""
        lines = self.scrape().splitlines()
        (value,) = (line.rpartition(" ")[2] for line in lines if line.startswith(f"{sample} "))
        return float(value)

    def signal_ranker(self, number: signal.Signals) -> int:
        """Send a signal to the ranker's process; gives how many there were."""
        found = 0
        for pid in self.ranker_pids():
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, number)
                found += 1
        return found

    def ranker_pids(self) -> Iterator[int]:
        """Found by its folder, which no other process has on its command line."""
        for pid in (entry.name for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
            with contextlib.suppress(OSError):
                if os.fsencode(self.ranker) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    yield int(pid)

    def _body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }

    def chat(self, system: str, user: str, max_tokens: int) -> int:
        """One answer in a chat; the number of its tokens."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = self._body("", max_tokens) | {"messages": messages}
        del body["prompt"]
        return self._complete(body, "chat/completions")

    def _complete(self, body: dict[str, Any], kind: str = "completions") -> int:
        request = urllib.request.Request(
            f"{self.url}/v1/{kind}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return int(json.load(response)["usage"]["completion_tokens"])


def check(futures: "list[Future[int]]") -> None:
    assert [future.result(TIMEOUT_S) for future in futures] == lengths(len(futures))
