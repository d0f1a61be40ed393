"""The demo's page: self-contained, honest in its words, whole with missing values, safe with any text."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pars_fast.demo.records import Load, Run, ServedRequest
from pars_fast.demo.report import render_report, write_report
from pars_fast.page import Axis

POLICIES = ("fcfs", "pars_fast", "oracle")
NUM_REQUESTS = 40


def make_run(policy: str, load: Load = "saturated", repeat: int = 0, *, slowdown: float = 1.0) -> Run:
    """Requests with lengths from 1 to 391 tokens whose waits grow with `slowdown`."""
    requests = []
    for index in range(NUM_REQUESTS):
        arrival, tokens = 0.5 * index, 1 + 10 * index
        first = arrival + slowdown * (0.1 + 0.05 * index) + 0.001 * repeat
        requests.append(ServedRequest(index, ("chat", "maths")[index % 2], 20, tokens, tokens, arrival, first,
                                      first + 0.01 * tokens))
    return Run(policy, load, repeat, tuple(requests), scored_total=0 if load == "light" else 7)


def make_runs(ours: float = 1.0) -> list[Run]:
    slowdowns = {"fcfs": 4.0, "pars_fast": ours, "oracle": 0.8}
    saturated = [make_run(policy, repeat=repeat, slowdown=slowdowns[policy])
                 for policy in POLICIES for repeat in range(3)]
    return saturated + [make_run(policy, "light") for policy in POLICIES]


def make_summary(**changes: Any) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "engine": "vllm 0.32.0", "served_model": "tiny random model", "device": "CPU, 2 cores",
        "capacity_tok_s": 903.0, "achieved_load": {"fcfs": 1.19, "pars_fast": 1.2, "oracle": 1.21},
        "gain_captured": 0.87, "gain_captured_e2e": 0.76, "tau": 0.53, "tau_within_source": 0.41,
        "light_ttft_ratio": {"mean": 1.004, "ci95": [0.985, 1.022]},
        "switch_check": {"stock": 12.3, "switched_fcfs": 12.4}, "seed": 0, "repeats": 3,
        "arrivals_sha256": "ab" * 32, "versions": {"vllm": "0.32.0"}, "date": "2026-01-15",
        "sources": [{"source": "chat", "share": 0.5, "model_column": "model-a", "requests": 20}],
    }
    return {**summary, **changes}


EXPECTED = [float(5 + 8 * index) for index in range(NUM_REQUESTS)]


def page_of(runs: list[Run], expected: list[float] | None = None, **changes: Any) -> str:
    return render_report(runs=runs, expected_tokens=EXPECTED if expected is None else expected,
                         summary=make_summary(**changes))


class Balance(HTMLParser):
    """Raises on a tag that is closed out of order."""

    VOID = frozenset({"meta", "link", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value is not None]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_report(path, runs=make_runs(), expected_tokens=EXPECTED, summary=make_summary())
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert not re.search(r"https?://|@import|url\(|src=", page)
    assert re.findall(r'href="([^"]*)"', page) == ["data:,"]
    assert "default-src 'none'" in page


def test_markup_is_balanced_and_ids_are_unique() -> None:
    parser = Balance()
    parser.feed(page_of(make_runs()))
    assert parser.open == []
    assert len(set(parser.ids)) == len(parser.ids)


def test_same_input_gives_same_bytes() -> None:
    assert page_of(make_runs()) == page_of(make_runs())


def test_every_policy_has_its_curve_name_and_table_column() -> None:
    page = page_of(make_runs())
    for policy in POLICIES:
        assert f'class="curve {policy}"' in page
        assert f'class="name {policy}"' in page
        assert f'class="policy {policy}">{policy}</th>' in page


def test_another_policy_is_drawn_too() -> None:
    assert 'class="curve other0"' in page_of([*make_runs(), make_run("prompt_length", slowdown=2.0)])


def test_charts_and_tables_are_named() -> None:
    page = page_of(make_runs())
    assert page.count("<table") == page.count("<caption") > 0
    assert page.count('role="img"') == page.count("<desc") > 0


@pytest.mark.parametrize(("ours", "words"), [(1.0, "lower"), (4.0, "about the same"), (12.0, "higher")])
def test_headline_follows_the_numbers(ours: float, words: str) -> None:
    headline = re.search("<h1>(.*?)</h1>", page_of(make_runs(ours)))
    assert headline is not None
    assert words in headline[1]


@pytest.mark.parametrize(("gain", "words"), [
    (0.87, "That is 87 % of what an oracle"),
    (None, "every answer&#x27;s length: \u2013."),
    (-0.2, "loses against arrival order"),
])
def test_gain_is_worded_whichever_way_it_went(gain: float | None, words: str) -> None:
    assert words in page_of(make_runs(), gain_captured=gain)


def test_no_share_of_a_gain_that_is_too_small() -> None:
    runs = [make_run(policy) for policy in POLICIES]
    assert "gains too little here" in page_of(runs, gain_captured=None)


def test_longest_wait_is_said_when_it_grew() -> None:
    runs = [make_run("fcfs", slowdown=2.0), make_run("pars_fast", slowdown=2.0)]
    late = replace(runs[1].requests[-1], first_token_s=100.0, finish_s=104.0)
    runs[1] = replace(runs[1], requests=(*runs[1].requests[:-1], late))
    assert re.search(r"The longest wait is [\d.]+\u00d7 higher", page_of(runs))


@pytest.mark.parametrize("key", sorted(make_summary()))
def test_none_in_the_summary(key: str) -> None:
    page = page_of(make_runs(), **{key: None})
    assert ">None" not in page
    assert not re.search(r"\bnan\b", page)


def test_empty_summary_and_no_expected_lengths() -> None:
    page = render_report(runs=make_runs(), expected_tokens=[], summary={})
    assert "No data." in page  # the scatter
    assert "None" not in page


@pytest.mark.parametrize("runs", [[], [make_run("fcfs")], [make_run("pars_fast", "light")],
                                  [Run("fcfs", "saturated", 0, ())]], ids=["none", "one", "light", "empty"])
def test_few_runs_still_make_a_page(runs: list[Run]) -> None:
    assert "No comparison" in page_of(runs)


def test_incomplete_request_is_counted_and_said() -> None:
    runs = make_runs()
    cut = replace(runs[0].requests[3], received_tokens=0, first_token_s=None, finish_s=None)
    stopped = replace(runs[0].requests[4], received_tokens=2, finish_s=None)
    runs[0] = replace(runs[0], requests=(*runs[0].requests[:3], cut, stopped, *runs[0].requests[5:]))
    page = page_of(runs)
    assert "Not completed: fcfs 2 of 160." in page
    assert '<td class="fcfs">118</td>' in page  # completed, of 120 in three repeats


def test_nothing_completed() -> None:
    lost = tuple(replace(request, received_tokens=0, first_token_s=None, finish_s=None)
                 for request in make_run("fcfs").requests)
    assert "Not completed: fcfs 40 of 40." in page_of([Run("fcfs", "saturated", 0, lost)])


def test_unusable_expected_lengths_are_left_out() -> None:
    page = page_of(make_runs(), [float("nan"), float("inf"), -1.0, 0.0, *EXPECTED[4:]])
    assert f"{NUM_REQUESTS - 4} requests on logarithmic axes" in page


def test_stock_run_stays_out_of_charts_and_tables() -> None:
    stock = replace(make_run("fcfs", slowdown=50.0), stock=True)
    assert page_of([*make_runs(), stock]) == page_of(make_runs())


def test_text_is_escaped() -> None:
    attack = "<script>alert('x')</script>&\"$title"
    hostile = [replace(run, requests=tuple(replace(request, source=attack) for request in run.requests))
               for run in make_runs()]
    hostile.append(make_run('"><img>'))
    page = page_of(hostile, engine=attack, served_model=attack, device=attack, date=attack,
                   versions={attack: attack}, sources=[{"source": attack, "model_column": attack}])
    assert "<script>alert" not in page
    assert "<img>" not in page
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;&quot;$title" in page


@pytest.mark.parametrize(("scored", "words"), [(0, "Nothing was scored"), (3, "3 prompts were scored")])
def test_light_load_reports_the_counter(scored: int, words: str) -> None:
    light = replace(make_run("pars_fast", "light"), scored_total=scored)
    page = page_of([*make_runs()[:9], light])
    assert words in page
    assert ("stays out of the way" in page) is (scored == 0)


@pytest.mark.parametrize(("interval", "words"), [
    ([0.98, 1.02], "no difference is seen"), ([1.01, 1.05], "pars_fast is slower"),
    ([0.91, 0.95], "pars_fast is faster"), ([1.0, 1.0], "no difference is seen"),
])
def test_light_interval_is_read_right(interval: list[float], words: str) -> None:
    ratio = {"mean": float(np.mean(interval)), "ci95": interval}
    page = page_of(make_runs(), light_ttft_ratio=ratio)
    assert words in page
    assert f"{interval[0]:.3f} to {interval[1]:.3f}" in page


def test_burst_is_named() -> None:
    run = make_run("fcfs")
    burst = tuple(replace(request, index=100 + k, arrival_s=10.0 + 0.01 * k)
                  for k, request in enumerate(run.requests[20:]))
    assert "burst: " not in page_of([run])
    assert "burst: " in page_of([replace(run, requests=run.requests + burst)])


@pytest.mark.parametrize("reach", [0.027, 0.041, 0.049, 0.0501, 0.11, 0.2001, 0.245, 0.41, 0.9])
def test_an_axis_around_one_has_two_ticks_at_least(reach: float) -> None:
    """The page of a demo takes its digits from their distance."""
    assert len(Axis(1 - reach, 1 + reach, 14.0, 400.0).ticks(5)) >= 2
