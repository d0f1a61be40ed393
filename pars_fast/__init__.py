"""Prompt-aware shortest-first scheduling for vLLM: `from pars_fast import Ranker`.

The ranker is imported on first use, since vLLM loads the plug-in of this package in every one of its
processes and must not pay for torch there.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pars_fast.ranker import Ranker

__all__ = ["Ranker", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Ranker":
        from pars_fast.ranker import Ranker

        return Ranker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
