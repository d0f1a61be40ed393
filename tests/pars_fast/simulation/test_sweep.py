"""Sweeps: no run twice, nothing lost when interrupted, gains against the right rows; the command."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pars_fast import cli
from pars_fast.calibration import TokenMap
from pars_fast.errors import ParsFastError
from pars_fast.guards import FixedThreshold, NoGuard, OvertakingBudget
from pars_fast.kept_rows import read_rows
from pars_fast.policies import POLICIES
from pars_fast.simulation import sweep
from pars_fast.simulation.arrays import Floats
from pars_fast.simulation.command import allowed_policies
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.report import render_report
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.sweep import Case, Setup, grid, make_setup, parse_guards, run_sweep, with_gains
from pars_fast.simulation.workload import make_workload

STEP_TIME = StepTime(0.005, prefill_token_s=4e-5, decode_seq_s=2e-5, kv_token_s=1.5e-8, source="made up")
ENGINE = EngineSettings(max_num_seqs=4, max_num_batched_tokens=64, kv_cache_tokens=4800)


def setup() -> Setup:
    rng = np.random.default_rng(0)
    workload = make_workload("mix", np.cumsum(rng.exponential(1.0, 80)), rng.integers(1, 60, 80),
                             rng.geometric(1 / 40, 80))
    return make_setup({0: workload}, ENGINE, STEP_TIME)


def cases() -> list[Case]:
    return grid(["fcfs", "oracle", "pars_fast"], [NoGuard(), OvertakingBudget()], [1.2], taus=[0.5])


def test_grid_runs_nothing_twice() -> None:
    chosen = grid(["fcfs", "oracle", "pars"], [NoGuard(), FixedThreshold(1)], [0.7, 1.2], taus=[0.2, 0.8],
                  delays_s=[0.0, 1.0], routers=["round_robin", "least_loaded"])
    assert len(chosen) == len(set(chosen)) == 2 * (1 + 2 + 2 * 2 * 2)
    assert {case.guard for case in chosen if case.policy == "fcfs"} == {"none"}
    assert {case.tau for case in chosen if case.policy == "oracle"} == {None}
    own = grid(["pars", "pars_fast"], None, [1.0])
    assert [case.guard.split(":")[0] for case in own] == ["fixed_threshold", "passing_limit"]


def test_guards_are_parsed() -> None:
    assert parse_guards("own") is None
    assert parse_guards("none,overtaking_budget:beta=1,floor_tokens=50,fixed_threshold:seconds=3") == [
        NoGuard(), OvertakingBudget(1, 50), FixedThreshold(3)]
    assert len(parse_guards("all") or ()) == 7
    with pytest.raises(ParsFastError, match=r"a guard is one of none, .* got 'hope'"):
        parse_guards("hope")


def test_rows_have_what_remakes_them() -> None:
    rows = run_sweep(setup(), cases(), workers=1)
    assert [row["policy"] for row in rows] == ["fcfs", "oracle", "oracle", "pars_fast", "pars_fast"]
    for row in rows:
        assert row["requests"] == row["completed"] == 80
        assert row["seed"] == 0
        assert len(row["arrivals_sha256"]) == 64
        assert row["load"] == 1.2
    gains = {(row["policy"], row["guard"]): row["gain_captured"] for row in rows}
    assert gains["fcfs", "none"] == 0
    assert gains["oracle", "none"] == 1


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, ran = tmp_path / "rows.jsonl", list[Case]()
    real = sweep.run_case

    def counted(setup: Setup, case: Case) -> dict[str, Any]:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(case)
        return real(setup, case)

    monkeypatch.setattr(sweep, "run_case", counted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(setup(), cases(), kept=kept, workers=1)
    kept.write_text(kept.read_text()[:-20])  # and the second row was cut off while it was written
    monkeypatch.setattr(sweep, "run_case", real)
    progress: list[tuple[int, int]] = []
    rows = run_sweep(setup(), cases(), kept=kept, workers=1, on_row=lambda *counts: progress.append(counts))
    assert progress[0] == (1, 5)
    assert progress[-1] == (5, 5)
    assert rows == run_sweep(setup(), cases(), workers=1)
    assert len(read_rows(kept)) == 5


def test_another_workload_is_not_taken_for_the_same(tmp_path: Path) -> None:
    kept = tmp_path / "rows.jsonl"
    run_sweep(setup(), cases()[:1], kept=kept, workers=1)
    changed = make_setup({0: make_workload("mix", [0, 1], [5, 5], [9, 9])}, ENGINE, STEP_TIME)
    assert run_sweep(changed, cases()[:1], kept=kept, workers=1)[0]["requests"] == 2


def test_rows_of_another_commit_are_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "rows.jsonl"
    for commit, rows in (("a" * 12, 1), ("a" * 12, 1), ("b" * 12, 2)):
        monkeypatch.setattr(sweep, "_commit", lambda commit=commit: commit)
        run_sweep(setup(), cases()[:1], kept=kept, workers=1)
        assert len(read_rows(kept)) == rows


def test_all_cores_give_the_same_rows() -> None:
    assert run_sweep(setup(), cases(), workers=2) == run_sweep(setup(), cases(), workers=1)


def test_gains_are_null_without_an_oracle_that_gains() -> None:
    row = {"workload": "w", "load": 1.0, "seed": 0, "engines": 1, "router": "round_robin",
           "simulator": "fast", "guard": "none", "mean_latency_per_token_s": 1.0, "mean_e2e_s": 1.0}
    rows = with_gains([{**row, "policy": "fcfs"}, {**row, "policy": "oracle", "mean_e2e_s": 0.5}])
    assert [row["gain_captured"] for row in rows] == [None, None]
    assert [row["gain_captured_e2e"] for row in rows] == [0, 1]


def test_gains_are_against_those_who_were_routed_alike() -> None:
    """By predicted work, FCFS has another result at each tau and share of requests without a score."""
    row = {"workload": "w", "load": 1.0, "seed": 0, "engines": 2, "router": "predicted_work",
           "simulator": "fast", "guard": "none", "mean_latency_per_token_s": 1.0}
    e2e = {("fcfs", 0.2, 0.0): 10.0, ("oracle", 0.2, 0.0): 5.0, ("fcfs", 0.8, 0.0): 8.0,
           ("oracle", 0.8, 0.0): 4.0, ("fcfs", 0.8, 0.5): 9.0, ("oracle", 0.8, 0.5): 3.0}
    ours = {("pars", *case): 6.0 for case in ((0.2, 0.0), (0.8, 0.0), (0.8, 0.5))}
    rows = with_gains({**row, "policy": policy, "tau": tau, "unscored_share": share, "mean_e2e_s": value}
                      for (policy, tau, share), value in (e2e | ours).items())
    assert [row["gain_captured_e2e"] for row in rows[-3:]] == [0.8, 0.5, 0.5]


def test_a_case_by_either_simulator_has_the_same_columns() -> None:
    pytest.importorskip("vllm", reason="the faithful simulator drives vLLM's scheduler")
    fast = setup()
    faithful = Setup(fast.workloads, fast.capacity_tok_s, ENGINE, STEP_TIME, "faithful")
    case = Case("pars_fast", "none", 1.2)
    row, other = sweep.run_case(faithful, case), sweep.run_case(fast, case)
    assert row.keys() == other.keys()
    assert row["completed"] == row["requests"] == other["requests"]
    assert (row["simulator"], other["simulator"]) == ("faithful", "fast")


def test_the_faithful_simulator_is_one_engine() -> None:
    faithful = Setup(setup().workloads, {0: 1.0}, ENGINE, STEP_TIME, "faithful")
    with pytest.raises(ParsFastError, match="the faithful simulator runs one engine"):
        run_sweep(faithful, [Case("fcfs", "none", 1.0, engines=2)])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    columns = np.cumsum(rng.exponential(1.0, 60)), rng.integers(1, 60, 60), rng.geometric(1 / 40, 60)
    lines = [f"{t:.6f},{p},{o}\n" for t, p, o in zip(*columns, strict=True)]
    path = tmp_path / "trace_mine.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(lines))
    return path


def test_command_writes_rows_and_page(
        trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "new" / "out.json", tmp_path / "page.html"
    status = cli.main([
        "simulate", "--trace", str(trace), "--policies", "fcfs,oracle,pars_fast", "--guards",
        "none,overtaking_budget,uniboost", "--load", "1.2", "--tau", "0.3,0.6", "--unscored", "0,0.5",
        "--fleet", "1,2", "--router", "round_robin,least_loaded", "--max-num-seqs", "4", "--workers", "1",
        "--json", str(out), "--report", str(page),
    ])
    assert status == 0, capsys.readouterr().err
    result = json.loads(out.read_text())
    assert result["workload"] == "mine"
    assert {row["requests"] for row in result["runs"]} == {60}
    text = page.read_text()
    for heading in ("An oracle's order, guarded", "Quality of the ranking", "Requests without a score",
                    "Many engines behind one router", "All runs", "Provenance"):
        assert html.escape(heading) in text
    assert "src=" not in text
    assert text == render_report(result)


def test_all_policies_are_run_side_by_side(
        trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vllm", reason="the faithful simulator drives vLLM's scheduler")
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    status = cli.main([
        "simulate", "--trace", str(trace), "--policies", "all", "--engine", "faithful", "--load", "1.5",
        "--tau", "0.5", "--max-num-seqs", "4", "--workers", "1", "--json", str(out), "--report", str(page),
    ])
    assert status == 0, capsys.readouterr().err
    rows = {row["policy"]: row for row in json.loads(out.read_text())["runs"]}
    assert rows.keys() == POLICIES.keys() - {"priority"}
    assert {row["completed"] for row in rows.values()} == {60}
    assert rows["srpt"]["preemptions"] > 0 < rows["srpt"]["recomputed_tokens"]
    assert rows["pars_fast"]["preemptions"] == rows["pars_fast"]["recomputed_tokens"] == 0
    assert rows["perception_only"]["steps"] > rows["fcfs"]["steps"]
    text = page.read_text()
    assert "Policies: mean against p99" in text
    assert "computed again" in text


def test_all_is_what_engine_and_scores_allow() -> None:
    everything = allowed_policies("faithful", has_scores=True)
    assert everything == [name for name in POLICIES if name != "priority"]
    fast = allowed_policies("fast", has_scores=True)
    assert {"pars", "tie", "ltr", "justitia"} & set(fast) == {"pars"}
    assert allowed_policies("fast", has_scores=False) == ["fcfs", "prompt_length", "oracle"]
    assert "srpt" in allowed_policies("faithful", has_scores=False)


@pytest.mark.parametrize(("options", "message"), [
    (["--policies", "sjf"], "no policy 'sjf'"),
    (["--policies", "pars"], "mine has no scores for pars: give --tau"),
    (["--router", "dice"], "no router 'dice'"),
    (["--profile", "h9000"], "no profile or file 'h9000'"),
    (["--requests", "0"], "--requests must be at least 1"),
    (["--fleet", "2,0"], "--fleet must be at least 1, got 0"),
    (["--seed", "-1", "--poisson"], "--seed must be at least 0, got -1"),
    (["--policies", "fcfs", "--load", "0"], "a load must be positive"),
    (["--policies", "fcfs", "--max-num-seqs", "0"], "max_num_seqs must be at least 1"),
])
def test_command_says_what_is_wrong(trace: Path, capsys: pytest.CaptureFixture[str], options: list[str],
                                    message: str) -> None:
    assert cli.main(["simulate", "--trace", str(trace), "--workers", "1", *options]) == 2
    assert message in capsys.readouterr().err


def test_what_prompts_share_is_for_the_faithful_simulator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Second turns of one conversation: the prefix cache holds the first 512 tokens of them."""
    rows = [{"timestamp": 1000 * turn, "input_length": 700, "output_length": 9, "hash_ids": [0, turn + 1]}
            for turn in range(3)]
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    command = ["simulate", "--trace", str(trace), "--policies", "fcfs,pars_fast", "--tau", "1",
               "--load", "0.1", "--workers", "1", "--json", str(out)]
    assert cli.main(command) == 2
    assert "only --engine faithful has that" in capsys.readouterr().err
    assert cli.main([*command, "--engine", "faithful"]) == 0
    assert [row["prefix_hit_tokens"] for row in json.loads(out.read_text())["runs"]] == [1024, 1024]


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    """A length file of 60 prompts, each of which names the length of its answer."""
    path = tmp_path / "lengths_mine.jsonl"
    outputs = np.random.default_rng(1).geometric(1 / 40, 60).tolist()
    path.write_text("".join(
        json.dumps({"split": "test", "prompt": f"{number} {tokens}", "output_tokens": {"m": tokens}}) + "\n"
        for number, tokens in enumerate(outputs)))
    return path


