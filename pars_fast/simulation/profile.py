"""Measure how long the steps of a real vLLM server on this machine take, and fit a `StepTime` to them.

The server runs stock vLLM with a scheduler that writes down every step (`step_stamps.py`), while a few to
many clients ask for answers of very different lengths. A step's time is that of the whole engine loop, with
sampling and the hand-over of outputs, so the fit holds what a queue waits for. Measured without async
scheduling, as the faithful simulator runs.
"""

import json
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from pars_fast.demo.client import closed_loop_capacity
from pars_fast.demo.run import device_name, served_model
from pars_fast.demo.sample import SamplePrompt, load_sample
from pars_fast.demo.server import vllm_server
from pars_fast.errors import ParsFastError
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.step_time import StepTime

STAMP = struct.Struct("4d")  # prefill tokens, decoding requests, KV tokens read, seconds
STAMPS_FILE_VARIABLE = "PARS_PROFILE_FILE"
PHASE_S = 12.0  # for each number of clients
WARM_UP_REQUESTS = 16
MAX_PROMPT_CHARS = 6000
MAX_OUTPUT_TOKENS = 400
MIN_STEPS = 200


@dataclass(frozen=True, slots=True)
class Fit:
    """How well the model holds the steps it was fitted to; errors are of single steps."""

    steps: int
    mean_step_s: float
    rms_error_s: float
    mean_abs_error_s: float
    median_relative_error: float
    r2: float


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


def measure_profile(model: str | None, log: Path | None = None) -> Profile:
    """Serve `model` (None: the demo's tiny one) for about a minute and fit its steps.

    Raises: ServerError: if vLLM does not start; ParsFastError: if it made too few steps to fit.
    """
    sample = load_sample()
    with tempfile.TemporaryDirectory(prefix="pars-fast-profile-") as name:
        folder = Path(name)
        served = served_model(model, folder, sample)
        stamps = folder / "stamps"
        arguments = (*served.arguments, "--no-async-scheduling",
                     "--scheduler-cls", "pars_fast.simulation.step_stamps.StampedScheduler")
        environment = {**served.environment, STAMPS_FILE_VARIABLE: str(stamps)}
        with vllm_server(served.model, arguments, environment, log or folder / "server.log") as url:
            engine = EngineSettings(**json.loads(stamps.with_suffix(".json").read_bytes()))
            prompts = _prompts(sample, np.random.default_rng(0))
            warm_up = (next(prompts) for _ in range(WARM_UP_REQUESTS))
            closed_loop_capacity(url, served.model, warm_up, engine.max_num_seqs, lambda: None)
            warm_up_bytes = stamps.stat().st_size
            for clients in sorted({1, max(1, engine.max_num_seqs // 4), engine.max_num_seqs,
                                   2 * engine.max_num_seqs}):
                until = _until(prompts, time.monotonic() + PHASE_S)
                closed_loop_capacity(url, served.model, until, clients, lambda: None)
        steps = np.array(list(STAMP.iter_unpack(stamps.read_bytes()[warm_up_bytes:]))).reshape(-1, 4)
    device = device_name()
    step_time, fit = fit_step_time(steps, source=f"pars-fast profile: {served.description}, {device}")
    return Profile(step_time, engine, fit, served.description, device)


def fit_step_time(steps: NDArray[np.float64], *, source: str) -> tuple[StepTime, Fit]:
    """Least squares with no negative cost.

    Args:
        steps: (n, 4), each row prefill tokens, decoding requests, KV tokens read, seconds.
        source: words for the reader.
    Raises: ParsFastError: if there are fewer than `MIN_STEPS` steps.
    """
    if len(steps) < MIN_STEPS:
        raise ParsFastError(f"{len(steps)} steps are too few to fit a step time, {MIN_STEPS} are needed")
    work, seconds = np.column_stack([np.ones(len(steps)), steps[:, :3]]), steps[:, 3]
    scale = np.maximum(work.max(axis=0), 1.0)  # else tokens by the thousand make it ill-conditioned
    cost, _ = nnls(work / scale, seconds)
    error = work @ (cost / scale) - seconds
    spread = max(float(seconds.var()), 1e-24)  # not 0 when all steps are alike
    fit = Fit(
        steps=len(steps),
        mean_step_s=float(seconds.mean()),
        rms_error_s=float(np.sqrt((error**2).mean())),
        mean_abs_error_s=float(np.abs(error).mean()),
        median_relative_error=float(np.median(np.abs(error) / seconds)),
        r2=float(1 - error.var() / spread),
    )
    base_s, prefill_token_s, decode_seq_s, kv_token_s = (float(value) for value in cost / scale)
    return StepTime(base_s, prefill_token_s, decode_seq_s, kv_token_s, source), fit


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
