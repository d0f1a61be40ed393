"""Queues of several levels by estimated execution time, first come first served within one: ALISE.

The length is that of the nearest stored prompts, a network's where none is near (`baselines/alise.py`). A
running job yields to a waiting one of a better level; the KV cache of a preempted job goes to host memory,
quantised, and comes back instead of being computed again. Source: ALISE (arXiv 2410.23537): its retrieval-
based speculative scheduler, and algorithm 2, dynamic swapping by estimated wait.

What is filled here: execution time is counted in output tokens, a prompt token being worth 0.6 of one as in
`cost_aware`; a level spans a factor of two; a job that outlasts its estimate is expected to go on for as long
as it has run, so that it sinks. The paper swaps by estimated wait, ahead of time; here every preempted block
counts as swapped unless the job comes back before the GPU reuses it, and the swap takes engine time
(`faithful.py`). A live engine computes again, unless vLLM has a KV offloading connector.
"""

import math

from pars_fast.policies.base import QueuedRequest
from pars_fast.policies.prompt_size import PROMPT_WORK
from pars_fast.policies.ranked import Ranked

FIRST_LEVEL_TOKENS = 32.0


class Alise(Ranked):
    """Key: the level, from 0."""

    predictor = "alise"
    preempts = True
    swaps_kv = True

    def key(self, expected_tokens: float, request: QueuedRequest | None = None) -> float:
        made, prompt = 0, 0
        if request is not None:
            made = request.num_output_tokens
            prompt = 0 if made else request.num_prompt_tokens  # once it answers, its prompt is computed
        remaining = expected_tokens - made if made < expected_tokens else made
        return float(max(0, math.ceil(math.log2((remaining + PROMPT_WORK * prompt) / FIRST_LEVEL_TOKENS))))
