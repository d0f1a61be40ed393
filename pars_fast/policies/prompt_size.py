"""How long prompts are at present: what stands in for the prompt of a typical request."""

_MEMORY = 0.01  # of the running mean: a hundred requests


class PromptSize:
    """Exponential mean of the lengths met; `tokens` is 0 before the first."""

    def __init__(self) -> None:
        self.tokens = 0.0

    def meet(self, prompt_tokens: int) -> None:
        """A prompt has arrived."""
        if self.tokens:
            self.tokens += _MEMORY * (prompt_tokens - self.tokens)
        else:
            self.tokens = float(prompt_tokens)
