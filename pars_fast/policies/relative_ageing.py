"""Shortest expected answer first, until a request has waited in proportion to its own length.

Source: vLLM RFC #55265, read second hand; what it leaves open is said in `guards/relative_ageing.py`.
"""

from pars_fast import guards
from pars_fast.policies.ranked import Ranked


class RelativeAgeing(Ranked):
    """Key: expected output tokens; guard: 0.02 s of wait for each of them."""

    default_guard = guards.RelativeAgeing()
