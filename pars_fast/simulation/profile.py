"""Measure how long the steps of a real vLLM server on this machine take, and fit a `StepTime` to them.

The server runs stock vLLM with a scheduler that writes down every step (`step_stamps.py`), while a few to
many clients ask for answers of very different lengths. A step's time is that of the whole engine loop, with
sampling and the hand-over of outputs, so the fit holds what a queue waits for. Measured without async
scheduling, as the faithful simulator runs.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pars_fast.demo.client import closed_loop_capacity
from pars_fast.demo.run import device_name, served_model
from pars_fast.demo.sample import SamplePrompt, load_sample
from pars_fast.demo.server import vllm_server
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.step_log import STEP_LOG_VARIABLE, Fit, StepLog, fit_step_time
from pars_fast.simulation.step_time import StepTime

PHASE_S = 12.0  # for each number of clients
WARM_UP_REQUESTS = 16
MAX_PROMPT_CHARS = 6000
MAX_OUTPUT_TOKENS = 400


@dataclass(frozen=True, slots=True)
class Profile:
    """A measured engine: its room, its step time and the fit; the names are for readers."""

    step_time: StepTime
    engine: EngineSettings
    fit: Fit
    served_model: str
    device: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_profile(model: str | None) -> Profile:
    """Serve `model` (None: the demo's tiny one) for about a minute and fit its steps.

    Raises: ServerError: if vLLM does not start; ParsFastError: if it made too few steps to fit.
    """
    sample = load_sample()
    with tempfile.TemporaryDirectory(prefix="pars-fast-profile-") as name:
        folder = Path(name)
        served = served_model(model, folder, sample)
        step_log = StepLog(folder / "steps")
        arguments = (*served.arguments, "--no-async-scheduling",
                     "--scheduler-cls", "pars_fast.simulation.step_stamps.StampedScheduler")
        environment = {**served.environment, STEP_LOG_VARIABLE: str(step_log.path)}
        with vllm_server(served.model, arguments, environment, folder / "server.log") as url:
            engine = replace(step_log.engine, enable_prefix_caching=True)  # off only while steps are timed
            prompts = _prompts(sample, np.random.default_rng(0))
            warm_up = (next(prompts) for _ in range(WARM_UP_REQUESTS))
            closed_loop_capacity(url, served.model, warm_up, engine.max_num_seqs, lambda: None)
            warm_up_steps = len(step_log)
            for clients in sorted({1, max(1, engine.max_num_seqs // 4), engine.max_num_seqs,
                                   2 * engine.max_num_seqs}):
                until = _until(prompts, time.monotonic() + PHASE_S)
                closed_loop_capacity(url, served.model, until, clients, lambda: None)
        steps = step_log.steps(warm_up_steps)
    device = device_name()
    step_time, fit = fit_step_time(steps, source=f"pars-fast profile: {served.description}, {device}")
    return Profile(step_time, engine, fit, served.description, device)


def _prompts(sample: list[SamplePrompt], rng: np.random.Generator) -> Iterator[SamplePrompt]:
    """The demo's words without end, in prompts and answers whose lengths are uniform in the logarithm."""
    words = "\n".join(prompt.prompt for prompt in sample)
    while True:
        chars = round(float(np.exp(rng.uniform(np.log(20), np.log(MAX_PROMPT_CHARS)))))
        start = int(rng.integers(len(words) - chars))
        output_tokens = round(float(np.exp(rng.uniform(0, np.log(MAX_OUTPUT_TOKENS)))))
        yield SamplePrompt("profile", "profile", words[start : start + chars], output_tokens)


def _until(prompts: Iterator[SamplePrompt], deadline: float) -> Iterator[SamplePrompt]:
    while time.monotonic() < deadline:
        yield next(prompts)
