"""Whether a process that a test knows by its number still runs."""

from pathlib import Path


def is_running(pid: int) -> bool:
    """False for a zombie, too: nobody may be there to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
