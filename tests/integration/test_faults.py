"""Faults of the ranker under load, in a real engine over HTTP; one server for all, in this order.

Faults inside the ranker come through `sitecustomize`, which Python imports in every process of the server:
it makes `Ranker.score`, which only the ranker's process calls, do what a file says. It also leaves that
process at ordinary priority: at idle priority its restarts would wait for all other tests. Whatever happens,
every request gets its tokens (`Client.wave` checks it), it is said once, the counter moves, and it heals
without a restart of the server.
"""

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pars_fast.data import read_length_file
from pars_fast.demo.server import vllm_server
from tests.integration.serving import Client, check, lengths

STALE_AFTER_S = 15.0  # far more than a ranker that works is silent for, however busy the machine is
slow = pytest.mark.slow  # several starts of the ranker, each of which imports torch
REPOSITORY = Path(__file__).parents[2]
FAULTS = '''
import importlib.abc, importlib.machinery, os, sys

os.sched_setscheduler = lambda *arguments: None

class Finder(importlib.abc.MetaPathFinder):
    """Patches pars_fast.ranker as soon as it has been imported."""

    def find_spec(self, name, path, target=None):
        if name != "pars_fast.ranker":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            patch(module.Ranker)

        spec.loader.exec_module = exec_module
        return spec

def patch(Ranker):
    score, calls = Ranker.score, 0

    def faulty(self, prompts, *args, **kwargs):
        nonlocal calls
        calls += 1
        fault = open({file!r}).read()
        if fault == "raises every 10th time" and calls % 10 == 0:
            raise RuntimeError("a fault")
        if fault == "ends":
            raise SystemExit(3)
        scores = score(self, prompts, *args, **kwargs).clone()
        if fault in ("nan", "inf", "-inf"):
            scores[:] = float(fault)
        if fault == "too few":
            scores = scores[:-1]
        if fault == "one prompt fails" and any(prompt.startswith("7 ") for prompt in prompts):
            raise ValueError("a prompt that no tokenizer likes")
        if fault == "cheated":
            for i, prompt in enumerate(prompts):
                scores[i] = -9.0 if int(prompt.split()[0]) % 2 else 9.0
        return scores

    Ranker.score = faulty

sys.meta_path.insert(0, Finder())
'''

SCORED = 'pars_scored_total{engine="0"}'
ACTIVE = 'pars_active{engine="0"}'
OVERTAKEN = 'pars_overtaken_total{engine="0"}'


def fallbacks(client: Client, reason: str) -> float:
    return client.metric(f'pars_fallback_total{{engine="0",reason="{reason}"}}')


class FaultyServer(Client):
    """`say` sets the fault; `log` is what the server has written."""

    def __init__(self, url: str, model: str, ranker: Path, folder: Path) -> None:
        super().__init__(url, model, ranker)
        self._folder = folder

    def say(self, fault: str) -> None:
        (self._folder / "fault").write_text(fault)

    def log(self) -> str:
        return (self._folder / "log.txt").read_text(errors="replace")

    def outages_said(self) -> int:
        return self.log().count("the queue is in arrival order until it is back")

    def recorded(self) -> Path:
        return self._folder / "lengths_served.jsonl"


@pytest.fixture(scope="module")
def server(
    served_model: Path, ranker_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FaultyServer]:
    folder = tmp_path_factory.mktemp("faults")
    ranker = Path(shutil.copytree(ranker_dir, folder / "ranker"))
    (folder / "fault").write_text("none")
    (folder / "sitecustomize.py").write_text(FAULTS.replace("{file!r}", repr(str(folder / "fault"))))
    arguments = ["--enforce-eager", "--max-num-seqs", "4", "--max-model-len", "512", "--dtype", "float32"]
    variables = {
        "PARS_ENABLE": "1",
        "PARS_RANKER": str(ranker),
        "PARS_STALE_AFTER_S": str(STALE_AFTER_S),
        "PARS_LOG_EVERY_S": "1",
        "PARS_MIN_TAU": "-1",  # the random ranker's order is no matter here
        "PARS_RECORD": str(folder / "lengths_served.jsonl"),
        "PARS_RECORD_PROMPTS": "plain",
        "TRITON_INTERPRET": "0",
        "VLLM_LOGGING_LEVEL": "INFO",  # a test before may have asked for less
        "PYTHONPATH": f"{folder}:{REPOSITORY}",
    }
    with vllm_server(str(served_model), arguments, variables, folder / "log.txt") as url:
        yield FaultyServer(url, str(served_model), ranker, folder)


@pytest.fixture(scope="module")
def prompts(make_prompts: Callable[[int], list[str]]) -> list[str]:
    return make_prompts(60)


