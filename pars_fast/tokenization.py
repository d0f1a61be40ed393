"""Prompt text to a packed batch of WordPiece ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pars_fast.errors import PromptError
from pars_fast.text import is_text

# A WordPiece token rarely spans more characters than this; text outside the window is not even read, so a
# prompt of a million characters costs no more than one that fills the window.
MAX_CHARS_PER_TOKEN = 16


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Prompts end to end.

    `input_ids` (T,) int32; `cu_seqlens` (B + 1,) int32, prompt i owns rows cu_seqlens[i]:cu_seqlens[i + 1].
    """

    input_ids: Tensor
    cu_seqlens: Tensor

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device) -> "PackedBatch":
        return PackedBatch(self.input_ids.to(device), self.cu_seqlens.to(device))


def pack(ids: Sequence[Sequence[int]]) -> PackedBatch:
    """Lay prompts end to end.

    Raises: PromptError: if there is no prompt, or one has no token.
    """
    if not ids:
        raise PromptError("no prompts: an empty batch cannot be scored")
    lengths = torch.tensor([len(prompt) for prompt in ids], dtype=torch.int32)
    if not lengths.all():
        raise PromptError(f"prompt {int((lengths == 0).nonzero()[0])} has no tokens")
    cu_seqlens = torch.zeros(len(ids) + 1, dtype=torch.int32)
    torch.cumsum(lengths, dim=0, out=cu_seqlens[1:])
    flat = torch.tensor([token for prompt in ids for token in prompt], dtype=torch.int32)
    return PackedBatch(flat, cu_seqlens)


def batches(ids: Sequence[Sequence[int]], max_tokens: int) -> Iterator[PackedBatch]:
    """All prompts in their order, in batches of at most so many tokens; one longer than that is a batch.

    Raises: PromptError: as `pack`.
    """
    chunk: list[Sequence[int]] = []
    tokens = 0
    for prompt in ids:
        if chunk and tokens + len(prompt) > max_tokens:
            yield pack(chunk)
            chunk, tokens = [], 0
        chunk.append(prompt)
        tokens += len(prompt)
    yield pack(chunk)


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int, tail_tokens: int = 0
) -> list[list[int]]:
    """WordPiece ids of each prompt with [CLS] and [SEP], at most `max_tokens`, the last `tail_tokens` of them
    before [SEP] from the end of a prompt that is longer.

    Raises: PromptError: if a prompt is not a string, is empty, or holds code points that are no text.
    """
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise PromptError(f"prompt {index} must be a string, got {type(prompt).__name__}")
        if not prompt.strip():
            raise PromptError(f"prompt {index} is empty")
    windows = [_window(prompt, max_tokens, tail_tokens) for prompt in prompts]
    head = max_tokens - tail_tokens - 1  # with [CLS], without [SEP]
    try:
        encoded = (encoding.ids for encoding in tokenizer.encode_batch_fast(windows))
        return [ids if len(ids) <= max_tokens else ids[:head] + ids[-tail_tokens - 1 :] for ids in encoded]
    except (UnicodeEncodeError, TypeError) as error:
        bad = next((i for i, window in enumerate(windows) if not is_text(window)), None)
        raise PromptError(f"prompt {bad} holds code points that are no text (lone surrogates)") from error


def _window(prompt: str, max_tokens: int, tail_tokens: int) -> str:
    """As much of the prompt's text as its window can hold."""
    head_chars = (max_tokens - tail_tokens) * MAX_CHARS_PER_TOKEN
    tail_chars = tail_tokens * MAX_CHARS_PER_TOKEN
    if len(prompt) <= head_chars + tail_chars:
        return prompt
    return f"{prompt[:head_chars]} {prompt[-tail_chars:]}" if tail_tokens else prompt[:head_chars]
