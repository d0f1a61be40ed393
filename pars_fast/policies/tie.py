"""Expectation inflated by its tail: TIE.

Key: E[X] + beta * CVaR_0.9[X], X the answer's length, log-t distributed. Source: TIE (arXiv 2604.00499):
equation 11 as its released code names it, CVaR of appendix B.

What is filled here: beta is fixed. The paper has beta = min(0.5, max(0.1, 0.1 * waiting / batch)) (equation
12), so it reaches 0.5 when five batches wait. Its lengths are cut at 2048 tokens; here at `LONGEST`. mu and
sigma come from `Ranker.distribution`, functions of one score, where the paper has a head for each, trained on
20 to 100 samples a prompt.
"""

from pars_fast.policies.tabulated import Floats, Index

BETA = 0.5
TAIL = 0.1  # 1 - alpha


class Tie(Index):
    """Waiting requests only."""

    def index(self, samples: Floats) -> Floats:
        tail = samples[:, -round(TAIL * samples.shape[1]) :]
        return samples.mean(axis=1) + BETA * tail.mean(axis=1)
