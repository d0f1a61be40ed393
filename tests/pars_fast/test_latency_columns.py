"""Columns of latency and throughput: what they count, and that a run and a simulation of it have the same."""

from dataclasses import replace

import numpy as np
import pytest

from pars_fast.demo.records import Run, ServedRequest
from pars_fast.latency_columns import latency_columns, throughput_until
from pars_fast.simulation.columns import Served, columns
from pars_fast.simulation.workload import make_workload

REQUESTS = tuple(
    ServedRequest(i, "a", 5, tokens, tokens, arrival_s, arrival_s + wait_s, arrival_s + wait_s + 0.1 * tokens)
    for i, (arrival_s, wait_s, tokens) in enumerate(
        [(0.0, 0.5, 40), (1.0, 3.0, 1), (2.0, 0.2, 10), (4.0, 1.0, 25)])
)


def test_what_columns_count() -> None:
    arrival, first = np.array([0.0, 1.0, 4.0]), np.array([1.0, 2.0, 5.0])
    finished = np.array([3.0, 10.0, np.nan])
    row = latency_columns(arrival, first, finished, np.array([5, 9, 7]))
    assert (row["requests"], row["completed"], row["makespan_s"], row["max_wait_s"]) == (3, 2, 10.0, 1.0)
    assert row["mean_latency_per_token_s"] == pytest.approx((3 / 5 + 9 / 9) / 2)
    assert row["mean_tpot_s"] == pytest.approx((2 / 4 + 8 / 8) / 2)
    assert row["throughput_tok_s"] == pytest.approx(14 / 10)
    assert row["throughput_to_last_arrival_tok_s"] == pytest.approx((5 + 3) / 4)


def test_without_a_completed_request_there_is_no_latency() -> None:
    for count in (0, 2):
        zeros, never = np.zeros(count), np.full(count, np.nan)
        row = latency_columns(zeros, zeros, never, np.ones(count, np.int64))
        assert row.pop("requests") == count
        assert row.pop("completed") == 0
        assert set(row.values()) == {None}


def test_a_run_and_its_simulation_have_the_same_columns() -> None:
    lost = replace(REQUESTS[2], received_tokens=3, finish_s=None)
    run = Run("fcfs", 1.2, 0, (*REQUESTS[:2], lost, REQUESTS[3]))
    arrival_s, first_token_s, finished_s = run.times_s()
    lengths = [request.output_tokens for request in run.requests]
    served = Served(arrival_s, first_token_s, finished_s, preemptions=0, steps=0, refused=0)
    lived, simulated = run.columns(), columns(make_workload("run", arrival_s, [5] * 4, lengths), served)
    alike = latency_columns(arrival_s, first_token_s, finished_s, np.array(lengths)).keys()
    assert {"throughput_tok_s", "throughput_to_last_arrival_tok_s", "mean_e2e_s", "p99_ttft_s"} < alike
    assert {name: lived[name] for name in alike} == {name: simulated[name] for name in alike}


def test_throughput_counts_what_was_made_by_then() -> None:
    first, finish, tokens = np.array([0.0, 4.0]), np.array([1.0, 8.0]), np.array([10, 5])
    assert throughput_until(first, finish, tokens, 6.0) == pytest.approx((10 + 3) / 6, rel=1e-5)
    assert throughput_until(first, finish, tokens, 2.0) == pytest.approx(10 / 2)
    assert throughput_until(first, finish, tokens, 0.0) is None
