"""vLLM's own priority order: by the request's `priority`, then by arrival; it knows no lengths.

Requests have a priority only under vLLM's `--scheduling-policy priority`, which is also what preempts the
lowest of them when the KV cache is full. Source: vllm/v1/core/sched/request_queue.py (0.32).
"""

from pars_fast.policies.base import Policy, QueuedRequest


class Priority(Policy):
    def key_on_arrival(self, request: QueuedRequest) -> float:
        return float(request.priority)
