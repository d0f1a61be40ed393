"""How commands write what they found."""

import json
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
