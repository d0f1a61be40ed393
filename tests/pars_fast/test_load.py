"""`pars-fast load` with a server that is made up: plan, figures, what is kept, and the page."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pars_fast.cli import main
from pars_fast.demo import load as module
from pars_fast.demo.arrivals import BURST_LENGTHS, arrivals_hash, traffic
from pars_fast.demo.load import LoadPlan, means_of, run_load
from pars_fast.demo.load_cli import print_means
from pars_fast.demo.load_page import render_page
from pars_fast.demo.records import Load, Run, ServedRequest, paired_ratio
from pars_fast.demo.run import Served, SwitchableServer
from pars_fast.demo.sample import SamplePrompt, load_sample
from pars_fast.demo.scheduler_switch import parse_policy, split_policies
from pars_fast.guards import FixedThreshold, NoGuard
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.step_log import StepLog
from pars_fast.simulation.step_time import StepTime

PLAN = LoadPlan(("fcfs", "pars_fast/none", "pars_fast", "oracle"), (0.5, 1.2), burst_requests=30, repeats=2)
WAIT_S = {"fcfs": 4.0, "pars_fast/none": 1.5, "pars_fast": 2.0, "oracle": 1.0}
CAPACITY = 1000.0
ENGINE = EngineSettings(max_num_seqs=16)
STEP = StepTime(5e-3, 1e-5, 3e-4, 1e-8, "a test")


class SilentDisplay:
    """Takes what a terminal would show."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def __enter__(self) -> "SilentDisplay":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The cases that reached the server, which makes each request wait as long as its policy says."""
    cases: list[Run] = []

    @contextlib.contextmanager
    def server(served: Served, ranker: str, folder: Path) -> Iterator[SwitchableServer]:
        (folder / "steps.json").write_text(json.dumps(asdict(ENGINE)))
        yield SwitchableServer("http://nowhere", folder / "policy", StepLog(folder / "steps"))

    def serve(server: SwitchableServer, served: Served, case: Run, prompts: list[SamplePrompt], arrivals: Any,
              display: Any) -> Run:
        cases.append(case)
        wait_s = WAIT_S[case.policy] * (0.01 if case.load == 0.5 else 1.0)
        return replace(case, preemptions=1, step_time=STEP, requests=tuple(
            ServedRequest(i, prompt.source, 5, prompt.output_tokens, prompt.output_tokens, float(due),
                          float(due) + wait_s, float(due) + wait_s + 0.01 * prompt.output_tokens)
            for i, (prompt, due) in enumerate(zip(prompts, arrivals, strict=True))))

    for name, stand_in in {
        "switchable_server": server, "serve_switched": serve, "warm_up": lambda *_: None,
        "measure_capacity": lambda *_: CAPACITY,
        "served_model": lambda *_: Served("m", "a made-up server", ("--max-num-seqs", "16"), {}),
        "commit": lambda: "c0ffee",
    }.items():
        monkeypatch.setattr(module, name, stand_in)
    return cases


def run(plan: LoadPlan = PLAN, kept: Path | None = None, ranker: str = "small") -> dict[str, Any]:
    result = run_load(plan, model=None, ranker=ranker, kept=kept, display=SilentDisplay())  # type: ignore[arg-type]
    return result.summary


def test_policies_take_turns_and_what_takes_longest_runs_less_often() -> None:
    cases = PLAN.cases()
    assert [(case.load, case.repeat) for case in cases[::4]] == [(0.5, 0), (1.2, 0), ("burst", 0), (1.2, 1)]
    assert [case.policy for case in cases[::4]] == list(PLAN.policies)  # each is the first once
    assert all({case.policy for case in cases[i : i + 4]} == set(PLAN.policies) for i in range(0, 16, 4))
    assert LoadPlan(("fcfs",), (), burst_requests=0, repeats=1).cases() == []


def test_a_burst_is_the_sample_again_with_shorter_answers() -> None:
    sample = load_sample()
    prompts, arrivals = traffic(sample, "burst", CAPACITY, 1, 2 * len(sample))
    assert not arrivals.any()
    assert sorted(prompt.prompt for prompt in prompts) == sorted(2 * [prompt.prompt for prompt in sample])
    total = sum(prompt.output_tokens for prompt in prompts)
    assert total == pytest.approx(2 * BURST_LENGTHS * sum(p.output_tokens for p in sample), rel=0.02)
    assert min(prompt.output_tokens for prompt in prompts) >= 1
    assert prompts != traffic(sample, "burst", CAPACITY, 2, 2 * len(sample))[0]


