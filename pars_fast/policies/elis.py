"""Shortest predicted remaining answer first, predicted again every 50 tokens: ELIS's ISRTF.

Source: ELIS (arXiv 2505.09142): the predictor reads prompt and answer so far, in windows of 50 tokens; jobs
are then sorted by what remains and the next batch is taken from the front.

What is filled here: between two predictions the remaining length falls by what was made, and the order is
looked at in every step. In a live engine the ranker is asked again, with prompt and answer so far as its
text; it is trained on prompts alone and reads their first tokens, so that little comes of it. No length file
holds the answers that later predictions would be trained on, so the simulator stands in for them: each has
the relative error of the first one, on what really remains. That is kind to the method where the first guess
is far off.
"""

from pars_fast.policies.base import QueuedRequest
from pars_fast.policies.ranked import Ranked

WINDOW_TOKENS = 50


class Elis(Ranked):
    """Key: expected remaining tokens, at least one."""

    predictor = "elis"
    preempts = True
    repredict_tokens = WINDOW_TOKENS

    def key(self, expected_tokens: float, request: QueuedRequest | None = None) -> float:
        made = 0 if request is None else request.num_output_tokens
        return max(expected_tokens - made, 1.0)
