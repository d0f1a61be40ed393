"""The rankers that come with the package, by name. Imports nothing heavy: the vLLM plug-in reads it."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"
PACKAGED = ("default", "small")
AUTO = "auto"


def checkpoint_directory(path: str | Path) -> Path:
    """Where a ranker lies that is given by its path or by its name in the package."""
    return CHECKPOINTS / path if str(path) in PACKAGED else Path(path)


def serving_ranker(name: str, device_type: str) -> str:
    """`auto` is `default` on a GPU and `small` on a CPU: a full server leaves the ranker little of its cores,
    and an order that comes in time is worth more than a better one that comes late."""
    if name != AUTO:
        return name
    return "small" if device_type == "cpu" else "default"
