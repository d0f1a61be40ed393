"""What the options of the simulators' commands have in common."""

from pars_fast.errors import ParsFastError


def require_at_least(minimum: int, option: str, *values: int) -> None:
    """Raises: ParsFastError: names the option and the first of its values that is below the minimum."""
    for value in values:
        if value < minimum:
            raise ParsFastError(f"{option} must be at least {minimum}, got {value}")
