"""vLLM's own priority order: by the request's `priority`, then by arrival; it knows no lengths.

vLLM itself heeds `priority` under `--scheduling-policy priority` alone, where it comes before the key of any
policy, and preempts the lowest when the KV cache is full. Under vLLM's default policy this one orders by it
all the same: to choose it is to trust what clients say. Source: vllm/v1/core/sched/request_queue.py (0.32).
"""

from pars_fast.policies.base import Policy, QueuedRequest


class Priority(Policy):
    def key_on_arrival(self, request: QueuedRequest) -> float:
        return float(request.priority)
