"""First come, first served: stock vLLM's order."""

from pars_fast.policies.base import Policy, QueuedRequest


class FCFS(Policy):
    """Every key is equal, so arrival decides."""

    def key_on_arrival(self, request: QueuedRequest) -> float:
        return 0.0
