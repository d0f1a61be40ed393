"""The demo's sample, arrivals, client, figures and a server's end; a real one is in tests/integration."""

import asyncio
import json
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from pars_fast.demo.arrivals import BURST_SHARE, LOADS, arrival_times, arrivals_hash
from pars_fast.demo.client import closed_loop_capacity, serve_arrivals
from pars_fast.demo.display import Display
from pars_fast.demo.model import TINY, make_tiny_model
from pars_fast.demo.records import Run, ServedRequest, gain_captured
from pars_fast.demo.run import Served, measure_capacity, summarise
from pars_fast.demo.sample import MAX_OUTPUT_TOKENS, REQUESTS, SOURCES, SamplePrompt, load_sample
from pars_fast.demo.server import ServerError, vllm_server
from pars_fast.simulation.engine import EngineSettings


def test_sample_is_what_its_rule_says() -> None:
    sample = load_sample()
    assert len(sample) == len({prompt.prompt for prompt in sample}) == REQUESTS
    counts = Counter(prompt.source for prompt in sample)
    assert counts == {source: round(share * REQUESTS) for source, (share, _) in SOURCES.items()}
    assert {prompt.model_column for prompt in sample} == {column for _, column in SOURCES.values()}
    assert all(1 <= prompt.output_tokens <= MAX_OUTPUT_TOKENS for prompt in sample)


@pytest.mark.parametrize("load", list(LOADS))
def test_arrivals_offer_the_load(load: str) -> None:
    sample = load_sample()
    times = arrival_times(sample, load, 1000.0, seed=3)  # type: ignore[arg-type]
    offered = sum(prompt.output_tokens for prompt in sample) / times[-1]
    assert (np.diff(times) >= 0).all()
    assert offered / 1000.0 == pytest.approx(LOADS[load], rel=0.05)  # type: ignore[index]
    _, at_once = np.unique(times, return_counts=True)
    assert at_once.max() == (round(BURST_SHARE * len(sample)) if load == "saturated" else 1)


def test_arrivals_depend_on_the_seed_alone() -> None:
    sample = load_sample()
    assert arrivals_hash(sample, [1]) == arrivals_hash(load_sample(), [1]) != arrivals_hash(sample, [2])


@pytest.mark.parametrize(
    ("figures", "gain"), [((10.0, 7.0, 5.0), 0.6), ((10.0, 12.0, 5.0), -0.4), ((10.0, 9.8, 9.6), None)]
)
def test_gain_captured(figures: tuple[float, float, float], gain: float | None) -> None:
    assert gain_captured(*figures) == gain


def test_columns_leave_out_what_never_finished() -> None:
    whole = ServedRequest(0, "a", 5, 10, 10, arrival_s=1.0, first_token_s=2.0, finish_s=6.0)
    short = ServedRequest(1, "a", 5, 10, 3, arrival_s=1.0, first_token_s=2.0, finish_s=None)
    columns = Run("fcfs", "saturated", 0, (whole, short)).columns()
    assert (columns["requests"], columns["completed"]) == (2, 1)
    assert columns["mean_latency_per_token_s"] == 0.5
    assert columns["mean_tpot_s"] == pytest.approx(4 / 9, rel=1e-5)
    assert (columns["max_wait_s"], columns["throughput_tok_s"]) == (1.0, pytest.approx(10 / 6, rel=1e-5))


def test_the_load_achieved_is_what_was_served() -> None:
    """Of 20 tokens offered within 2 s 3 were made by then."""
    requests = (ServedRequest(0, "a", 5, 10, 10, arrival_s=0.0, first_token_s=0.0, finish_s=9.0),
                ServedRequest(1, "a", 5, 10, 10, arrival_s=2.0, first_token_s=5.0, finish_s=9.0))
    lost = tuple(replace(request, received_tokens=0, finish_s=None) for request in requests)
    runs = [Run("fcfs", "saturated", 0, requests), Run("oracle", "saturated", 0, lost)]
    sample = load_sample()
    expected = [float(prompt.output_tokens) for prompt in sample]
    summary = summarise(runs, sample, expected, capacity_tok_s=10.0, engine=EngineSettings(), served="m",
                        repeats=1)
    assert summary["achieved_load"] == {"fcfs": pytest.approx(0.15), "oracle": None}


@pytest.fixture
def server() -> Iterator[str]:
    """Streams as vLLM does, 4 tokens a chunk; a prompt that says `fail` gets an error."""

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if "fail" in body["prompt"]:
            return web.json_response({"error": "no"}, status=500)
        response = web.StreamResponse()
        await response.prepare(request)
        for tokens in [*range(4, body["max_tokens"], 4), body["max_tokens"]]:
            usage = {"prompt_tokens": 7, "completion_tokens": tokens}
            await response.write(b"data: " + json.dumps({"usage": usage}).encode() + b"\n\n")
            await asyncio.sleep(0.001)
        await response.write(b"data: [DONE]\n\n")
        return response

    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_client_counts_tokens_and_keeps_failures(server: str) -> None:
    sample = [SamplePrompt("a", "m", "hello", 10), SamplePrompt("a", "m", "fail", 10)]
    finished: list[int] = []
    arrivals = np.array([0.0, 0.02])
    served = serve_arrivals(server, "m", sample, arrivals, lambda: finished.append(1))
    assert [request.completed for request in served] == [True, False]
    assert (served[0].received_tokens, served[0].prompt_tokens) == (10, 7)
    assert served[0].arrival_s == 0.0 < served[0].time_to_first_token < served[0].end_to_end_latency
    assert len(finished) == 2


def test_closed_loop_capacity_is_a_rate(server: str) -> None:
    sample = [SamplePrompt("a", "m", f"hello {i}", 8) for i in range(40)]
    assert closed_loop_capacity(server, "m", sample, 4, lambda: None) > 0


def capacity_of(server: str, *prompts: str) -> float:
    sample = [SamplePrompt("a", "m", prompt, 8) for prompt in prompts]
    return measure_capacity(server, Served("m", "a made-up server", (), {}), sample, Display())


def test_few_prompts_measure_the_capacity(server: str) -> None:
    """As many as the clients are all sent at once, before any token is back."""
    assert capacity_of(server, "one", "two", "three") > 0


def test_a_server_that_answers_nothing_has_no_capacity(server: str) -> None:
    with pytest.raises(ServerError, match="the server answered none of 128 requests"):
        capacity_of(server, "fail", "fail again")


FAKE_VLLM = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/end":
            print("no memory left", flush=True)
            os._exit(1)
        self.send_response(200)
        self.end_headers()

port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake_vllm(tmp_path: Path) -> dict[str, str]:
    """Variables with which a Python finds a vLLM that is healthy until it is asked to end."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(FAKE_VLLM)
    return {"PYTHONPATH": str(tmp_path)}


def test_a_server_that_ends_in_use_leaves_its_log(fake_vllm: dict[str, str], tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match=r"server ended; the end of its log:\n(.*\n)*no memory left$"),
        vllm_server("m", (), fake_vllm, tmp_path / "log") as url,
    ):
        urllib.request.urlopen(f"{url}/end")


def test_another_error_stays_what_it_is(
    fake_vllm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pars_fast.demo.server.END_TIMEOUT_S", 0.1)
    with pytest.raises(KeyError), vllm_server("m", (), fake_vllm, tmp_path / "log"):
        raise KeyError


def test_the_tiny_model_has_the_layers_it_says(tmp_path: Path) -> None:
    described = make_tiny_model(tmp_path, ["Say yes.", "List five rivers."], num_layers=2)
    assert described.startswith(f"{TINY} (2 layers, ")
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 2
