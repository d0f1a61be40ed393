"""Training losses, one function each: (scores, log_lengths) -> scalar.

Each takes `scores` (B,) float32 and `log_lengths` (B,) float32 of the B prompts of one batch, and returns
a scalar to minimise. Register a new one in `LOSSES`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pars_fast.metrics import MIN_RELATIVE_DIFFERENCE

Loss = Callable[[Tensor, Tensor], Tensor]

MARGIN = 1.0
# Logs in float32 are off by up to 1e-6: without it a pair at the filter's edge, or a length at its bucket's,
# may fall out.
EDGE_SLACK = 2e-6
LEAST_DIFFERENCE = 1e-5  # less than one token in 20,000, more than the slack
LTR_BUCKET_TOKENS = 10


def informative_pairs(
    log_lengths: Tensor, min_relative_difference: float = MIN_RELATIVE_DIFFERENCE
) -> tuple[Tensor, Tensor]:
    """Index pairs (i, j), i < j, that pass PARS's filter |La - Lb| / max(La, Lb) >= 0.2.

    On logs the filter reads |log La - log Lb| >= -log(1 - 0.2).
    """
    n = len(log_lengths)
    first, second = torch.triu_indices(n, n, offset=1, device=log_lengths.device)
    edge = -math.log(1 - min_relative_difference) - EDGE_SLACK
    keep = (log_lengths[first] - log_lengths[second]).abs() >= edge
    return first[keep], second[keep]


def margin(
    scores: Tensor, log_lengths: Tensor, *, min_relative_difference: float = MIN_RELATIVE_DIFFERENCE
) -> Tensor:
    """PARS's margin ranking loss over the filtered pairs of the batch: max(0, 1 - y (s_i - s_j)).

    PARS runs both prompts of each of 128 pairs through the encoder. Here every prompt is encoded once and
    meets all others of its batch: 16 prompts give 120 pairs, 15 partners a prompt and epoch (the paper: 10
    to 50), for a sixteenth of the encoder's work. Source: arXiv 2510.03243, margin ranking loss.
    """
    first, second = informative_pairs(log_lengths, min_relative_difference)
    if not len(first):
        return scores.sum() * 0.0
    sign = torch.sign(log_lengths[first] - log_lengths[second])
    return F.margin_ranking_loss(scores[first], scores[second], sign, margin=MARGIN)


def margin_unfiltered(scores: Tensor, log_lengths: Tensor) -> Tensor:
    """The margin ranking loss over all pairs whose lengths differ at all: what PARS's filter is judged by."""
    return margin(scores, log_lengths, min_relative_difference=LEAST_DIFFERENCE)


def length_buckets(log_lengths: Tensor) -> Tensor:
    """LTR's buckets of 10 tokens: bucket 7 holds 70 to 79. (B,) float32, whole numbers."""
    return ((log_lengths + EDGE_SLACK).exp() / LTR_BUCKET_TOKENS).floor()


def listmle(scores: Tensor, log_lengths: Tensor) -> Tensor:
    """LTR's list loss: the negative log likelihood of the batch's true order, longest first, per prompt.

    Plackett-Luce: at every place the right prompt is drawn among those not yet placed, by softmax of score.
    Lengths are compared in buckets of 10 tokens, and the order within a bucket is drawn anew each time (from
    torch's generator). Source: LTR (arXiv 2408.15792); Xia et al. 2008, ListMLE.
    """
    buckets = length_buckets(log_lengths)
    shuffled = torch.randperm(len(scores)).to(scores.device)
    order = shuffled[buckets[shuffled].argsort(descending=True, stable=True)]
    placed = scores[order]
    remaining = placed.flip(0).logcumsumexp(0).flip(0)
    return (remaining - placed).mean()


def huber(scores: Tensor, log_lengths: Tensor) -> Tensor:
    """Smooth L1 on log length: the score is the expected log length, comparable across data sets."""
    return F.smooth_l1_loss(scores, log_lengths)


LOSSES: dict[str, Loss] = {
    "margin": margin,
    "margin_unfiltered": margin_unfiltered,
    "listmle": listmle,
    "huber": huber,
}
