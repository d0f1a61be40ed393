"""Shortest expected answer first, bounded by the passing limit: this project's policy."""

from pars_fast.guards import PassingLimit
from pars_fast.policies.base import Policy, QueuedRequest


class ParsFast(Policy):
    """Key: the ranker's expected output tokens. Order: PARS (arXiv 2510.03243)."""

    uses_ranker = True
    default_guard = PassingLimit()

    def key_on_arrival(self, request: QueuedRequest) -> None:
        return None
