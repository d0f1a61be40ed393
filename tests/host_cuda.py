"""CUDA's streams, events and graphs on the host, for code that captures kernels and replays them.

As on a GPU a capture runs nothing: it remembers the kernels that are launched and their arguments, and a
replay launches those again, on the same memory. Kernels run in Triton's interpreter.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

HOST = torch.device("cpu")


class Stream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.device = HOST

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self, **_: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Graph:
    """Attributes: launches: what `replay` calls."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], object]] = []

    def replay(self) -> None:
        for launch in self.launches:
            launch()


def use_host_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what the project uses of `torch.cuda`; tensors and kernels stay on the CPU."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__
    captured: list[Graph] = []

    def launch_or_capture(self: Any, *arguments: Any, **options: Any) -> None:
        if captured:
            captured[-1].launches.append(partial(launch, self, *arguments, **options))
        else:
            launch(self, *arguments, **options)

    @contextlib.contextmanager
    def capture(graph: Graph, **_: Any) -> Iterator[None]:
        captured.append(graph)
        yield
        captured.pop()

    monkeypatch.setattr(GridExecutor, "__call__", launch_or_capture)
    for name, stand_in in {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "graph_pool_handle": lambda: None,
        "mem_get_info": lambda device: (0, 0),
        "memory_reserved": lambda device: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("zeros", "empty"):
        monkeypatch.setattr(torch, name, _unpinned(getattr(torch, name)))


def _unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def unpinned(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return make(*arguments, **options)

    return unpinned
