"""Shortest real remaining answer first, waiting and running together: what preemption could gain at best.

Source: Schrage 1968 (shortest remaining processing time). Here a preempted request computes its KV cache
again, so it is no bound: preempting a long prompt for a short answer may cost more than it saves.
"""

from pars_fast.policies.base import Policy, QueuedRequest


class Srpt(Policy):
    """Reads `max_tokens`, which a replay sets to the recorded length of the answer."""

    knows_lengths = True
    preempts = True

    def key_on_arrival(self, request: QueuedRequest) -> float:
        return float(request.max_tokens - request.num_output_tokens)
