"""The steps of a real engine as `step_stamps.py` wrote them down, and the step time fitted to them."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from pars_fast.errors import ParsFastError
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.step_time import StepTime

STAMP = struct.Struct("4d")  # prefill tokens, decoding requests, KV tokens read, seconds
STEP_LOG_VARIABLE = "PARS_STEP_LOG"  # names the file to the scheduler that writes it
MIN_STEPS = 200


@dataclass(frozen=True, slots=True)
class StepLog:
    """The file of a server's steps, which grows while it runs, with its engine's settings beside it."""

    path: Path

    @property
    def engine(self) -> EngineSettings:
        return EngineSettings(**json.loads(self.path.with_suffix(".json").read_bytes()))

    def __len__(self) -> int:
        return self.path.stat().st_size // STAMP.size

    def steps(self, first: int) -> NDArray[np.float64]:
        """(n, 4), from the step of that number on; each row as `STAMP` has it."""
        whole = len(self) * STAMP.size
        return np.frombuffer(self.path.read_bytes()[first * STAMP.size : whole]).reshape(-1, 4)


@dataclass(frozen=True, slots=True)
class Fit:
    """How well the model holds the steps it was fitted to; errors are of single steps."""

    steps: int
    mean_step_s: float
    rms_error_s: float
    mean_abs_error_s: float
    median_relative_error: float
    r2: float


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
