"""The GPU cases: what one is, and the list of all.

A kernel's benchmark is a module with `cases() -> Iterator[Case]`, named in MODULES. Making a case touches no
GPU, so that the whole list exists, and is written down as not measured, on any machine; `setup` puts inputs
on the GPU, warms up, and gives the call that is timed.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.timers import Call, Timer, gpu_time
from pars_fast.bench_results import Row, Shape, Times

MODULES = ("gpu_peaks", "gpu_scoring", "gpu_queue", "gpu_serving")


@dataclass(frozen=True, slots=True)
class Case:
    """One op of one provider at one shape.

    Attributes:
        op, provider, shape: name the row; no two cases have all three in common.
        setup: () -> the call to time; runs on a GPU only. May raise: then the row is not measured.
        bytes_moved, flops: what the op cannot do without, the same for all its providers.
        baseline: the provider it is compared with in the printed table.
        timer: how the call is timed.
    """

    op: str
    provider: str
    shape: Shape
    setup: Callable[[], Call]
    bytes_moved: int | None = None
    flops: int | None = None
    baseline: str | None = None
    timer: Timer = gpu_time

    def measure(self) -> Times:
        return self.timer(self.setup())

    def row(self, time_us: Times | None) -> Row:
        return Row(
            self.op,
            self.provider,
            self.shape,
            time_us,
            baseline=self.baseline,
            bytes_moved=self.bytes_moved,
            flops=self.flops,
        )


def all_cases() -> Iterator[Case]:
    for name in MODULES:
        yield from importlib.import_module(f"bench.{name}").cases()
