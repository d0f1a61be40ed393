"""Shortest predicted answer first, waiting and running together: LTR.

All requests are sorted anew at each step by a score learnt with ListMLE on lengths in buckets of 10; those at
the front run, so that a running request yields to a shorter one that arrives (`preemption.py`). One that has
not run for 200 steps is put first for a quantum of 10. Source: LTR (arXiv 2408.15792) and its scheduler
(vllm/core/scheduler.py of github.com/hao-ai-lab/vllm-ltr).

What is filled here: the score is an encoder's, not OPT-125M's; in simulation a head on a frozen encoder
trained with ListMLE. A preempted request's KV cache is freed and computed again, except what the prefix cache
still holds; the paper's vLLM could swap it to the host instead.
"""

from pars_fast.guards import IdleQuantum
from pars_fast.policies.ranked import Ranked


class Ltr(Ranked):
    """Key: expected output tokens, the same however far the answer has come."""

    predictor = "head_listmle"
    preempts = True
    default_guard = IdleQuantum()
