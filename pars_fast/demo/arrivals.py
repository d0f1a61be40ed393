"""Which prompts arrive when: Poisson, with one burst at saturation, or all at once."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pars_fast.demo.records import Load
from pars_fast.demo.sample import SamplePrompt

LOADS: dict[Load, float] = {"saturated": 1.2, "light": 0.5}  # offered tokens/s over the engine's capacity
BURST_SHARE = 0.2  # of the requests of a saturated run, all at its middle
BURST_LENGTHS = 0.25  # of the recorded lengths, when thousands arrive at once: a minute, not four


def traffic(
    sample: Sequence[SamplePrompt], load: Load, capacity_tok_s: float, seed: int, requests: int
) -> tuple[list[SamplePrompt], NDArray[np.float64]]:
    """The prompts of a run in order of arrival, and `requests` ascending arrival times in seconds from 0.

    Under a load that is a number or one of `LOADS` they are the sample; under `burst` so many prompts of the
    sample, repeated and shuffled, each with `BURST_LENGTHS` of its answer, all at 0.
    """
    if load != "burst":
        return list(sample), arrival_times(sample, load, capacity_tok_s, seed)
    order = np.random.default_rng((seed, requests)).permutation(np.resize(np.arange(len(sample)), requests))
    shorter = [replace(prompt, output_tokens=max(1, round(BURST_LENGTHS * prompt.output_tokens)))
               for prompt in sample]
    return [shorter[i] for i in order], np.zeros(requests)


def arrival_times(
    sample: Sequence[SamplePrompt], load: Load, capacity_tok_s: float, seed: int
) -> NDArray[np.float64]:
    """Ascending arrival times of the sample's prompts, (n,) seconds from 0.

    The run is as long as makes its offered tokens `LOADS[load]`, or the number, times the capacity. n
    arrivals of a Poisson process within a given time are n uniform draws in order; only their scale differs
    from load to load.
    """
    rng = np.random.default_rng((seed, len(sample)))
    offered = LOADS[load] if isinstance(load, str) else load
    duration = sum(prompt.output_tokens for prompt in sample) / (offered * capacity_tok_s)
    burst = round(BURST_SHARE * len(sample)) if load == "saturated" else 0
    times = np.concatenate([rng.uniform(0, 1, len(sample) - burst), np.full(burst, 0.5)])
    return np.sort(times) * duration


def arrivals_hash(
    sample: Sequence[SamplePrompt], seeds: Sequence[int], loads: Iterable[Load] = tuple(LOADS),
    burst_requests: int = 0,
) -> str:
    """SHA-256 of all arrivals at capacity 1, to tell whether two results saw the same."""
    digest = hashlib.sha256()
    for prompt in sample:
        digest.update(f"{prompt.source}\0{prompt.prompt}\0{prompt.output_tokens}\n".encode())
    for load in loads:
        for seed in seeds:
            prompts, times = traffic(sample, load, 1.0, seed, burst_requests)
            digest.update(times.tobytes())
            if load == "burst":
                digest.update("\n".join(prompt.prompt for prompt in prompts).encode())
    return digest.hexdigest()
