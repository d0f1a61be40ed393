"""A trace on a real server: what is sent, what is refused, and a whole run with applications."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="the faithful simulator is vLLM's scheduler")

from pars_fast.cli import main
from pars_fast.demo import run as demo_run
from pars_fast.demo.records import STEP_TIMES, Run, ServedRequest
from pars_fast.errors import DataError
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.replay import Replay, outcome_of, prompts_of, simulated, xargs_of
from pars_fast.simulation.workload import Workload, make_workload

STEP = {"base_s": 5e-3, "prefill_token_s": 1e-5, "decode_seq_s": 3e-4, "kv_token_s": 1e-8}
ENGINE = EngineSettings(2, 8192, 100_000, 32, 8192)


def workload(*apps: str, scores: list[float] | None = None) -> Workload:
    """Requests half a second apart, one of each application given."""
    count = len(apps)
    return make_workload("made", np.arange(count) / 2, [9] * count, [20] * count, scores,
                         list(apps) if any(apps) else None)


def test_prompts_have_the_lengths_and_no_common_beginning() -> None:
    made = make_workload("made", [0, 1], [1100, 7], [3, 5])
    prompts = prompts_of(made, 0)
    assert [len(prompt.prompt) for prompt in prompts] == [1100, 7]
    assert [prompt.output_tokens for prompt in prompts] == [3, 5]
    assert prompts[0].prompt[:7] != prompts[1].prompt
    assert prompts_of(made, 0) == prompts
    assert prompts_of(made, 1)[0].prompt[:16] != prompts[0].prompt[:16]


def test_prompts_share_what_the_trace_says() -> None:
    shared = make_workload("made", [0, 1, 2], [600, 1100, 512], [3] * 3, hash_ids=[[7, 8], [7, 9, 8], [9]])
    first, second, third = (prompt.prompt for prompt in prompts_of(shared, 0))
    assert first[:512] == second[:512]
    assert first[512:588] == second[1024:]
    assert second[512:1024] == third != first[:512]


def test_a_real_server_finds_what_prompts_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of each prompt but the first 512 of 600 tokens are cached, and nothing from the run before."""
    monkeypatch.setattr(demo_run, "NUM_LAYERS", 1)
    rows = [{"timestamp": 1000 * turn, "input_length": 600, "output_length": 9, "hash_ids": [0, turn + 1]}
            for turn in range(6)]
    long = {"timestamp": 9999, "input_length": 9000, "output_length": 9, "hash_ids": list(range(18))}
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    trace.write_text("\n".join(map(json.dumps, [*rows, long])))
    options = ["--policies", "fcfs,oracle", "--load", "0.1", "--skip-too-long", "--json", str(out),
               "--", "--num-gpu-blocks-override", "300"]
    assert main(["replay", "--trace", str(trace), *options]) == 0
    assert "Share of prompt tokens found in the prefix cache" in capsys.readouterr().out
    result = json.loads(out.read_text())
    runs = result["runs"]
    engine = result["engine_settings"]
    assert engine["kv_cache_tokens"] == 299 * engine["block_size"]  # one block is vLLM's own
    assert [run["completed"] for run in runs] == [6, 6]
    assert [run["prefix_hit_tokens"] for run in runs] == [5 * 512] * 2
    assert runs[0]["prefix_hit_share"] == pytest.approx(5 * 512 / 3600, abs=1e-4)


def test_a_request_says_whose_it_is_and_its_score_where_it_is_read() -> None:
    made = workload("chat/1", "17", "", scores=[5.0, 6.0, 7.0])
    assert xargs_of(made, scored=False) == [{"pars_app": "chat/1", "pars_app_type": "chat"},
                                            {"pars_app": "17"}, {}]
    assert [said["pars_score"] for said in xargs_of(made, scored=True)] == [5.0, 6.0, 7.0]
    assert xargs_of(workload("", ""), scored=False) == [{}, {}]


