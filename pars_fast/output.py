"""How commands write what they found."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pars_fast.errors import OutputError, make_writable


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
