"""The shadow estimate: a replay with a fixed number of seats, checked where it can be done by hand."""

import math
import random
from itertools import pairwise

import pytest

from pars_fast.estimate import FinishedRequest, mean_latencies
from pars_fast.guards import OvertakingBudget

NO_GUARD = OvertakingBudget(beta=0.0, floor_tokens=math.inf)
FCFS_GUARD = OvertakingBudget(beta=0.0, floor_tokens=0.0)


def served(arrival_s: float, service_s: float, output_tokens: int) -> FinishedRequest:
    """A request whose score was right."""
    return FinishedRequest(arrival_s, service_s, float(output_tokens), output_tokens, num_prompt_tokens=10)


def test_one_seat_by_hand() -> None:
    """While 10 s run, 8 s and 2 s arrive: served in this order by arrival, the other way round by length."""
    requests = [served(0.0, 10.0, 100), served(1.0, 8.0, 80), served(2.0, 2.0, 20)]
    assert mean_latencies(requests, "fcfs", NO_GUARD, seats=1) == pytest.approx(
        ((10 / 100 + 17 / 80 + 18 / 20) / 3, (10 + 17 + 18) / 3)
    )
    assert mean_latencies(requests, "pars_fast", NO_GUARD, seats=1) == pytest.approx(
        ((10 / 100 + 19 / 80 + 10 / 20) / 3, (10 + 19 + 10) / 3)
    )


def test_with_a_seat_for_each_nobody_waits() -> None:
    requests = [served(0.1 * i, 3.0 + i, 10) for i in range(8)]
    mean_service = sum(request.service_s for request in requests) / 8
    for policy in ("fcfs", "pars_fast"):
        assert mean_latencies(requests, policy, NO_GUARD, seats=8)[1] == pytest.approx(mean_service)


def test_a_guard_without_allowance_is_arrival_order() -> None:
    requests = overload(200)
    assert mean_latencies(requests, "pars_fast", FCFS_GUARD, 4) == mean_latencies(
        requests, "fcfs", FCFS_GUARD, 4
    )


def test_more_allowance_gains_more() -> None:
    latencies = [
        mean_latencies(overload(400), "pars_fast", OvertakingBudget(beta=0.0, floor_tokens=floor), 4)
        for floor in (0.0, 2000.0, math.inf)
    ]
    for less, more in pairwise(latencies):
        assert more < less


def test_no_requests_waiting_at_all() -> None:
    assert mean_latencies([served(5.0, 2.0, 4)], "pars_fast", NO_GUARD, seats=1) == (0.5, 2.0)


def overload(count: int) -> list[FinishedRequest]:
    """Lognormal lengths at twice what four seats serve."""
    rng = random.Random(7)
    tokens = [int(rng.lognormvariate(4, 1)) + 1 for _ in range(count)]
    gap_s = 0.01 * sum(tokens) / count / 4 / 2
    return [served(i * gap_s, 0.01 * n, n) for i, n in enumerate(tokens)]
