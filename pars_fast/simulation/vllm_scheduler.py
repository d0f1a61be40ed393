"""vLLM's scheduler with the room of a simulated engine, for a model that is never loaded."""

import functools
import tempfile
from typing import Any

import torch
from transformers import Qwen2Config
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.structured_output import StructuredOutputManager

from pars_fast.simulation.engine import EngineSettings


def make_scheduler(scheduler_cls: type[Scheduler], engine: EngineSettings, policy: str = "fcfs") -> Any:
    """A scheduler of that class, vLLM's defaults but for the engine's room; `policy` is vLLM's own."""
    config = _vllm_config(engine, policy)
    num_blocks = engine.num_blocks + 1  # vLLM keeps one for itself
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(
        block_size=engine.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    return scheduler_cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=engine.block_size,
    )


@functools.cache
def _vllm_config(engine: EngineSettings, policy: str) -> VllmConfig:
    with tempfile.TemporaryDirectory() as model:
        Qwen2Config(
            architectures=["Qwen2ForCausalLM"],
            num_hidden_layers=1,
            max_position_embeddings=engine.max_model_len,
        ).save_pretrained(model)
        return VllmConfig(
            model_config=ModelConfig(
                model=model, skip_tokenizer_init=True, dtype="float32", max_model_len=engine.max_model_len
            ),
            scheduler_config=SchedulerConfig(
                max_num_seqs=engine.max_num_seqs,
                max_num_batched_tokens=engine.max_num_batched_tokens,
                max_model_len=engine.max_model_len,
                is_encoder_decoder=False,
                policy=policy,
            ),
            cache_config=CacheConfig(
                block_size=engine.block_size, enable_prefix_caching=engine.enable_prefix_caching
            ),
        )
