"""A sentence encoder that is not trained: prompts to mean-pooled hidden states."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pars_fast.ranker import MAX_TOKENS, Ranker, read_config
from pars_fast.tokenization import pack
from pars_fast.training import resolve_encoder

BATCH_PROMPTS = 32


class FrozenEncoder:
    """`name` is as `resolve_encoder` has it; use `FrozenEncoder.of`, which loads each name once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.directory = resolve_encoder(name)
        positions = read_config(self.directory).get("max_position_embeddings", MAX_TOKENS)
        window = min(MAX_TOKENS, positions)
        self.ranker = Ranker.from_encoder(self.directory, pooling="mean", max_tokens=window)
        self._last: tuple[list[str], NDArray[np.float32]] | None = None

    @classmethod
    @functools.cache
    def of(cls, name: str) -> "FrozenEncoder":
        """Raises: CheckpointError, MissingExtraError: as `resolve_encoder`."""
        return cls(name)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """(B,) prompts -> (B, H) float32. The last answer is kept, since several baselines ask for the same.

        Raises: PromptError: if there is no prompt, or one is empty or no text.
        """
        if self._last is not None and self._last[0] == list(prompts):
            return self._last[1]
        ids = self.ranker.encode(prompts)
        embedded = [
            self.ranker.model.embed(batch.input_ids, batch.cu_seqlens)
            for start in range(0, max(1, len(ids)), BATCH_PROMPTS)
            for batch in [pack(ids[start : start + BATCH_PROMPTS])]
        ]
        self._last = list(prompts), torch.cat(embedded).numpy()
        return self._last[1]
