"""The served model on a machine without a GPU: tiny, random, made in seconds.

Its words mean nothing, but the engine, its scheduler, its batches and its KV cache are real, and lengths
are replayed. The tokenizer is a byte-level BPE trained on the demo's own prompts, so that prompts survive
tokenisation as they would in a real model. A fast machine gets a deeper model, so that a step takes as long
as those of real ones: with steps of 1.5 ms a run is over in 4 s, and waits are short.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCAB_SIZE = 4096
END = "<|endoftext|>"
TINY = "a tiny random Qwen2"  # so begins what a reader is told about it
MAX_MODEL_LEN = 8192
STEP_S = 0.0055  # about what a step of 16 sequences is to take
_ENGINE_IN_LAYERS = 5  # what else an engine does in a step takes about as long as so many layers
_MAX_LAYERS = 16
_TIMED_LAYERS, _TIMED_SEQS, _TIMED_ROUNDS = 9, 16, 30


def layers_for_this_machine() -> int:
    """Depth at which a step takes about `STEP_S` here: a power of two, so that it is the same every time."""
    shallow, deep = (_seconds_of_a_forward(layers) for layers in (1, _TIMED_LAYERS))
    layers = STEP_S * (_TIMED_LAYERS - 1) / max(deep - shallow, 1e-9) - _ENGINE_IN_LAYERS
    return min(_MAX_LAYERS, 2 ** round(math.log2(max(layers, 1.0))))


def make_tiny_model(directory: Path, prompts: Sequence[str], num_layers: int = 1) -> str:
    """Write a random Qwen2 of `num_layers` layers and its tokenizer to `directory`.

    Returns: what to tell a reader about it; it begins with `TINY`.
    """
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(prompts, vocab_size=VOCAB_SIZE, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = _config(num_layers)
    Qwen2ForCausalLM(config).save_pretrained(directory)
    layers = "1 layer" if num_layers == 1 else f"{num_layers} layers"
    return (
        f"{TINY} ({layers}, hidden {config.hidden_size}) made on the spot: real engine, made-up words"
    )


def _config(num_layers: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )


@torch.inference_mode()
def _seconds_of_a_forward(num_layers: int) -> float:
    """The shortest of some forward passes over one token of each sequence: others may be at work, too."""
    model = Qwen2ForCausalLM(_config(num_layers)).eval()
    input_ids = torch.zeros(_TIMED_SEQS, 1, dtype=torch.long)
    shortest = math.inf
    for _ in range(_TIMED_ROUNDS):
        started = time.perf_counter()
        model(input_ids, use_cache=False)
        shortest = min(shortest, time.perf_counter() - started)
    return shortest
