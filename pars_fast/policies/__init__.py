"""Scheduling policies by name; the same object orders the live queue and a simulated one."""

from typing import TYPE_CHECKING

from pars_fast.policies.alise import Alise
from pars_fast.policies.base import Policy
from pars_fast.policies.cost_aware import CostAware
from pars_fast.policies.elis import Elis
from pars_fast.policies.fcfs import FCFS
from pars_fast.policies.gittins import Gittins
from pars_fast.policies.justitia import Justitia
from pars_fast.policies.ltr import Ltr
from pars_fast.policies.oracle import Oracle
from pars_fast.policies.pars import Pars
from pars_fast.policies.pars_fast import ParsFast
from pars_fast.policies.perception_only import PerceptionOnly
from pars_fast.policies.priority import Priority
from pars_fast.policies.prompt_length import PromptLength
from pars_fast.policies.prompt_size import PROMPT_WORK
from pars_fast.policies.relative_ageing import RelativeAgeing
from pars_fast.policies.sharing import SharingPolicy
from pars_fast.policies.srpt import Srpt
from pars_fast.policies.tabulated import Tabulated
from pars_fast.policies.tie import Tie
from pars_fast.policies.uniboost import UniBoost
from pars_fast.policies.vtc import VirtualTokenCounter

if TYPE_CHECKING:
    from pars_fast.distribution import LengthDistribution

__all__ = ["POLICIES", "Policy", "SharingPolicy", "needs_distribution", "prompt_work", "with_lengths"]

POLICIES: dict[str, type[Policy]] = {
    "fcfs": FCFS,
    "priority": Priority,
    "prompt_length": PromptLength,
    "oracle": Oracle,
    "srpt": Srpt,
    "pars": Pars,
    "pars_fast": ParsFast,
    "ltr": Ltr,
    "perception_only": PerceptionOnly,
    "elis": Elis,
    "alise": Alise,
    "tie": Tie,
    "gittins": Gittins,
    "cost_aware": CostAware,
    "relative_ageing": RelativeAgeing,
    "uniboost": UniBoost,
    "justitia": Justitia,
    "vtc": VirtualTokenCounter,
}


def prompt_work(policy: type[Policy]) -> float | None:
    """The w of a key sqrt(X * (X + w * P)), of an expected answer X and a prompt P, both in tokens.

    It is 0 where the key is X alone, and None for any other key. The GPU's order and the fast simulator know
    no others.
    """
    return {Policy.key: 0.0, ParsFast.key: PROMPT_WORK}.get(policy.key)


def needs_distribution(name: str) -> bool:
    """Whether a policy orders by more of the predicted distribution than its mean."""
    return issubclass(POLICIES[name], Tabulated)


def with_lengths(name: str, lengths: "LengthDistribution | None") -> Policy:
    """The policy of that name; one that needs a distribution gets `lengths`, by log expected tokens."""
    policy = POLICIES[name]
    return policy(lengths) if issubclass(policy, Tabulated) else policy()
