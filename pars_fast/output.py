"""How commands write what they found."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pars_fast.errors import OutputError, make_writable

if TYPE_CHECKING:
    from rich.console import Console

_LOG_WIDTH = 200  # columns of a file or pipe, which has no width of its own


def wide_console() -> "Console":
    """Prints tables as wide as the terminal, and whole where the output goes to a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, making the folder if need be.

    Raises: OutputError: if it cannot be written.
    """
    make_writable(path.parent)
    try:
        path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same columns, making the folder if need be; at least one.

    Raises: OutputError: if it cannot be written.
    """
    make_writable(path.parent)
    try:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
