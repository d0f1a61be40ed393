"""When the demo's requests arrive: Poisson, with one burst at saturation."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pars_fast.demo.records import Load
from pars_fast.demo.sample import SamplePrompt

LOADS: dict[Load, float] = {"saturated": 1.2, "light": 0.5}  # offered tokens/s over the engine's capacity
BURST_SHARE = 0.2  # of the requests of a saturated run, all at its middle


def arrival_times(
    sample: Sequence[SamplePrompt], load: Load, capacity_tok_s: float, seed: int
) -> NDArray[np.float64]:
    """Ascending arrival times of the sample's prompts, (n,) seconds from 0.

    The run is as long as makes its offered tokens `LOADS[load]` times the capacity. n arrivals of a Poisson
    process within a given time are n uniform draws in order.
    """
    rng = np.random.default_rng((seed, len(sample)))
    duration = sum(prompt.output_tokens for prompt in sample) / (LOADS[load] * capacity_tok_s)
    burst = round(BURST_SHARE * len(sample)) if load == "saturated" else 0
    times = np.concatenate([rng.uniform(0, 1, len(sample) - burst), np.full(burst, 0.5)])
    return np.sort(times) * duration


def arrivals_hash(sample: Sequence[SamplePrompt], seeds: Sequence[int]) -> str:
    """SHA-256 of all arrivals at capacity 1, to tell whether two results saw the same."""
    digest = hashlib.sha256()
    for prompt in sample:
        digest.update(f"{prompt.source}\0{prompt.prompt}\0{prompt.output_tokens}\n".encode())
    for load in LOADS:
        for seed in seeds:
            digest.update(arrival_times(sample, load, 1.0, seed).tobytes())
    return digest.hexdigest()
