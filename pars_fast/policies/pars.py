"""Shortest expected answer first, until a request has waited for too long: PARS.

Source: PARS (arXiv 2510.03243): bert-base-uncased, fine-tuned by a margin ranking loss on pairs of prompts
whose lengths differ by 20 % at least, orders the waiting requests; one that has waited for more than a
threshold goes first.

What is filled here: in simulation the score is that of a head on a frozen MiniLM, trained with the same loss
(`head_margin`), not of a fine-tuned BERT; in a live engine it is the ranker's that is loaded, one of the
paper's kind by `pars-fast train --loss margin`. The order is by expected tokens, to which a score is mapped.
The threshold of 120 s is second hand, and those beyond it run in order of arrival.
"""

from pars_fast.guards import FixedThreshold
from pars_fast.policies.ranked import Ranked


class Pars(Ranked):
    """Key: expected output tokens. Waiting requests only."""

    predictor = "head_margin"
    default_guard = FixedThreshold()