@pytest.mark.parametrize("load", [0.5, 1.0, 1.5])
def test_arrivals_offer_the_load(load: float) -> None:
    sample = load_sample()
    _, arrivals = traffic(sample, load, CAPACITY, 3, 0)
    offered = sum(prompt.output_tokens for prompt in sample) / arrivals[-1] / CAPACITY
    assert offered == pytest.approx(load, rel=0.05)
    assert arrivals * load == pytest.approx(traffic(sample, 1.0, CAPACITY, 3, 0)[1])  # but for scale the same


def test_the_hash_tells_plans_apart() -> None:
    sample = load_sample()
    plans: list[tuple[tuple[Load, ...], int]] = [
        ((0.5,), 0), ((0.6,), 0), ((0.5, "burst"), 30), ((0.5, "burst"), 31)
    ]
    hashes = {arrivals_hash(sample, [1], loads, burst) for loads, burst in plans}
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("text", "policy"),
    [("fcfs", ("fcfs", None)), ("pars_fast/none", ("pars_fast", NoGuard())),
     ("pars/fixed_threshold:seconds=60", ("pars", FixedThreshold(60)))],
)
def test_a_policy_may_name_its_guard(text: str, policy: tuple[str, Any]) -> None:
    assert parse_policy(text) == policy
    assert split_policies(text) == [text]


def test_a_list_of_policies() -> None:
    limited = "pars_fast/passing_limit:beta=1,floor_requests=2"
    assert split_policies(f"fcfs,{limited},pars_fast/none,fcfs") == ["fcfs", limited, "pars_fast/none"]
    assert {"fcfs", "pars_fast", "oracle"} <= set(split_policies("all"))
    with pytest.raises(ValueError, match=r"a policy is one of fcfs, .*; got 'sjf'"):
        split_policies("fcfs,sjf")
    with pytest.raises(ValueError, match=r"got 'fcfs/never'"):
        split_policies("fcfs/never")


def test_paired_ratio_pairs_the_same_request_of_the_same_repeat() -> None:
    def made(policy: str, repeat: int, waits: list[float]) -> Run:
        requests = (ServedRequest(i, "a", 5, 10, 10, 0.0, wait, wait + 1) for i, wait in enumerate(waits))
        return Run(policy, 0.5, repeat, tuple(requests))

    runs = [made("fcfs", 0, [1.0, 2.0]), made("fcfs", 1, [4.0]), made("ours", 0, [1.0, 4.0, 9.0])]
    ratio = paired_ratio(runs, "ours", "fcfs", 0.5, lambda request: request.time_to_first_token)
    assert ratio is not None
    assert ratio["mean"] == pytest.approx(5 / 3)  # the third, and the second repeat, have no pair
    assert ratio["ci95"] == [pytest.approx(1.0), pytest.approx(2.0)]
    assert paired_ratio(runs, "oracle", "fcfs", 0.5, lambda request: 1.0) is None


def test_figures(served: list[Run]) -> None:
    summary = run()
    means = {(mean["load"], mean["policy"]): mean for mean in summary["means"]}
    assert list(means) == [(load, policy) for load in (0.5, 1.2, "burst") for policy in PLAN.policies]
    ours, fcfs = means[1.2, "pars_fast"], means[1.2, "fcfs"]
    assert (ours["repeats"], means[0.5, "fcfs"]["repeats"]) == (2, 1)
    assert ours["mean_ttft_s"] == pytest.approx(2.0)
    assert ours["max_wait_s_ratio"] == pytest.approx(0.5)
    assert ours["gain_captured_e2e"] == pytest.approx((4 - 2) / (4 - 1), rel=1e-3)
    assert fcfs["gain_captured"] == 0
    assert ours["preemptions"] == 1
    assert (means["burst", "fcfs"]["requests"], means["burst", "fcfs"]["offered_load"]) == (30, None)
    assert ours["offered_load"] == pytest.approx(1.2, rel=0.05)
    assert 0 < ours["achieved_load"] < ours["offered_load"]
    assert [(light["load"], light["policy"]) for light in summary["light"]] == [
        (0.5, policy) for policy in PLAN.policies[1:]]
    assert summary["light"][1]["ttft_ratio"]["mean"] == pytest.approx(0.5)
    assert summary["light"][1]["tpot_ratio"]["mean"] == pytest.approx(1.0)
    assert (ours["base_s"], summary["engine_settings"]) == (STEP.base_s, asdict(ENGINE))
    assert len(served) == len(summary["runs"]) == len(PLAN.cases())
    assert summary["arrivals_sha256"] == run()["arrivals_sha256"]


def test_no_ratio_without_arrival_order() -> None:
    row = {**Run("pars_fast", 1.2, 0, (ServedRequest(0, "a", 5, 10, 10, 0.0, 1.0, 2.0),)).columns(),
           "offered_load": 1.2, "achieved_load": 1.0}
    mean, = means_of([row])
    assert mean["mean_e2e_s_ratio"] is mean["gain_captured"] is None


