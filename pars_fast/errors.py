"""What the library raises when its user can mend the cause; each message says how."""

import importlib
import tempfile
from pathlib import Path
from types import ModuleType


class ParsFastError(ValueError):
    """Base of all errors that carry advice; the command line prints them without a traceback."""


class CheckpointError(ParsFastError):
    """A ranker directory is missing, damaged, or of another architecture."""


class DataError(ParsFastError):
    """A data file cannot be read; the message names the file and the line."""


class PromptError(ParsFastError):
    """A prompt cannot be scored; the message names its position in the batch."""


class SettingsError(ParsFastError):
    """An environment variable has a value that is not allowed; the message names both."""


class OutputError(ParsFastError):
    """A result cannot be written; the message names the path."""


class KernelError(ParsFastError):
    """A GPU does not run the kernels, or they do not compute what PyTorch does there."""


class MissingExtraError(ParsFastError):
    """An optional dependency is not installed; the message gives the pip command."""


def make_writable(folder: Path) -> None:
    """Make a folder, and see that files can be written there.

    Raises: OutputError: if not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror})") from error


def require_extra(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises: MissingExtraError: if the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs {module}, which is not installed: pip install 'pars-fast[{extra}]'"
        ) from error
