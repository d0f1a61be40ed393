"""What the comparison below saturation concludes from its rounds; the rounds themselves run by hand."""

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="the servers' users; vLLM brings it")

from bench.light_load import ORDERS, SERVERS, ratio_interval, summarise
from pars_fast.demo.records import Run, ServedRequest

SLOWER = {"stock": 1.0, "stock_again": 1.0, "pars_fast": 1.1}


def _round(server: str, number: int) -> Run:
    """Two requests of three tokens each; the machine slows from round to round."""
    first_s = 0.1 * (1 + number) * SLOWER[server]
    requests = tuple(
        ServedRequest(i, "", 5, 3, 3, float(i), i + first_s, i + 3 * first_s) for i in range(2))
    return Run(server, 0.5, number, requests, scored_total=number)


def test_a_machine_that_slows_is_no_difference() -> None:
    runs = [_round(server, number) for number in range(6) for server in ORDERS[number]]
    ours, stock, again = summarise(runs)
    assert [row["server"] for row in (ours, stock, again)] == list(SERVERS)
    for name in ("ttft", "tpot"):
        assert ours[f"{name}_ratio"] == ours[f"{name}_ratio_low"] == ours[f"{name}_ratio_high"] == 1.1
        assert again[f"{name}_ratio"] == 1.0
    assert ours["mean_ttft_s"] == pytest.approx(1.1 * stock["mean_ttft_s"])
    assert (ours["requests"], ours["completed"], ours["scored_total"]) == (12, 12, 15)


def test_every_server_is_first_as_often() -> None:
    assert [sum(order[0] == server for order in ORDERS) for server in SERVERS] == [2, 2, 2]


def test_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        _, low, high = ratio_interval(np.exp(rng.normal(0.02, 0.08, 20)), np.ones(20))
        held += low <= np.exp(0.02) <= high
    assert 930 <= held <= 970
