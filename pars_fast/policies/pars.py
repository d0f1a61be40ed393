"""Shortest expected answer first, bounded by a fixed waiting time: PARS as its paper has it."""

from pars_fast.guards import FixedThreshold
from pars_fast.policies.base import Policy, QueuedRequest


class Pars(Policy):
    """Key: the ranker's expected output tokens. Source: PARS (arXiv 2510.03243)."""

    uses_ranker = True
    default_guard = FixedThreshold()

    def key_on_arrival(self, request: QueuedRequest) -> None:
        return None
