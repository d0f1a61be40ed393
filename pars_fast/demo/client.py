"""Sends the demo's requests over HTTP and notes when tokens come back.

Each request asks for exactly its recorded number of tokens (`max_tokens` with `ignore_eos`) and streams,
as users do.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import numpy as np
from numpy.typing import NDArray

from pars_fast.demo.records import ServedRequest

REQUEST_TIMEOUT_S = 3600.0  # where a queue grows for minutes, who is passed waits for minutes

Progress = Callable[[], None]


class Offered(Protocol):
    """What is sent: text or token ids, and the length of its answer. `source` says where it is from."""

    @property
    def source(self) -> str: ...
    @property
    def prompt(self) -> str | Sequence[int]: ...
    @property
    def output_tokens(self) -> int: ...


@dataclass(slots=True)
class _Answer:
    """`chunks` are (time, number of tokens) as they came."""

    prompt_tokens: int = 0
    tokens: int = 0
    chunks: list[tuple[float, int]] = field(default_factory=list)

    def take(self, total_tokens: int) -> None:
        if total_tokens > self.tokens:
            self.chunks.append((time.perf_counter(), total_tokens - self.tokens))
            self.tokens = total_tokens


def serve_arrivals(
    url: str, model: str, sample: Sequence[Offered], arrivals: NDArray[np.float64], done: Progress,
    xargs: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[ServedRequest, ...]:
    """Send prompt i at `arrivals[i]` seconds from now, whatever became of the others (open loop).

    `done` is called after each finished request, `xargs[i]` goes as its `vllm_xargs`. A request that fails is
    returned as not completed.
    """
    return asyncio.run(_serve_arrivals(url, model, sample, arrivals, done, xargs or [{}] * len(sample)))


def closed_loop_capacity(
    url: str, model: str, sample: Iterable[Offered], clients: int, done: Progress
) -> float:
    """Output tokens per second while `clients` clients each send their next prompt as one is answered.

    Measured until the last prompt is sent: after that the engine runs empty. So it takes several prompts a
    client; with one or fewer it is 0.
    """
    return asyncio.run(_closed_loop_capacity(url, model, sample, clients, done))


async def _serve_arrivals(
    url: str, model: str, sample: Sequence[Offered], arrivals: NDArray[np.float64], done: Progress,
    xargs: Sequence[Mapping[str, Any]],
) -> tuple[ServedRequest, ...]:
    async with _session() as session:
        start = time.perf_counter() + 0.1

        async def serve(index: int) -> ServedRequest:
            due = float(arrivals[index])
            await asyncio.sleep(start + due - time.perf_counter())
            answer = await _stream(session, url, model, sample[index], xargs[index])
            done()
            complete = answer.tokens == sample[index].output_tokens
            return ServedRequest(
                index=index,
                source=sample[index].source,
                prompt_tokens=answer.prompt_tokens,
                output_tokens=sample[index].output_tokens,
                received_tokens=answer.tokens,
                arrival_s=due,
                first_token_s=answer.chunks[0][0] - start if answer.chunks else None,
                finish_s=answer.chunks[-1][0] - start if complete else None,
            )

        return tuple(await asyncio.gather(*(serve(index) for index in range(len(sample)))))


async def _closed_loop_capacity(
    url: str, model: str, sample: Iterable[Offered], clients: int, done: Progress
) -> float:
    prompts = iter(sample)
    tokens: list[tuple[float, int]] = []
    last_sent = start = time.perf_counter()
    async with _session() as session:

        async def client() -> None:
            nonlocal last_sent
            for prompt in prompts:
                last_sent = time.perf_counter()
                tokens.extend((await _stream(session, url, model, prompt, {})).chunks)
                done()

        await asyncio.gather(*(client() for _ in range(clients)))
    return sum(count for at, count in tokens if at <= last_sent) / (last_sent - start)


def _session() -> aiohttp.ClientSession:
    # A connection each: the server closes idle ones after 5 s, and a request sent just then is lost.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S))


async def _stream(
    session: aiohttp.ClientSession, url: str, model: str, prompt: Offered, xargs: Mapping[str, Any]
) -> _Answer:
    """What came back; of a request that failed, what came before."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt.prompt,
        "max_tokens": prompt.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **({"vllm_xargs": xargs} if xargs else {}),
    }
    answer = _Answer()
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
        async with session.post(f"{url}/v1/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    usage = json.loads(line[6:]).get("usage") or {}
                    answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
                    answer.take(usage.get("completion_tokens", 0))
    return answer
