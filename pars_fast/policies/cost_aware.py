"""Cheapest expected request first, prompt and KV cache counted.

Key, in output tokens of a full batch: m + PROMPT_WORK * p + KV * E[p X + X^2 / 2], with p prompt tokens, X
the answer's length and m = E[X]. The last term is the KV cache held, summed over the steps (Justitia's cost,
arXiv 2510.17015); SageSched (arXiv 2603.07917) orders by a cost of compute and memory, too. For a request
that has begun, what is left is counted.

What is filled here: the weights. `PROMPT_WORK` says where its own comes from; of the same engine the roofline
profile has 0.039 us a KV token read.
Prompt tokens that are in the prefix cache when the score comes are held, but not computed.
"""

from pars_fast.policies.base import QueuedRequest
from pars_fast.policies.prompt_size import PROMPT_WORK, PromptSize
from pars_fast.policies.tabulated import Floats, Tabulated

KV = 0.039 / 28.5


class CostAware(Tabulated):
    """Waiting requests only. A request without a score counts as one of the typical prompt."""

    def tabulate(self, samples: Floats) -> None:
        self._mean, self._square = samples.mean(axis=1), (samples**2).mean(axis=1)
        self._typical_prompt = PromptSize()

    def key_on_arrival(self, request: QueuedRequest) -> None:
        self._typical_prompt.meet(request.num_prompt_tokens)

    def key(self, expected_tokens: float, request: QueuedRequest | None = None) -> float:
        made, prompt, cached = 0, self._typical_prompt.tokens, 0
        if request is not None:
            made, prompt = request.num_output_tokens, request.num_prompt_tokens
            cached = self.cached_tokens(request)
        mean, square = (self.look_up(table, expected_tokens) for table in (self._mean, self._square))
        held = prompt * mean + square / 2 - made * (prompt + made / 2)
        return PROMPT_WORK * (prompt - cached + made) + max(mean - made, 1.0) + KV * max(held, prompt + made)
