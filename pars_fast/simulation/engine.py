"""What one simulated vLLM engine has."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One vLLM engine, in vLLM's own names; `kv_cache_tokens` is what its KV cache holds."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_cache_tokens: int = 400_000
    block_size: int = 16
    max_model_len: int = 32768
