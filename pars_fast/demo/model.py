"""The served model on a machine without a GPU: tiny, random, made in seconds.

Its words mean nothing, but the engine, its scheduler, its batches and its KV cache are real, and lengths
are replayed. The tokenizer is a byte-level BPE trained on the demo's own prompts, so that prompts survive
tokenisation as they would in a real model.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCAB_SIZE = 4096
END = "<|endoftext|>"
TINY = "a tiny random Qwen2"  # so begins what a reader is told about it
MAX_MODEL_LEN = 8192
# A step then takes about as long as those of real models, 18 ms on a core without AVX-512. With one layer it
# takes 1.5 ms on a newer one: a run is over in 4 s, and nobody waits for long.
NUM_LAYERS = 8


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
