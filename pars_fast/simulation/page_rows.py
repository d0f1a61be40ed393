"""What the simulators' pages ask of their rows."""

from collections.abc import Iterable, Mapping
from typing import Any


def values_of(rows: Iterable[Mapping[str, Any]], column: str) -> list[Any]:
    """The different values of a column, ascending; None is none."""
    return sorted({row[column] for row in rows if row[column] is not None})


def guard_name(row: Mapping[str, Any]) -> str:
    """Of the row's guard, without its settings."""
    return str(row["guard"]).split(":")[0]
