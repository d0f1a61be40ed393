"""Results kept as they come, one JSON line each under a key, so that what was interrupted goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pars_fast.errors import OutputError


def read_rows(path: Path | None) -> dict[str, dict[str, Any]]:
    """Rows by key; none if the file is not there, or for None. A line that was cut off is left out."""
    rows: dict[str, dict[str, Any]] = {}
    if path is not None and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                rows[entry["key"]] = entry["row"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # cut off while it was written
    return rows


def append_row(path: Path | None, key: str, row: Mapping[str, Any]) -> None:
    """Keep one more row; for None, nothing.

    Raises: OutputError: if the file cannot be written.
    """
    if path is None:
        return
    try:
        with path.open("a+", encoding="utf-8") as file:
            if file.tell() and not path.read_bytes().endswith(b"\n"):
                file.write("\n")  # after a line that was cut off
            file.write(json.dumps({"key": key, "row": row}) + "\n")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
