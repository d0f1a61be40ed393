"""Task-parallel applications: how they are made, written and read, and served by the real scheduler."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pars_fast.cli import main
from pars_fast.errors import DataError, ParsFastError
from pars_fast.policies.applications import Application, application_of
from pars_fast.policies.demand import ConstantDemand, token_time
from pars_fast.simulation.applications import TYPES, make_applications, read_sources, write_trace
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.fairness import ORDERS, Applications, measure, service_rates, train_demand
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.workload import Workload, make_workload, read_trace, with_burst, with_noisy_scores

STEP = StepTime(0.01, 1e-5, 1e-4, 1e-7, "a test")
ENGINE = EngineSettings(
    max_num_seqs=8, max_num_batched_tokens=128, kv_cache_tokens=4096, block_size=32, max_model_len=2048
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the types name, small."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for kind in TYPES.values():
        if kind.source == "arxiv_lengths_noarrival":
            lines = [f"0,{rng.integers(50, 300)},{rng.integers(5, 60)}" for _ in range(40)]
            text = "\n".join(["arrival_s,prompt_tokens,output_tokens", *lines])
            (folder / f"trace_{kind.source}.csv").write_text(text + "\n")
            continue
        rows = [
            {
                "id": str(number),
                "split": ("train", "val", "test")[number % 3],
                "prompt": f"{kind.source} " * int(rng.integers(1, 20)) + str(number),
                "output_tokens": {f"m{model}": int(rng.integers(1, 80)) for model in range(3)},
            }
            for number in range(30)
        ]
        (folder / f"lengths_{kind.source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    times = np.sort(rng.uniform(0, 60, 400))
    (folder / "trace_times.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{time},10,10\n" for time in times)
    )
    return folder


@pytest.fixture(scope="module")
def workload(folder: Path) -> Workload:
    return make_applications(read_sources(folder, "test"), read_trace(folder / "trace_times.csv"), 60, seed=0)


def test_an_application_sends_all_its_requests_at_once(workload: Workload) -> None:
    assert workload.app is not None
    applications = Applications.of(workload)
    assert applications.names.tolist() == list(dict.fromkeys(workload.app.tolist()))
    assert len(applications.names) == 60
    assert (workload.arrival_s == applications.arrival_s[applications.number]).all()
    for number, kind in enumerate(applications.types):
        low, high = TYPES[kind].fan_out
        assert low <= (applications.number == number).sum() <= high
        if TYPES[kind].one_prompt:
            assert len(set(workload.prompt_tokens[applications.number == number])) == 1
    assert applications.demand.sum() == pytest.approx(
        token_time(workload.prompt_tokens, workload.output_tokens).sum()
    )


def test_the_same_seed_makes_the_same_applications(folder: Path) -> None:
    arrivals = read_trace(folder / "trace_times.csv")
    made = [
        make_applications(read_sources(folder, half), arrivals, 60, seed=seed).sha256()  # type: ignore[arg-type]
        for half, seed in (("test", 1), ("test", 1), ("test", 2), ("train", 1))
    ]
    assert made[0] == made[1]
    assert len(set(made)) == 3


def test_a_trace_keeps_its_applications(workload: Workload, tmp_path: Path) -> None:
    write_trace(tmp_path / "trace_apps.csv", workload)
    read = read_trace(tmp_path / "trace_apps.csv")
    assert read.sha256() == workload.sha256()
    assert replace(read, app=None).sha256() != workload.sha256()


def test_bursts_and_cuts_keep_applications_with_their_requests(workload: Workload) -> None:
    assert workload.app is not None
    expected = sorted(zip(workload.app, workload.output_tokens, strict=True))
    burst = with_burst(workload, 0.3, seed=0)
    assert burst.app is not None
    assert sorted(zip(burst.app, burst.output_tokens, strict=True)) == expected
    cut = workload.take([3, 5])
    assert cut.app is not None
    assert cut.app.tolist() == workload.app[[3, 5]].tolist()


@pytest.mark.parametrize(("name", "kind"), [("chat/17", "chat"), ("run-17", ""), ("a/b/c", "a")])
def test_a_name_means_one_application_to_all_who_read_it(name: str, kind: str) -> None:
    """Training, the simulated request and the live one; without a slash it has no type."""
    pytest.importorskip("vllm")
    from pars_fast.simulation.replay import xargs_of
    from pars_fast.simulation.simulated_requests import make_request

    workload = make_workload("one", [0.0], [5], [5], app=[name])
    simulated = make_request(workload, 0, block_size=16)
    assert Applications.of(workload).types == [kind]
    assert application_of(simulated) == Application(name, kind)
    assert xargs_of(workload, scored=False) == [simulated.sampling_params.extra_args]


def test_what_is_missing_is_named(folder: Path, tmp_path: Path, workload: Workload) -> None:
    with pytest.raises(DataError, match=r"neither lengths_\w+.jsonl\[.gz\] nor trace_"):
        read_sources(tmp_path, "test")
    with pytest.raises(DataError, match="400 arrivals for 401 applications"):
        make_applications(read_sources(folder, "test"), read_trace(folder / "trace_times.csv"), 401, seed=0)
    with pytest.raises(DataError, match="every request must name its application"):
        Applications.of(replace(workload, app=None))
    with pytest.raises(DataError, match="columns of one length"):
        make_workload("x", [0, 1], [1, 1], [1, 1], app=["a"])


def test_the_fast_simulator_says_that_it_cannot_share(workload: Workload) -> None:
    pytest.importorskip("numba")
    from pars_fast.simulation import fast

    with pytest.raises(ParsFastError, match=r"justitia preempts, or goes by .*: take --engine faithful"):
        fast.simulate(workload, "justitia", None, ENGINE, STEP)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_serves_everybody(order: str, workload: Workload) -> None:
    pytest.importorskip("vllm")
    scored = with_noisy_scores(workload, 0.5, seed=0)
    row = measure(scored, order, ConstantDemand(), ENGINE, STEP, rate=1e5)
    assert row["applications"] == 60
    assert all(np.isfinite(row[name]) for name in row if name.endswith("_s"))
    assert row["max_completion_s"] >= row["p99_completion_s"] >= row["p50_completion_s"] > 0


def test_true_demand_keeps_delays_within_the_bound_and_beats_vtc() -> None:
    """Many equal applications at once: VTC finishes all of them at the end, Justitia one after another."""
    pytest.importorskip("vllm")
    apps, tasks = 12, 8
    workload = make_workload(
        "burst",
        np.repeat(np.arange(apps) * 1e-3, tasks),
        [40] * apps * tasks,
        [30] * apps * tasks,
        app=[f"job/{n}" for n in range(apps) for _ in range(tasks)],
    )
    # Requests of different applications arrive in turn, so that arrival order is no order by application.
    mixed = np.argsort(np.tile(np.arange(tasks), apps), kind="stable")
    workload = make_workload(
        "burst",
        np.arange(apps * tasks) * 1e-3,
        workload.prompt_tokens,
        workload.output_tokens,
        app=workload.app[mixed],  # type: ignore[index]
    )
    rate = service_rates(workload, ENGINE, STEP)[1]
    rows = {
        order: measure(workload, order, ConstantDemand(), ENGINE, STEP, rate)
        for order in ("vtc", "justitia", "justitia, true demand")
    }
    for order in ("justitia", "justitia, true demand"):
        assert rows[order]["mean_completion_s"] < 0.9 * rows["vtc"]["mean_completion_s"]
        assert rows[order]["max_delay_s"] < rows[order]["bound_s"]


def test_the_commands_make_a_trace_and_train_on_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "trace_apps.csv"
    data = ["--data", str(folder), "--arrivals", str(folder / "trace_times.csv")]
    assert main(["fairness", "applications", *data, "--applications", "300", "--out", str(out)]) == 0
    assert "300 applications" in capsys.readouterr().out
    assert main(["fairness", "demand", "--trace", str(out), "--out", str(tmp_path / "demand.json")]) == 0
    assert "chat" in capsys.readouterr().out
    assert train_demand(read_trace(out)).networks.keys() >= {"", "chat", "best_of_n"}
    assert main(["fairness", "applications", *data, "--applications", "0", "--out", str(out)]) == 2
    assert "--applications must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "message"), [
    ("table --data . --arrivals F --workers 0", "--workers must be at least 1, got 0"),
    ("applications --data . --arrivals F --seed -1", "--seed must be at least 0, got -1"),
    ("demand --trace F --seed -1", "--seed must be at least 0, got -1"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(
    command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fairness", *command.split(), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
