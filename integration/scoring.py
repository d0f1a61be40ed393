"""From the served model's token ids to expected output tokens, one batch at a time.

Scoring gets only ids: the text is recovered with the engine's own tokenizer and tokenised again for the
ranker. Runs in the ranker's process or thread, never on the scheduling thread.
"""

import math
from collections.abc import Sequence

from transformers import AutoTokenizer

from pars_fast.errors import CheckpointError
from pars_fast.integration.runtime import Prompt, Scored
from pars_fast.ranker import Ranker


class PromptScorer:
    """Scores batches of prompts; a prompt that cannot be scored gets NaN and harms no other.

    Raises: CheckpointError: if the ranker has no map from scores to tokens, or cannot be loaded.
    """

    def __init__(self, ranker: Ranker, tokenizer: str, revision: str | None) -> None:
        if ranker.token_map is None:
            raise CheckpointError("the ranker has no score-to-token map; train it with `pars-fast train`")
        self._ranker = ranker
        self._token_map = ranker.token_map
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, revision=revision)

    def __call__(self, prompts: Sequence[Prompt]) -> list[Scored]:
        try:
            return self._score(prompts)
        except Exception:
            if len(prompts) == 1:
                return [(prompts[0][0], math.nan)]
            return [scored for prompt in prompts for scored in self([prompt])]

    def _score(self, prompts: Sequence[Prompt]) -> list[Scored]:
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for _, ids in prompts]
        expected = self._token_map(self._ranker.score(texts).numpy())
        return [(seq, float(tokens)) for (seq, _), tokens in zip(prompts, expected, strict=True)]


