"""What counts as text, and as the same text."""

HASHED_PROMPT = "sha256:"  # stands before the hash of a prompt that is not kept itself


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
