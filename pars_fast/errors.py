"""What the library raises when its user can mend the cause; each message says how."""

import importlib
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


class MissingExtraError(ParsFastError):
    """An optional dependency is not installed; the message gives the pip command."""


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
