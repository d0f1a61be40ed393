"""How much longer or shorter one application's answers are than what its prompts let the ranker expect.

A system prompt decides much about the length of an answer ("reply in one word"), and the ranker does not see
it: shared by all prompts of an application, it would drown what differs between them. What it does to the
length shows in the answers. An application's requests have a mean of log real over expected tokens, and its
distance from the mean of all is believed as far as applications differ by more than their own requests do:
one-way random effects by the method of moments (Searle, Casella and McCulloch 1992, "Variance Components",
3.6), so one with few requests is moved a little. Where an F test does not find that they differ, nothing is
changed at all: a factor that is noise would part the order on the host from one that a GPU keeps.
"""

import math
from collections.abc import Hashable, Iterable

import numpy as np
from scipy.special import fdtri

from pars_fast.live_calibration import Ending, Observation

LEAST_OBSERVATIONS = 64
SURE = 0.99  # of the F test; it is made once a cohort


def fit_application_factors(observations: Iterable[Observation]) -> dict[Hashable, float]:
    """What to multiply the ranker's expected tokens by, by application; {} if nothing is to be learnt.

    Capped answers count as long as they were, cut ones are left out, as in `fit_token_scale`. A common factor
    is not looked for: the scale has it.
    """
    served = [o for o in observations if o.ending is not Ending.CUT and o.output_tokens > 0]
    names = list(dict.fromkeys(o.application for o in served))
    total, groups = len(served), len(names)
    if total < LEAST_OBSERVATIONS or not 1 < groups < total:
        return {}
    number = {name: index for index, name in enumerate(names)}
    group = np.array([number[o.application] for o in served])
    log_ratio = np.log([o.output_tokens / o.expected_tokens for o in served])
    size = np.bincount(group).astype(np.float64)
    mean = np.bincount(group, log_ratio) / size
    apart = mean - log_ratio.mean()
    within = float(((log_ratio - mean[group]) ** 2).sum()) / (total - groups)
    between = float((size * apart**2).sum()) / (groups - 1)
    if not between > max(1.0, fdtri(groups - 1, total - groups, SURE)) * within:
        return {}
    typical_size = (total - float((size**2).sum()) / total) / (groups - 1)
    variance = (between - within) / typical_size
    believed = size * variance / (size * variance + within)
    return {name: math.exp(offset) for name, offset in zip(names, (believed * apart).tolist(), strict=True)}
