"""What prompts cost, and how long they are at present: what stands in for the prompt of a typical request."""

# Of a prompt token, in output tokens of a full batch: seconds of Llama-3.1-8B on an H100, of which
# `h100_llama_3_1_8b` with 256 seats has 17.3 us a prompt token and 28.5 us an output token.
PROMPT_WORK = 17.3 / 28.5

PROMPT_MEMORY = 0.01  # of the running mean: a hundred requests


class PromptSize:
    """Exponential mean of the lengths met; `tokens` is 0 before the first."""

    def __init__(self) -> None:
        self.tokens = 0.0

    def meet(self, prompt_tokens: int) -> None:
        """A prompt has arrived."""
        if self.tokens:
            self.tokens += PROMPT_MEMORY * (prompt_tokens - self.tokens)
        else:
            self.tokens = float(prompt_tokens)
