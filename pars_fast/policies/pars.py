"""Shortest expected answer first, bounded by a fixed waiting time: PARS as its paper has it."""

from pars_fast.guards import FixedThreshold
from pars_fast.policies.ranked import Ranked


class Pars(Ranked):
    """Key: the ranker's expected output tokens. Source: PARS (arXiv 2510.03243)."""

    predictor = "head_margin"
    default_guard = FixedThreshold()
