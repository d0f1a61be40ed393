"""Shortest answer and least work first, by the ranker, bounded by the passing limit: this project's policy.

PARS (arXiv 2510.03243) orders by the predicted answer alone, and where prompts are long that gains nothing
end to end. Mean latency per token weighs a request by one over its answer's length, and for weighted
completion times the best order on one machine is that of work over weight (Smith 1956): here of answer *
(prompt's work + answer's work). So long prompts wait as long answers do.

What is filled here: an engine is no single machine, so the rule is a guide and no theorem; simulated on five
traces it keeps the gain per token and adds one end to end, whatever between 0.3 and 3 output tokens a prompt
token is said to cost (`docs/policies.md`). What the prefix cache holds of a prompt when its score comes is no
work.
"""

import math

from pars_fast.guards import PassingLimit
from pars_fast.policies.base import QueuedRequest
from pars_fast.policies.prompt_size import PROMPT_WORK, PromptSize
from pars_fast.policies.ranked import Ranked


class ParsFast(Ranked):
    """Key: the geometric mean, in tokens, of the expected answer and of all work. Waiting requests only."""

    default_guard = PassingLimit()

    def __init__(self) -> None:
        self._typical_prompt = PromptSize()

    def key_on_arrival(self, request: QueuedRequest) -> None:
        self._typical_prompt.meet(request.num_prompt_tokens)

    def key(self, expected_tokens: float, request: QueuedRequest | None = None) -> float:
        prompt = self._typical_prompt.tokens if request is None else self.uncached_tokens(request)
        return math.sqrt(expected_tokens * (expected_tokens + PROMPT_WORK * prompt))
