"""What a simulated engine has room for, by vLLM's own names."""

from dataclasses import dataclass, fields

from pars_fast.errors import ParsFastError


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One vLLM engine.

    Attributes:
        max_num_seqs: requests that run at once.
        max_num_batched_tokens: tokens of one step, prefill and decode together.
        kv_cache_tokens: tokens that the KV cache holds, in whole blocks.
        block_size: tokens of a KV block.
        max_model_len: longest prompt and answer together.
        enable_prefix_caching: without it, all tokens of a preempted request are computed again.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_cache_tokens: int = 400_000
    block_size: int = 16
    max_model_len: int = 32768
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is not bool and getattr(self, field.name) < 1:
                raise ParsFastError(f"{field.name} must be at least 1, got {getattr(self, field.name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ParsFastError(f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                                f"max_num_seqs ({self.max_num_seqs}), as in vLLM")

    @property
    def num_blocks(self) -> int:
        """Blocks that requests can use."""
        return self.kv_cache_tokens // self.block_size

    def can_hold(self, prompt_tokens: int, output_tokens: int) -> bool:
        """Whether an empty engine could serve such a request; one that it could not is refused."""
        tokens = prompt_tokens + output_tokens
        return tokens <= min(self.max_model_len, self.num_blocks * self.block_size)
