"""Shortest expected answer first, bounded by the passing limit: this project's policy."""

from pars_fast.guards import PassingLimit
from pars_fast.policies.ranked import Ranked


class ParsFast(Ranked):
    """Key: the ranker's expected output tokens. Order: PARS (arXiv 2510.03243)."""

    default_guard = PassingLimit()
