"""Arrival moved by the logarithm of the expected length: UniBoost, between first come and shortest first.

Source: UniBoost (arXiv 2606.18431) after gamma-Boost; `guards/uniboost.py` has the order, what was read of
the paper and what is filled.
"""

from pars_fast import guards
from pars_fast.policies.ranked import Ranked


class UniBoost(Ranked):
    """Key: expected output tokens; the guard makes the order."""

    default_guard = guards.UniBoost()
