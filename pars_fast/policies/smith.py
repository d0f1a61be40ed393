"""Shortest expected answer and cheapest request together, bounded by the passing limit: Smith's rule.

Mean latency per token weighs a request by one over its answer's length, and for weighted completion times the
best order on one machine is that of work over weight (Smith 1956): here of answer * (prompt's work + answer's
work). So long prompts wait as long answers do, which `pars_fast`, as PARS, does not see.

What is filled here: an engine is no single machine, so the rule is a guide and no theorem; a prompt token
counts as much less than an output token as `cost_aware` has it.
"""

import math

from pars_fast.guards import PassingLimit
from pars_fast.policies.base import QueuedRequest
from pars_fast.policies.cost_aware import PREFILL
from pars_fast.policies.prompt_size import PromptSize
from pars_fast.policies.ranked import Ranked


class Smith(Ranked):
    """Key: the geometric mean, in tokens, of the expected answer and of all work. Waiting requests only."""

    default_guard = PassingLimit()

    def __init__(self) -> None:
        self._typical_prompt = PromptSize()

    def key_on_arrival(self, request: QueuedRequest) -> None:
        self._typical_prompt.meet(request.num_prompt_tokens)

    def key(self, expected_tokens: float, request: QueuedRequest | None = None) -> float:
        prompt = self._typical_prompt.tokens if request is None else request.num_prompt_tokens
        return math.sqrt(expected_tokens * (expected_tokens + PREFILL * prompt))
