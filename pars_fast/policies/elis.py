"""Shortest predicted remaining answer first, predicted again every 50 tokens: ELIS's ISRTF.

Source: ELIS (arXiv 2505.09142): the predictor reads prompt and answer so far, in windows of 50 tokens; jobs
are then sorted by what remains and the next batch is taken from the front.

What is filled here: between two predictions the remaining length falls by what was made, and the order is
looked at in every step. No length file holds the answers that the later predictions would be trained on, so
the simulator stands in for them: each has the relative error of the first one, on what really remains. That
is kind to the method where the first guess is far off.
"""

from pars_fast.policies.base import QueuedRequest
from pars_fast.policies.ranked import Ranked

WINDOW_TOKENS = 50


class Elis(Ranked):
    """Key: expected remaining tokens, at least one."""

    predictor = "elis"
    preempts = True
    repredict_tokens = WINDOW_TOKENS
    not_live = (
        "it predicts again from the answer so far, and a ranker is trained on prompts alone; "
        "`pars-fast simulate --engine faithful` runs it"
    )

    def key(self, expected_tokens: float, request: QueuedRequest | None = None) -> float:
        made = 0 if request is None else request.num_output_tokens
        return max(expected_tokens - made, 1.0)
