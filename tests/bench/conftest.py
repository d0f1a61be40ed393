"""Reports as the suite makes them, with made-up times."""

from collections.abc import Callable

import pytest

from pars_fast.bench_results import PEAK_COPY, PEAK_MATMUL, Report, Row

PROVENANCE = {
    "gpu": "Toy GPU, 700.00 W",
    "cpu": "Toy CPU",
    "threads": "2",
    "versions": "pars_fast 0.1.0; torch 2.13.0",
    "commit": "0123456789ab",
    "date": "2026-01-02",
}
MakeReport = Callable[..., Report]


@pytest.fixture
def make_report() -> MakeReport:
    """A report of peaks (1 GB/s, 1 TFLOP/s), two scoring providers at two sizes, and a case not measured."""

    def make(scale: float = 1.0, **provenance: str) -> Report:
        def scored(provider: str, prompts: int, p50: float) -> Row:
            return Row(
                "score",
                provider,
                {"model": "MiniLM-L6", "prompts": prompts},
                (0.9 * scale * p50, scale * p50, 1.05 * scale * p50),
                baseline="hf_eager",
                bytes_moved=20_000,
                flops=prompts * 10**8,
                kendall_tau=0.999,
            )

        rows = [
            Row(PEAK_COPY, "torch", {"bytes": 1000}, (2.0, 2.0, 2.0), bytes_moved=2000),
            Row(PEAK_MATMUL, "torch", {"size": 64}, (1.0, 1.0, 1.0), flops=10**6),
            scored("hf_eager", 8, 4000.0),
            scored("pars_fast", 8, 1000.0),
            scored("pars_fast", 32, 3500.0),
            Row("arrival_to_order", "pars_fast", {"waiting": 1024}, None),
        ]
        return Report(rows, PROVENANCE | provenance)

    return make
