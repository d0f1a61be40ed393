"""The page of a sweep: whole with any rows, safe with any text, the right words for the numbers."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from pars_fast.guards import guard_text
from pars_fast.policies import POLICIES
from pars_fast.simulation.charts import line_chart
from pars_fast.simulation.report import render_report

GUARDS = ["none", *(f"overtaking_budget:beta={beta:g},floor_tokens=2000" for beta in (0, 0.5, 2)),
          *(f"fixed_threshold:seconds={seconds}" for seconds in (1, 60))]


def row(policy: str, guard: str = "none", load: float = 1.2, **changes: Any) -> dict[str, Any]:
    """Latencies fall, and waits grow, with the guard's looseness."""
    loose = 0.0 if policy == "fcfs" else 0.3 + 0.1 * GUARDS.index(guard)
    made: dict[str, Any] = {
        "policy": policy, "guard": guard, "load": load, "seed": 0, "tau": None, "ranker_delay_s": 0.0,
        "unscored_share": 0.0, "engines": 1, "router": "round_robin", "simulator": "fast",
        "workload": "w", "arrivals_sha256": "ab" * 32, "capacity_tok_s": 900.0, "requests": 100,
        "completed": 100, "refused": 0,
        "mean_latency_per_token_s": 0.1 * (1 - loose), "p99_latency_per_token_s": 0.3, "mean_ttft_s": 4.0,
        "mean_e2e_s": 9 * (1 - 0.5 * loose),
        "p99_e2e_s": 20 * (1 + loose), "max_wait_s": 15 * (1 + 2 * loose),
        "throughput_to_last_arrival_tok_s": 880.0,
        "preemptions": 0, "recomputed_tokens": None, "prefix_hit_tokens": None,
        "gain_captured": loose / 0.8, "gain_captured_e2e": loose,
    }
    return {**made, **changes}


def rows() -> list[dict[str, Any]]:
    made = [row("fcfs", load=load) for load in (0.8, 1.2)]
    made += [row(policy, guard, load, tau=tau) for policy, tau in (("oracle", None), ("pars_fast", 0.5))
             for guard in GUARDS for load in (0.8, 1.2)]
    ours = GUARDS[2]
    made += [row("pars_fast", ours, tau=tau) for tau in (0.0, 1.0)]
    made += [row("pars_fast", ours, tau=0.5, unscored_share=share) for share in (0.5, 1.0)]
    made += [row("pars_fast", ours, tau=0.5, ranker_delay_s=delay) for delay in (1.0, 10.0)]
    made += [row(policy, guard, engines=count, router=router, tau=None if policy == "fcfs" else 0.5)
             for policy, guard in (("fcfs", "none"), ("pars_fast", ours)) for count in (10, 1000)
             for router in ("round_robin", "predicted_work")]
    return made


def result(runs: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "runs": rows() if runs is None else runs, "workload": "azure", "requests": 100,
        "simulator": "fast", "engine": {"max_num_seqs": 8}, "date": "2026-01-15",
        "step_time": {"base_s": 0.01, "source": "made up"},
        "capacity_tok_s": 900.0, "scores": "noisy", "real_tau": None, "version": "0.1.0",
    }
    return {**made, **changes}


class Balance(HTMLParser):
    """Raises on a tag that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value is not None]
        if tag not in {"meta", "link", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_balanced_and_the_same_each_time() -> None:
    page = render_report(result())
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids)) > 20
    assert not re.search(r"https?://|@import|url\(|src=", page)
    assert not re.search(r"\bnan\b", page)
    assert page == render_report(result())


def test_every_guard_is_a_line_with_its_name_at_each_load() -> None:
    page = render_report(result())
    for policy in ("oracle", "pars_fast"):
        section = page.split(f'id="frontier-{policy}"')[1].split("</section>")[0]
        assert section.count("<svg") == 4  # two loads, two pairs of columns
        for name in ("none", "overtaking budget", "fixed threshold"):
            assert section.count(f">{name}</text>") == 4


def test_policies_are_points_and_the_best_ones_are_ringed() -> None:
    """One has the lowest mean, one the lowest p99 for it; the oracle is out of it."""
    points = {"fcfs": (9, 20), "oracle": (3, 10), "pars_fast": (5, 30), "pars": (6, 20), "tie": (7, 40)}
    runs = [row(policy) | {"guard": guard_text(POLICIES[policy].default_guard), "mean_e2e_s": mean,
                           "p99_e2e_s": p99} for policy, (mean, p99) in points.items()]
    section = render_report(result(runs)).split('id="pareto"')[1].split("</section>")[0]
    chart = section.split("</svg>")[0]
    assert chart.count('class="ring"') == 2
    assert "pars_fast: (1.50, 0.555556)" in chart
    for name in points:
        assert f">{name.replace('_', ' ')}</text>" in chart


def test_names_of_many_lines_stay_within_the_chart() -> None:
    lines = {f"line {i}": [(1.0, 1.0)] for i in range(20)} | {"far": [(2.0, 9.0)]}
    chart = str(line_chart("many", "Many", lines, "x", "y", str))
    height = float(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', chart)[0])
    places = sorted(float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.-]+)" class="name', chart))
    assert len(places) == 21
    assert 17 < places[0] < places[-1] < height - 40
    assert all(below - above > 16.8 for above, below in pairwise(places))


def test_sections_are_there_if_their_rows_are() -> None:
    titles = ("Quality of the ranking", "Requests without a score", "Delay of the ranker", "Many engines")
    whole, bare = render_report(result()), render_report(result([row("fcfs"), row("oracle")]))
    for title in titles:
        assert title in whole
        assert title not in bare
    assert "All runs" in bare


@pytest.mark.parametrize(("latency", "words"), [(0.05, "2.0\u00d7 lower"), (0.1, "about the same"),
                                                (0.3, "3.0\u00d7 higher")])
def test_headline_follows_the_numbers(latency: float, words: str) -> None:
    runs = [row("fcfs"), row("pars_fast", GUARDS[2], mean_latency_per_token_s=latency)]
    assert f"<em>{words}</em>" in render_report(result(runs))


def test_arrival_order_is_that_of_the_same_router() -> None:
    """One that goes by predicted work serves it by the scores, so by their tau."""
    runs = [row("fcfs", tau=tau, router="predicted_work", mean_latency_per_token_s=latency)
            for tau, latency in ((0.1, 0.1), (0.5, 0.2))]
    runs.append(row("pars_fast", GUARDS[2], tau=0.5, router="predicted_work", mean_latency_per_token_s=0.1))
    assert "<em>2.0\u00d7 lower</em>" in render_report(result(runs))


def test_no_row_of_pars_fast_and_missing_values_are_no_fault() -> None:
    runs = [row("fcfs"), row("oracle", mean_e2e_s=None, p99_e2e_s=None, gain_captured=None)]
    assert "\u2013" in render_report(result(runs))


def test_seeds_are_averaged() -> None:
    runs = [row("fcfs", seed=seed, mean_e2e_s=value) for seed, value in ((0, 2.0), (1, 4.0))]
    page = render_report(result(runs))
    assert "<td>3.00</td>" in page
    assert page.count("<th scope=\"row\">fcfs</th>") == 1


def test_names_are_escaped() -> None:
    assert "<script>alert" not in render_report(result(workload="<script>alert(1)</script>"))


def test_lines_keep_their_distance() -> None:
    page = render_report(result())
    for chart in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        heights = sorted(float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.-]+)" class="name', chart))
        assert all(below - above > 16.8 for above, below in pairwise(heights))
