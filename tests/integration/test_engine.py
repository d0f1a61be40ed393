"""End to end: real engines, a real ranker process, real HTTP.

Three engines are started, each takes half a minute of two cores: `LLM` without and with ranking, and the
OpenAI server. All are started from the repository root, where the folders `kernels/` and `integration/`
must not get in the way of packages of these names.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pars_fast.demo.server import vllm_server
from pars_fast.integration.metrics import read_counters
from tests.integration.serving import TIMEOUT_S, Client, check, lengths

REPOSITORY = Path(__file__).parents[2]
Generated = tuple[list[list[list[int]]], Path]  # token ids by round and prompt; the folder of the counters
ENGINE = {"enforce_eager": True, "max_num_seqs": 4, "max_model_len": 512, "dtype": "float32"}
OFFLINE = """
import json, sys, time
from vllm import LLM, SamplingParams
from pars_fast.integration.metrics import read_counters

job = json.load(sys.stdin)
llm = LLM(**job["engine"])
params = [SamplingParams(max_tokens=n, ignore_eos=True, temperature=0.0) for n in job["lengths"]]
deadline = time.monotonic() + job["patience_s"]
rounds = []
while True:
    outputs = llm.generate(job["prompts"], params, use_tqdm=False)
    rounds.append([list(output.outputs[0].token_ids) for output in outputs])
    counters = read_counters(job["metrics_dir"]).get("0", {})
    if time.monotonic() > deadline or counters.get("pars_scored", 0) >= 10:
        break
json.dump(rounds, open(job["result"], "w"))
"""


def environment(**variables: str) -> dict[str, str]:
    """The environment as a user has it: only tests run kernels in Triton's interpreter."""
    leave_out = ("PARS_", "TRITON_INTERPRET")
    return {name: value for name, value in os.environ.items() if not name.startswith(leave_out)} | variables


