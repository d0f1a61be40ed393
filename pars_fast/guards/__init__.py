"""Guards by name: bounds on how far any order of scores may depart from the order of arrival."""

from dataclasses import fields

from pars_fast.guards.base import Guard, Moment, WaitingRequest, Watch
from pars_fast.guards.fixed_threshold import FixedThreshold
from pars_fast.guards.idle_quantum import IdleQuantum
from pars_fast.guards.none import NoGuard
from pars_fast.guards.overtaking_budget import OvertakingBudget
from pars_fast.guards.passing_limit import PassingLimit
from pars_fast.guards.relative_ageing import RelativeAgeing
from pars_fast.guards.uniboost import UniBoost

__all__ = ["GUARDS", "FixedThreshold", "Guard", "IdleQuantum", "Moment", "NoGuard", "OvertakingBudget",
           "PassingLimit", "RelativeAgeing", "UniBoost", "WaitingRequest", "Watch", "guard_text",
           "parse_guard"]

GUARDS: dict[str, type[Guard]] = {
    guard.name: guard
    for guard in (NoGuard, FixedThreshold, IdleQuantum, RelativeAgeing, UniBoost, OvertakingBudget,
                  PassingLimit)
}


def parse_guard(text: str) -> Guard:
    """The guard that a text such as `passing_limit:beta=0.5,floor_requests=10` means.

    Settings that are not given keep their defaults.

    Raises: ValueError: says what would have been right.
    """
    name, _, listed = text.partition(":")
    if name not in GUARDS:
        raise ValueError(f"one of {', '.join(GUARDS)}, with settings as in passing_limit:beta=0.5")
    guard = GUARDS[name]
    known = {field.name: field.type for field in fields(guard)}  # type: ignore[arg-type]
    settings: dict[str, float] = {}
    for item in filter(None, listed.split(",")):
        setting, _, value = item.partition("=")
        if setting not in known:
            raise ValueError(f"{name} with {', '.join(known) or 'no settings'}, not {setting!r}")
        try:
            settings[setting] = int(value) if known[setting] is int else float(value)
        except ValueError:
            kind = "a whole number" if known[setting] is int else "a number"
            raise ValueError(f"{name} with {setting} as {kind}, not {value!r}") from None
    try:
        return guard(**settings)
    except ValueError as error:
        raise ValueError(f"{name} with another value: {error}") from None


def guard_text(guard: Guard) -> str:
    """The text that `parse_guard` reads."""
    values = {field.name: getattr(guard, field.name) for field in fields(guard)}  # type: ignore[arg-type]
    settings = (f"{name}={str(value).removesuffix('.0')}" for name, value in values.items())
    return ":".join(filter(None, (guard.name, ",".join(settings))))
