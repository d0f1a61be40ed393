"""How a policy is named to the demo's scheduler, which changes it between drained runs; imports no vLLM."""

import re

from pars_fast.guards import Guard, guard_text, parse_guard
from pars_fast.policies import POLICIES

POLICY_FILE_VARIABLE = "PARS_DEMO_POLICY_FILE"  # the file that the scheduler reads it from


def parse_policy(text: str) -> tuple[str, Guard | None]:
    """(name, guard) of a text such as `fcfs`, `pars_fast/none` or `pars/fixed_threshold:seconds=60`.

    The guard is None where the policy is to have its own.

    Raises: ValueError: says what would have been right.
    """
    name, slash, guard = text.partition("/")
    if name not in POLICIES:
        raise ValueError(f"one of {', '.join(POLICIES)}, with another guard as in pars_fast/none")
    return name, parse_guard(guard) if slash else None


def split_policies(text: str) -> list[str]:
    """Policies by comma, or `all`; each as it is shown, once.

    Raises: ValueError: names the policy that is none, and says what would be right.
    """
    shown: dict[str, None] = {}
    for part in POLICIES if text == "all" else re.split(r",(?![a-z_]+=)", text):  # else within a guard
        try:
            name, guard = parse_policy(part)
        except ValueError as error:
            raise ValueError(f"a policy is {error}; got {part!r}") from None
        shown[part if guard is None else f"{name}/{_short(guard)}"] = None
    return list(shown)


def _short(guard: Guard) -> str:
    """Without the settings, where they are the guard's own."""
    return guard.name if guard == type(guard)() else guard_text(guard)