def run_in_session(command: list[str], *, stdin: str, env: dict[str, str]) -> "tuple[int, str]":
    """(exit code, output) of a command; whatever happens, nothing that it started is left running."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env=env,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(stdin, timeout=TIMEOUT_S)
        finally:
            kill_group(process.pid)
        return process.returncode, output


def kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


@pytest.fixture
def generate(
    served_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    make_prompts: Callable[[int], list[str]],
) -> Callable[..., Generated]:
    """Runs 40 prompts through a new engine; gives token ids by round, and the folder of its counters."""

    def run(*, patience_s: float, **variables: str) -> Generated:
        folder = tmp_path_factory.mktemp("offline")
        job = {
            "engine": {"model": str(served_model), **ENGINE},
            "prompts": make_prompts(40),
            "lengths": lengths(40),
            "patience_s": patience_s,
            "metrics_dir": str(folder),
            "result": str(folder / "rounds.json"),
        }
        env = environment(PARS_METRICS_DIR=str(folder), **variables)
        code, output = run_in_session([sys.executable, "-c", OFFLINE], stdin=json.dumps(job), env=env)
        assert code == 0, output[-4000:]
        rounds: list[list[list[int]]] = json.loads((folder / "rounds.json").read_text())
        return rounds, folder

    return run


def test_each_prompt_gets_its_tokens_and_the_text_of_stock(
    generate: Callable[..., Generated], ranker_dir: Path
) -> None:
    """The order changes which requests share a batch, and so may the last bit of a logit: a near tie can
    fall the other way, as it can under any load. In float32 that is rare, so nearly all texts are equal.
    """
    stock, _ = generate(patience_s=0.0, VLLM_ENABLE_V1_MULTIPROCESSING="0")  # one process starts sooner
    ranked, counters = generate(patience_s=120.0, PARS_ENABLE="1", PARS_RANKER=str(ranker_dir))
    assert read_counters(counters)["0"]["pars_scored"] > 0
    assert read_counters(counters)["0"]["pars_fallback_error"] == 0
    for texts in [*stock, *ranked]:
        assert [len(ids) for ids in texts] == lengths(40)
    for texts in ranked:
        equal = sum(ids == reference for ids, reference in zip(texts, stock[0], strict=True))
        assert equal >= 36


SCORED = 'pars_scored_total{engine="0"}'
RANKER_FAILURES = 'pars_fallback_total{engine="0",reason="ranker"}'
ERRORS = 'pars_fallback_total{engine="0",reason="error"}'


@pytest.fixture(scope="module")
def client(
    served_model: Path, ranker_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """One OpenAI server for all tests below, which run in this order."""
    folder = tmp_path_factory.mktemp("server")
    ranker = Path(shutil.copytree(ranker_dir, folder / "ranker"))
    arguments = ["--enforce-eager", "--max-num-seqs", "4", "--max-model-len", "512", "--dtype", "float32"]
    variables = {
        "PARS_ENABLE": "1",
        "PARS_RANKER": str(ranker),
        "PARS_TRUST_CALLER": "1",
        "TRITON_INTERPRET": "0",
    }
    with vllm_server(str(served_model), arguments, variables, folder / "log.txt") as url:
        yield Client(url, str(served_model), ranker)


def test_below_saturation_nothing_is_scored(client: Client, make_prompts: Callable[[int], list[str]]) -> None:
    for _ in range(2):
        client.wave(make_prompts(4))
    assert client.metric(SCORED) == 0
    assert client.metric('pars_submitted_total{engine="0"}') == 0


def test_sixty_at_once_are_ranked_and_served(
    client: Client, make_prompts: Callable[[int], list[str]]
) -> None:
    """Waves are sent until the ranker has come up, which takes longer than the first wave."""
    client.wave_until(make_prompts(60), lambda: client.metric(SCORED) > 0)
    assert client.metric(ERRORS) == client.metric(RANKER_FAILURES) == 0
    assert client.metric('pars_waiting{engine="0"}') == 0


def test_estimates_of_callers_come_through(client: Client, make_prompts: Callable[[int], list[str]]) -> None:
    """Sound ones, senseless ones and none, mixed."""
    values: list[Any] = [120, 3.5, -1, "many", 10**15]
    client.wave(
        make_prompts(40), lambda i: {"vllm_xargs": {"pars_score": values[i % 6]}} if i % 6 < 5 else {}
    )
    assert client.metric(ERRORS) == 0


def test_a_killed_ranker_costs_no_request_and_comes_back(
    client: Client, make_prompts: Callable[[int], list[str]]
) -> None:
    prompts = make_prompts(60)
    under_way = client.send(prompts, lambda i: {})
    assert client.signal_ranker(signal.SIGKILL) == 1
    check(under_way)
    # If all had been scored by then, it is noticed when there is something to score again.
    client.wave_until(prompts, lambda: client.metric(RANKER_FAILURES) >= 1)
    scored = client.metric(SCORED)
    client.wave_until(prompts, lambda: client.metric(SCORED) > scored)
    assert client.metric(ERRORS) == 0


def test_a_ranker_that_cannot_come_back_costs_no_request(
    client: Client, make_prompts: Callable[[int], list[str]]
) -> None:
    failures = client.metric(RANKER_FAILURES)
    shutil.rmtree(client.ranker)
    client.signal_ranker(signal.SIGKILL)
    client.wave_until(make_prompts(60), lambda: client.metric(RANKER_FAILURES) >= failures + 2)
    assert client.metric('pars_active{engine="0"}') == 0
    assert client.metric(ERRORS) == 0


def test_a_wrong_setting_stops_the_server(served_model: Path) -> None:
    code, output = run_in_session(
        [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(served_model),
            "--port",
            "0",
        ],
        stdin="",
        env=environment(PARS_ENABLE="1", PARS_POLICY="sjf"),
    )
    assert code != 0
    assert "PARS_POLICY='sjf' is not allowed: expected one of fcfs, priority, prompt_length" in output
