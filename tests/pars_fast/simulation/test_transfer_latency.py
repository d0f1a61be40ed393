"""What ordering one model's queue by another's lengths costs, where the answer is known."""

from pathlib import Path

import numpy as np
import pytest

from pars_fast.data import LengthFile, LengthRow
from pars_fast.simulation.transfer_latency import transfer_latency
from pars_fast.simulation.workload import Workload, make_workload
from pars_fast.transfer import ModelTransfer


@pytest.fixture
def trace() -> Workload:
    rng = np.random.default_rng(0)
    return make_workload("trace", np.cumsum(rng.exponential(1, 900)), np.ones(900), np.ones(900))


def perfect_predictors() -> ModelTransfer:
    """Of three models: the second answers like the first, the third at length where they are short."""
    rng = np.random.default_rng(1)
    short = rng.geometric(1 / 150, 60)
    lengths = {"up": short, "up2": 2 * short, "down": 1 + short.max() - short}
    rows = tuple(
        LengthRow(str(i), "test", f"prompt {i}", {name: int(of[i]) for name, of in lengths.items()})
        for i in range(60)
    )
    scores = np.log(np.stack(list(lengths.values()), axis=1).astype(float))
    return ModelTransfer(list(lengths), 0, 60, [], [], [], LengthFile("toy", Path("toy"), rows), scores)


def test_models_that_agree_lose_nothing_and_one_that_does_not_costs(trace: Workload) -> None:
    latency = transfer_latency(perfect_predictors(), [trace, trace], load=2.0, requests=900)
    up, up2, down = range(3)
    for cells in (latency.per_token, latency.e2e):
        assert [cells[i][i] for i in range(3)] == pytest.approx([1, 1, 1])
        assert cells[up2][up] == pytest.approx(1, abs=0.02)
        assert cells[down][up] > 1.1
        assert cells[up][down] > 1.0
    assert 1.05 < latency.fcfs_per_token[up] < latency.per_token[down][up]
    assert len(latency.fcfs_e2e) == 3
