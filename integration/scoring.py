"""From the served model's token ids to expected output tokens, one batch at a time.

Scoring gets only ids: the text is recovered (`prompt_text`) and tokenised again for the ranker. Runs in the
ranker's process or thread, never on the scheduling thread.
"""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

from pars_fast.integration.prompt_text import PromptText
from pars_fast.integration.runtime import Prompt, Scored
from pars_fast.ranker import Ranker
from pars_fast.tokenization import PackedBatch, pack


class PromptScorer:
    """Scores batches of prompts; a prompt that cannot be scored gets NaN and harms no other.

    `tokenizer`, `revision` and `chat_template` are `PromptText`'s.

    Raises: CheckpointError: if the ranker has no map from scores to tokens, or cannot be loaded.
    """

    def __init__(
        self, ranker: Ranker, tokenizer: str, revision: str | None, chat_template: Path | None = None
    ) -> None:
        self._ranker = ranker
        self._token_map = ranker.required_token_map()
        self._text = PromptText(tokenizer, revision, chat_template)

    def __call__(self, prompts: Sequence[Prompt]) -> list[Scored]:
        try:
            return self._score(prompts)
        except Exception:
            if len(prompts) == 1:
                return [Scored(prompts[0].seq, math.nan)]
            return [scored for prompt in prompts for scored in self([prompt])]

    def pack(self, prompts: Sequence[Prompt]) -> tuple[PackedBatch, list[int]]:
        """The ranker's batch of these prompts, and what stands for their system prompts (`Scored`).

        Raises: PromptError: if one is empty or no text.
        """
        texts, system_prompts = self._read(prompts)
        return pack(self._ranker.encode(texts)), system_prompts

    def _read(self, prompts: Sequence[Prompt]) -> tuple[list[str], list[int]]:
        read = [self._text.read(prompt.ids, prompt.shared) for prompt in prompts]
        return [text for text, _ in read], [zlib.crc32(system.encode()) for _, system in read]

    def _score(self, prompts: Sequence[Prompt]) -> list[Scored]:
        texts, system_prompts = self._read(prompts)
        expected = self._token_map(self._ranker.score(texts).numpy())
        answers = zip(prompts, expected, system_prompts, strict=True)
        return [Scored(prompt.seq, float(tokens), system) for prompt, tokens, system in answers]


