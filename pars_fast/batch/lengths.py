"""How long answers will be: the served model is asked, or a ranker says."""

import re
import statistics
from collections.abc import Sequence

from pars_fast.batch.job import Engine, Piece

UNKNOWN_TOKENS = 256.0  # where no answer to the question held a number
_QUESTION = (
    "{prompt}\n\nDo not answer the above. Say how many tokens your answer would have, as a number and "
    "nothing else:"
)
_QUESTION_TOKENS = 64  # room for the question
_ANSWER_TOKENS = 8


class Perception:
    """Asks the served model (length perception, arXiv 2305.13144, which tunes the model for it; here it is as
    it is). A prompt whose answer holds no number, or that leaves no room for the question, gets the median of
    the others.

    Attributes:
        output_tokens: tokens that the model has spent on it.
        unknown: prompts that got the median.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.output_tokens = 0
        self.unknown = 0

    def __call__(self, prompts: Sequence[str]) -> list[float]:
        room = self._engine.max_model_len - _QUESTION_TOKENS - _ANSWER_TOKENS
        sizes = self._engine.prompt_tokens(prompts)
        questions = [
            Piece(number, _QUESTION.format(prompt=prompt), _ANSWER_TOKENS)
            for number, (prompt, size) in enumerate(zip(prompts, sizes, strict=True))
            if size <= room
        ]
        said: dict[int, float] = {}
        for number, completion in self._engine.generate(questions):
            self.output_tokens += completion.output_tokens
            if found := re.search(r"\d{1,6}", completion.text):
                said[number] = max(1.0, float(found.group()))
        self.unknown = len(prompts) - len(said)
        median = statistics.median(said.values()) if said else UNKNOWN_TOKENS
        return [said.get(number, median) for number in range(len(prompts))]


def ranker_lengths(name: str, prompts: Sequence[str]) -> list[float]:
    """Expected output tokens by a ranker: `default`, `small`, or a directory.

    Raises: CheckpointError: if it cannot be loaded, or has no map to tokens.
    """
    from pars_fast.ranker import Ranker

    expected: list[float] = Ranker.from_pretrained(name).expected_tokens(prompts).tolist()
    return expected
