"""What counts as text, and as the same text."""

import hashlib
import re

HASHED_PROMPT = "sha256:"


def is_text(prompt: str) -> bool:
    """Whether a string can be written as UTF-8; one with lone surrogates cannot."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


def normalised(prompt: str) -> str:
    """Equal for prompts that differ in case and white space alone."""
    return " ".join(prompt.lower().split())


def hashed(prompt: str) -> str:
    """What stands for a prompt that is not kept itself: the same for those that `normalised` makes equal."""
    return HASHED_PROMPT + hashlib.sha256(normalised(prompt).encode()).hexdigest()


def is_hashed(prompt: str) -> bool:
    """Whether this is what `hashed` gives."""
    return re.fullmatch(f"{HASHED_PROMPT}[0-9a-f]{{64}}", prompt) is not None
