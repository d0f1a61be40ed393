"""From the served model's token ids to expected output tokens, one batch at a time.

Scoring gets only ids: the text is recovered (`prompt_text`) and tokenised again for the ranker. Runs in the
ranker's process or thread, never on the scheduling thread.
"""

import math
from collections.abc import Sequence

from pars_fast.errors import CheckpointError
from pars_fast.integration.prompt_text import PromptText
from pars_fast.integration.runtime import Prompt, Scored
from pars_fast.ranker import Ranker
from pars_fast.tokenization import PackedBatch, pack


class PromptScorer:
    """Scores batches of prompts; a prompt that cannot be scored gets NaN and harms no other.

    Raises: CheckpointError: if the ranker has no map from scores to tokens, or cannot be loaded.
    """

    def __init__(self, ranker: Ranker, tokenizer: str, revision: str | None) -> None:
        if ranker.token_map is None:
            raise CheckpointError("the ranker has no score-to-token map; train it with `pars-fast train`")
        self._ranker = ranker
        self.token_map = ranker.token_map
        self._text = PromptText(tokenizer, revision)

    def __call__(self, prompts: Sequence[Prompt]) -> list[Scored]:
        try:
            return self._score(prompts)
        except Exception:
            if len(prompts) == 1:
                return [(prompts[0].seq, math.nan)]
            return [scored for prompt in prompts for scored in self([prompt])]

    def pack(self, prompts: Sequence[Prompt]) -> PackedBatch:
        """The ranker's batch of these prompts. Raises: PromptError: if one is empty or no text."""
        return pack(self._ranker.encode(self._texts(prompts)))

    def _texts(self, prompts: Sequence[Prompt]) -> list[str]:
        return [self._text(prompt.ids) for prompt in prompts]

    def _score(self, prompts: Sequence[Prompt]) -> list[Scored]:
        expected = self.token_map(self._ranker.score(self._texts(prompts)).numpy())
        return [(seq, float(tokens)) for (seq, *_), tokens in zip(prompts, expected, strict=True)]