def test_the_dashboard_asks_only_for_what_the_server_shows(server: FaultyServer, prompts: list[str]) -> None:
    """And every metric of ours is there, with the label of the data-parallel rank."""
    waits = 'pars_queue_wait_seconds_count{engine="0"}'  # taken in once a second, by a step
    server.wave_until(prompts, lambda: server.metric(SCORED) > 0 and server.metric(waits) >= len(prompts))
    shown: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.scrape()):
        for sample in family.samples:
            shown.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads((REPOSITORY / "docs" / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expression in asked for name in re.findall(r"(?:pars_|vllm:)\w+", expression)}
    assert names <= shown.keys()
    ours = {
        "pars_scored_total",
        "pars_fallback_total",
        "pars_queue_wait_seconds_bucket",
        "pars_score_latency_seconds_bucket",
        "pars_kendall_tau",
        "pars_overtaken_total",
        "pars_guard_promotions_total",
        "pars_active",
    }
    assert ours <= names
    assert all("engine" in shown[name] for name in ours)
    assert server.metric('pars_score_latency_seconds_count{engine="0"}') == server.metric(SCORED)
    assert " waiting, ranked; " in server.log()


@pytest.mark.parametrize(
    "fault", ["raises every 10th time", "nan", "inf", "-inf", "too few", "one prompt fails"]
)
def test_scores_that_cannot_be_used(server: FaultyServer, prompts: list[str], fault: str) -> None:
    """A failed batch is scored again one by one, so an exception now and then costs nothing at all."""
    unusable, failures = fallbacks(server, "prompt"), fallbacks(server, "ranker")
    server.say(fault)
    if fault == "raises every 10th time":
        scored = server.metric(SCORED)
        server.wave_until(prompts, lambda: server.metric(SCORED) >= scored + 30)
    else:
        server.wave_until(prompts, lambda: fallbacks(server, "prompt") > unusable)
    server.say("none")
    scored = server.metric(SCORED)
    server.wave_until(prompts, lambda: server.metric(SCORED) > scored)
    assert fallbacks(server, "ranker") == failures
    assert fallbacks(server, "error") == 0


def test_prompts_built_to_score_shortest_are_let_by_no_further_than_the_guard_allows(
    server: FaultyServer, prompts: list[str]
) -> None:
    overtaken = server.metric(OVERTAKEN)
    server.say("cheated")
    server.wave_until(prompts, lambda: server.metric(OVERTAKEN) > overtaken)
    server.say("none")
    assert fallbacks(server, "error") == 0


@slow
@pytest.mark.parametrize("fault", ["ends", "hangs"])
def test_a_ranker_that_ends_or_hangs(server: FaultyServer, prompts: list[str], fault: str) -> None:
    said, failures = server.outages_said(), fallbacks(server, "ranker")
    if fault == "ends":
        server.say("ends")
        server.wave_until(prompts, lambda: fallbacks(server, "ranker") > failures)
        server.say("none")
    else:
        under_way = server.send(prompts, lambda i: {})
        assert server.signal_ranker(signal.SIGSTOP) == 1
        check(under_way)
        server.wave_until(prompts, lambda: fallbacks(server, "ranker") > failures)
    scored = server.metric(SCORED)
    server.wave_until(prompts, lambda: server.metric(SCORED) > scored)
    assert server.metric(ACTIVE) == 1
    assert server.outages_said() == said + 1
    assert fallbacks(server, "error") == 0


@slow
def test_a_checkpoint_that_is_truncated_and_then_another(
    server: FaultyServer, prompts: list[str], ranker_dir: Path
) -> None:
    """What runs has its weights in private memory; the next start meets the damage, and then the new one."""
    said, failures = server.outages_said(), fallbacks(server, "ranker")
    weights = server.ranker / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(1000)
    scored = server.metric(SCORED)
    server.wave_until(prompts, lambda: server.metric(SCORED) > scored)
    assert fallbacks(server, "ranker") == failures
    assert server.signal_ranker(signal.SIGKILL) == 1
    server.wave_until(prompts, lambda: fallbacks(server, "ranker") >= failures + 2)
    assert server.metric(ACTIVE) == 0
    shutil.copy(ranker_dir / "model.safetensors", weights)
    scored = server.metric(SCORED)
    server.wave_until(prompts, lambda: server.metric(SCORED) > scored)
    assert server.metric(ACTIVE) == 1
    assert server.outages_said() == said + 1
    assert fallbacks(server, "error") == 0


def test_many_users_hang_up(server: FaultyServer, prompts: list[str]) -> None:
    under_way = server.send(prompts, lambda i: {})
    for i in range(300):
        server.abort(f"{i} never mind", 400)
    check(under_way)
    server.wave_until(prompts, lambda: server.metric('pars_waiting{engine="0"}') == 0)
    assert fallbacks(server, "error") == 0


def test_what_was_served_can_be_trained_on(server: FaultyServer, prompts: list[str]) -> None:
    """The file is whole at any moment, and holds each prompt with the length that it was given."""
    lines = server.recorded().read_bytes()
    assert lines.endswith(b"\n")
    file = read_length_file(server.recorded())
    assert file.name == "served"
    length_of = dict(zip(prompts, lengths(len(prompts)), strict=True))
    recorded = {row.prompt: row.output_tokens for row in file.rows if row.prompt in length_of}
    assert recorded == {prompt: {server.model: length_of[prompt]} for prompt in prompts}
    assert {row.split for row in file.rows} == {"train", "val", "test"}


def test_of_a_chat_the_ranker_gets_what_its_user_wrote(server: FaultyServer) -> None:
    """Not the system prompt that others have, too, and not the chat template, which tell it nothing."""
    system = "You sell garden tools. " + " ".join(f"Rule {i}: be polite." for i in range(12))
    asked = [
        f"{which} spade should I take for heavy soil?" for which in ("Which", "What", "Any", "No", "Both")
    ]
    assert [server.chat(system, user, 5) for user in asked] == [5] * len(asked)

    def recorded() -> set[str]:
        return {row.prompt for row in read_length_file(server.recorded()).rows}

    deadline = time.monotonic() + 60
    while not set(asked[1:]) <= recorded():
        assert time.monotonic() < deadline, recorded()
        server.wave([asked[0]])  # endings are taken in by a step
