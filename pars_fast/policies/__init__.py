"""Scheduling policies by name; the same object orders the live queue and a simulated one."""

from pars_fast.policies.base import Policy
from pars_fast.policies.fcfs import FCFS
from pars_fast.policies.justitia import Justitia
from pars_fast.policies.oracle import Oracle
from pars_fast.policies.pars import Pars
from pars_fast.policies.pars_fast import ParsFast
from pars_fast.policies.prompt_length import PromptLength
from pars_fast.policies.sharing import SharingPolicy
from pars_fast.policies.vtc import VirtualTokenCounter

__all__ = ["POLICIES", "Policy", "SharingPolicy"]

POLICIES: dict[str, type[Policy]] = {
    "fcfs": FCFS,
    "prompt_length": PromptLength,
    "oracle": Oracle,
    "pars": Pars,
    "pars_fast": ParsFast,
    "justitia": Justitia,
    "vtc": VirtualTokenCounter,
}
