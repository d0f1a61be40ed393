"""Shortest real answer first: the upper bound for any ranker, only possible when lengths are replayed."""

from pars_fast.policies.base import Policy, QueuedRequest


class Oracle(Policy):
    """Reads `max_tokens`, which a replay sets to the recorded length of the answer."""

    knows_lengths = True

    def key_on_arrival(self, request: QueuedRequest) -> float:
        return float(request.max_tokens)