class Knows:
    """A ranker or predictor that reads the length in the prompt."""

    token_map = TokenMap((0.0, 1e6), (0.0, 1e6))

    def score(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([float(prompt.split()[1]) for prompt in prompts])

    def expected_tokens(self, prompts: Sequence[str]) -> Floats:
        return self.token_map(self.score(prompts).numpy())


@pytest.mark.parametrize("burst", ["0", "0.4"])
def test_a_predictor_scores_the_requests_that_are_served(
        trace: Path, lengths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, burst: str) -> None:
    """If it is the ranker, pars is served as it is by the ranker, wherever a burst has moved a request."""
    monkeypatch.setattr("pars_fast.ranker.Ranker.from_pretrained", lambda name: Knows())
    monkeypatch.setattr("pars_fast.baselines.load_predictor", lambda path: Knows())
    out = tmp_path / "out.json"
    command = ["simulate", "--lengths", str(lengths), "--trace", str(trace), "--requests", "60",
               "--burst", burst, "--policies", "pars", "--guards", "none", "--load", "1.5",
               "--max-num-seqs", "4", "--workers", "1", "--json", str(out)]
    runs = []
    for predictors in ([], ["--predictors", str(tmp_path)]):
        assert cli.main([*command, *predictors]) == 0
        runs.append(json.loads(out.read_text())["runs"])
    assert runs[0] == runs[1]


def test_prompts_have_one_kind_of_arrivals(
        trace: Path, lengths: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lengths", str(lengths), "--trace", str(trace), "--poisson"]
    assert cli.main(["simulate", *options]) == 2
    assert "leave out one of them" in capsys.readouterr().err
