"""The served model is asked how long its answer will be, and the shortest goes first: LTR's baseline.

Source: "perception only" of LTR (arXiv 2408.15792), after Sequence Scheduling (arXiv 2305.13144), whose
instruction asks for an estimate before the answer.

What is filled here: each request is served twice, first the prompt with an instruction, answered by an
estimate of a few tokens (`simulated_requests.py` says how many), then the prompt itself, whose KV cache is
then in the prefix cache as far as it was kept. Estimates run first, being the shortest. How good the model's
estimates are is a setting of the simulation, like a ranker's; a small model's are worse than a trained
ranker's.
"""

from pars_fast.policies.ranked import Ranked


class PerceptionOnly(Ranked):
    """Key: expected output tokens, as the model said."""

    asks_model = True
    not_live = (
        "it asks the served model before each request, which a client must do: send its estimate as "
        'vllm_xargs {"pars_score": tokens} with PARS_TRUST_CALLER=1 and PARS_POLICY=pars'
    )
