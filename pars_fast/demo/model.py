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
DESCRIPTION = "a tiny random Qwen2 (1 layer, hidden 128) made on the spot: real engine, made-up words"
MAX_MODEL_LEN = 8192


def make_tiny_model(directory: Path, prompts: Sequence[str]) -> str:
    """Write a random Qwen2 and its tokenizer to `directory`; returns what to tell a reader about it."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(prompts, vocab_size=VOCAB_SIZE, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    return DESCRIPTION