def test_a_policy_that_completed_nothing_has_no_figures(
    served: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Run] = vars(module)["serve_switched"]

    def failing(*arguments: Any) -> Run:
        made = real(*arguments)
        lost = (replace(request, received_tokens=0, first_token_s=None, finish_s=None)
                for request in made.requests)
        return made if made.policy != "pars_fast" else replace(made, requests=tuple(lost))

    monkeypatch.setattr(module, "serve_switched", failing)
    summary = run(LoadPlan(("fcfs", "pars_fast", "oracle"), (0.5, 1.2), 30, 1))
    ours = [mean for mean in summary["means"] if mean["policy"] == "pars_fast"]
    assert len(ours) == 3
    for mean in ours:
        assert mean["completed"] == 0
        assert mean["mean_e2e_s"] is mean["gain_captured"] is mean["gain_captured_e2e"] is None
    assert "Not every request completed: pars_fast at load 0.5, " in render_page(summary)
    print_means(summary["means"])


def test_an_interrupted_sweep_goes_on(
    served: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, whole = tmp_path / "rows.jsonl", run()
    real: Callable[..., Run] = vars(module)["serve_switched"]
    served.clear()

    def interrupted(*arguments: Any) -> Run:
        if len(served) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "serve_switched", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(kept=kept)
    kept.write_text(kept.read_text()[:-50])  # and the third was cut off while it was written
    monkeypatch.setattr(module, "serve_switched", real)
    # Another capacity would be other arrivals: the first one is kept.
    monkeypatch.setattr(module, "measure_capacity", lambda *_: pytest.fail("the capacity is known"))
    served.clear()
    assert run(kept=kept) == whole
    assert [case.policy for case in served] == [case.policy for case in PLAN.cases()[2:]]
    served.clear()
    assert run(kept=kept) == whole
    assert not served
    run(replace(PLAN, burst_requests=31), kept=kept)
    assert {case.load for case in served} == {"burst"}
    monkeypatch.setattr(module, "measure_capacity", lambda *_: CAPACITY)
    served.clear()
    run(kept=kept, ranker="default")
    assert len(served) == len(PLAN.cases())


class Balance(HTMLParser):
    """Raises on a tag that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page(served: list[Run]) -> None:
    page = render_page(run())
    balance = Balance()
    balance.feed(page)
    assert not balance.open
    assert not re.findall(r"(?:href|src)=\"(?!data:)", page)
    assert re.search(r"<h1>At load 1.2, mean latency per token <em>[\d.]+\u00d7 lower</em> than", page)
    assert page.count('<svg') == 6
    for policy in PLAN.policies:  # named beside its line in every chart
        assert len(re.findall(rf'class="name [^"]*"[^>]*>{policy.replace("_", " ")}</text>', page)) == 6
    assert "30 at once" in page
    assert "Not every request completed" not in page


def test_the_page_of_less(served: list[Run]) -> None:
    burst = render_page(run(LoadPlan(("fcfs", "pars_fast"), (), 30, 1)))
    assert "In a burst, mean latency per token" in burst
    one = run(LoadPlan(("pars_fast",), (1.2,), 0, 1))
    assert "<h1>A real server, <em>measured</em></h1>" in render_page(one)
    one["means"][0]["completed"] -= 1
    one["served_model"] = "<script>"
    page = render_page(one)
    assert "Not every request completed: pars_fast at load 1.2." in page
    assert "&lt;script&gt;" in page


def test_the_command(
    served: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm", reason="the command asks for it")
    monkeypatch.setattr("pars_fast.demo.display.Display", SilentDisplay)
    arguments = ["load", "--loads=1.2", "--policies=fcfs,pars_fast", "--burst=0", "--repeats=1"]
    outputs = [f"--json={tmp_path / 'a' / 'load.json'}", f"--report={tmp_path / 'a' / 'load.html'}"]
    assert main([*arguments, *outputs]) == 0
    assert "Means over repeats" in capsys.readouterr().out
    written = json.loads((tmp_path / "a" / "load.json").read_text())
    assert [row["policy"] for row in written["runs"]] == ["fcfs", "pars_fast"]
    assert len((tmp_path / "a" / "load.json.rows.jsonl").read_text().splitlines()) == 3  # with the capacity


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--policies=sjf", "got 'sjf'"),
        ("--loads=fast", "'fast'"),
        ("--loads=0", "a load is a positive number"),
        ("--repeats=0", "there is nothing to serve"),
        ("--burst=-1", "there is nothing to serve"),
    ],
)
def test_wrong_options(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", option]) == 2
    assert message in capsys.readouterr().err
