"""Shortest prompt first: the order that needs no ranker."""

from pars_fast.policies.base import Policy, QueuedRequest


class PromptLength(Policy):
    """A short question does not mean a short answer; the baseline that a ranker has to beat."""

    def key_on_arrival(self, request: QueuedRequest) -> float:
        return float(request.num_prompt_tokens)
