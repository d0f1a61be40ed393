"""What the comparison below saturation concludes from its rounds; the rounds themselves run by hand."""

import numpy as np
import pytest

pytest.importorskip("vllm", reason="the scheduler that is compared with")

from bench.light_load import KINDS, ratio_interval, summarise
from bench.stock_switch import RANKED, STOCK
from pars_fast.demo.records import Run, ServedRequest

SLOWER = {STOCK: 1.0, RANKED: 1.1}


def _round(kind: str, number: int) -> Run:
    """Two requests of three tokens each; the machine slows from round to round."""
    first_s = 0.1 * (1 + number) * SLOWER[kind]
    requests = tuple(
        ServedRequest(i, "", 5, 3, 3, float(i), i + first_s, i + 3 * first_s) for i in range(2))
    return Run(kind, 0.5, number, requests, scored_total=number)


def test_a_machine_that_slows_is_no_difference() -> None:
    stock, ours = summarise([_round(kind, number) for number in range(6) for kind in KINDS])
    assert (stock["scheduler"], ours["scheduler"]) == KINDS
    for name in ("ttft", "tpot"):
        assert ours[f"{name}_ratio"] == ours[f"{name}_ratio_low"] == ours[f"{name}_ratio_high"] == 1.1
        assert ours[f"mean_{name}_s"] == pytest.approx(1.1 * stock[f"mean_{name}_s"])
    assert (ours["requests"], ours["completed"], ours["scored_total"]) == (12, 12, 15)


def test_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        _, low, high = ratio_interval(np.exp(rng.normal(0.02, 0.08, 20)), np.ones(20))
        held += low <= np.exp(0.02) <= high
    assert 930 <= held <= 970