def test_what_did_not_complete_has_no_times() -> None:
    whole = ServedRequest(0, "made", 9, 20, 20, arrival_s=0.0, first_token_s=1.0, finish_s=2.0)
    cut = ServedRequest(1, "made", 9, 20, 3, arrival_s=0.5, first_token_s=1.0, finish_s=None)
    outcome = outcome_of(Run("fcfs", 1.2, 0, (whole, cut), preemptions=4))
    assert outcome.preemptions == 4
    assert (outcome.first_token_s[0], outcome.finished_s[0]) == (1.0, 2.0)
    assert np.isnan([outcome.first_token_s[1], outcome.finished_s[1]]).all()


@pytest.mark.parametrize(
    ("made", "policy", "message"),
    [
        (make_workload("made", [0, 1], [9, 9000], [3, 5]), "fcfs", "answer of request 2 are 9,005 tokens"),
        (workload("", ""), "pars_fast/none", "pars_fast orders by scores.* --tau"),
        (workload("", "", scores=[1.0, 2.0]), "perception_only", "perception_only is not for a live engine"),
    ],
)
def test_what_cannot_be_served_is_refused(made: Workload, policy: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Replay(made, ["fcfs", policy], [1.2], 1)


def test_the_simulator_finishes_applications_as_a_policy_has_it() -> None:
    """Ten requests of one application at once, then one of another: sharing serves that one early."""
    apps = ["a/1"] * 10 + ["b/2", "c/3"]
    made = make_workload("made", [*[0.0] * 10, 0.1, 0.2], [9] * 12, [20] * 12, app=apps)
    plan = Replay(made, ["fcfs", "vtc"], [5.0], 1)
    server = {"capacity_tok_s": 100.0, "engine_settings": asdict(ENGINE)}
    fcfs, vtc = (simulated(plan, {"policy": policy, "load": 5.0, **STEP}, server) for policy in plan.policies)
    assert vtc["mean_completion_s"] < fcfs["mean_completion_s"]
    assert vtc["completed"] == fcfs["completed"] == 12


def test_a_real_server_shares_itself_among_applications(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two heavy applications are there when small ones come: under vtc these are done long before the heavy
    ones, whatever the machine's speed; in arrival order after them."""
    monkeypatch.setattr(demo_run, "NUM_LAYERS", 1)
    rows = [f"0,20,40,heavy/{i // 30}" for i in range(60)] + [f"0.1,20,40,light/{i}" for i in range(5)]
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens,app\n" + "\n".join([*rows, "1,20,40,light/9"]))
    out = tmp_path / "out.json"
    options = ["--policies", "fcfs,vtc,pars_fast", "--load", "3", "--tau", "0.5", "--json", str(out)]
    assert main(["replay", "--trace", str(trace), *options]) == 0
    printed = capsys.readouterr().out
    assert "every request completed" in printed
    assert "Ratios to fcfs" in printed
    result = json.loads(out.read_text())
    share = {run["policy"]: run["mean_completion_s"] / run["p99_completion_s"] for run in result["runs"]}
    assert {run["completed"] for run in result["runs"]} == {66}
    assert share["vtc"] < 0.75 * share["fcfs"]
    assert [run["policy"] for run in result["simulated"]] == [run["policy"] for run in result["runs"]]
    assert all(run["completed"] == 66 for run in result["simulated"])
    assert result["capacity_tok_s"] > 0


def test_a_run_of_few_steps_is_not_simulated() -> None:
    plan = Replay(workload("", ""), ["fcfs"], [1.0], 1)
    row = {"policy": "fcfs", "load": 1.0, "mean_e2e_s": 1.0, **dict.fromkeys(STEP_TIMES)}
    assert simulated(plan, row, {})["mean_e2e_s"] is None


def test_bad_options_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,9,9\n")
    for options, message in (
        (["--policies", "fastest"], "a policy is one of"),
        (["--load", "x"], "could not"),
        (["--repeats", "0"], "must be at least 1"),
    ):
        assert main(["replay", "--trace", str(trace), *options]) == 2
        assert message in capsys.readouterr().err
