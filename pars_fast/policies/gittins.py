"""The Gittins index of the predicted distribution.

Key: min over t of E[min(X, t)] / P(X <= t), the work that a request takes for each chance of being done with
it. A request that may well be short goes ahead of one that is surely of middle length. Source: Gittins 1979;
SageSched (arXiv 2603.07917) orders LLM requests by it, on distributions of the cost.

What is filled here: X is output tokens, not SageSched's cost of compute and memory (`cost_aware` has that),
the distribution is `Ranker.distribution` and not taken from past requests alike, and the index is that of a
request that has not run: nothing that runs is preempted.
"""

import numpy as np

from pars_fast.policies.tabulated import Floats, Index


class Gittins(Index):
    """Waiting requests only."""

    def index(self, samples: Floats) -> Floats:
        count = samples.shape[1]
        done = np.arange(1, count + 1)  # samples that are done by the k-th
        work = np.cumsum(samples, axis=1) + samples * (count - done)  # sum of min(X, t), t the k-th sample
        return (work / done).min(axis=1)
