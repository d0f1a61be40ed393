"""From a served model's token ids to the ranker's text: what was said, without the chat template.

Role headers, a model's default system prompt and the cue for its answer say nothing about one request and
look like nothing a ranker was trained on.
"""

import datetime
import logging
import re
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger("vllm.pars_fast")

# Stand for what people write; whatever the template puts around them is its own.
_SYSTEM, _USER, _ANSWER, _AGAIN = "qsystemq", "quserq", "qanswerq", "qagainq"


class PromptText:
    """Decodes with the served model's tokenizer.

    Prompts that were made with another template keep what it added.
    """

    def __init__(self, tokenizer: str, revision: str | None) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer, revision=revision)
        specials = sorted(self._tokenizer.all_special_tokens, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, specials)) if specials else r"(?!)")
        self._read_template()

    def __call__(self, ids: Sequence[int]) -> str:
        """The text of a prompt; turns of a conversation stand on lines of their own.

        Raises: whatever the tokenizer does of ids that are not its own.
        """
        if self._day != datetime.date.today():  # some templates hold the date
            self._read_template()
        text = str(self._tokenizer.decode(ids))
        for start in self._starts:
            if text.startswith(start):
                text = text[len(start) :]
                break
        text = text.removesuffix(self._end) if self._end else text
        for turn in self._turns:
            text = text.replace(turn, "\n")
        return self._specials.sub(" ", text).strip()

    def _read_template(self) -> None:
        """What the chat template writes around messages, as it comes out of the decoder."""
        self._day = datetime.date.today()
        self._starts: list[str] = []
        self._turns: set[str] = set()
        self._end = ""
        if not getattr(self._tokenizer, "chat_template", None):
            return
        user = {"role": "user", "content": _USER}
        chat = [user, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _AGAIN}]
        for messages in (chat, [{"role": "system", "content": _SYSTEM}, user]):
            try:
                rendered = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
                ids = self._tokenizer.encode(rendered, add_special_tokens=False)
                text = str(self._tokenizer.decode(ids))
            except Exception as error:  # a template may refuse a role, or be broken
                logger.debug("pars-fast: the chat template is not understood: %r", error)
                continue
            start, *turns, end = re.split("|".join((_SYSTEM, _USER, _ANSWER, _AGAIN)), text)
            self._starts = sorted(filter(None, [start, *self._starts]), key=len, reverse=True)
            self._turns |= {turn for turn in turns if turn.strip()}
            self._end = end
