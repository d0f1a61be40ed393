"""From a served model's token ids to the ranker's text: what was said, without the chat template.

Role headers, the system prompt and the cue for the answer say little about one request and look like nothing
a ranker was trained on: eleven tokens of a system prompt take 0.03 of tau, 67 take 0.27
(`bench/system_prompts.py`).
"""

import datetime
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger("vllm.pars_fast")

# Where prompts agree for so much longer than their system prompt, it is more than some users' first words.
_LONG_WORDS = 128  # characters
# Stand for what people write; whatever the template puts around them is its own.
_SYSTEM, _USER, _ANSWER, _AGAIN = "qsystemq", "quserq", "qanswerq", "qagainq"


class PromptText:
    """Decodes with the served model's tokenizer, a folder or a hub name, of this revision.

    `chat_template`: file of the template that the server uses in place of the tokenizer's own. Prompts that
    were made with another one keep what it added.

    Raises: OSError, ValueError: if the tokenizer or the template cannot be loaded.
    """

    def __init__(self, tokenizer: str, revision: str | None, chat_template: Path | None = None) -> None:
        self._tokenizer = _load(tokenizer, revision)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template.read_text()
        self._read_template()

    def __call__(self, ids: Sequence[int], shared: int = 0) -> str:
        """The text of a prompt; turns of a conversation stand on lines of their own.

        Raises: as `read`.
        """
        return self.read(ids, shared)[0]

    def read(self, ids: Sequence[int], shared: int = 0) -> tuple[str, str]:
        """The same, and the system prompt that was left out of it, "" if there was none.

        Of a prompt whose first `shared` ids others have, too, these are left out; but where that is about the
        system prompt, all that the user said is left. Where it is more, such as examples, they say more
        than the system prompt whose prompt it is, and none is given.

        Raises: whatever the tokenizer does of ids that are not its own.
        """
        if self._day != datetime.date.today():  # some templates hold the date
            self._read_template()
        text, system_prompt = self._split(str(self._tokenizer.decode(ids)))
        if shared:
            behind = str(self._tokenizer.decode(ids[shared:]))
            if not system_prompt or len(text) - len(behind) > _LONG_WORDS:
                text, system_prompt = behind, ""
        text = text.removesuffix(self._end) if self._end else text
        for turn in self._turns:
            text = text.replace(turn, "\n")
        return self._specials.sub(" ", text).strip(), system_prompt

    def _split(self, text: str) -> tuple[str, str]:
        """Without all that comes before the first message of the user, and the system prompt."""
        start, turn = self._system
        if start and text.startswith(start) and turn in text:
            before, _, rest = text.partition(turn)
            return rest, before[len(start) :]
        return text.removeprefix(self._start), ""

    def _read_template(self) -> None:
        """What the chat template writes around messages, as it comes out of the decoder."""
        self._day = datetime.date.today()
        self._start = ""
        self._system = ("", "")  # what comes before and after a system prompt
        self._turns: list[str] = []
        self._end = ""
        # With a role, or in the template. Not all that a vocabulary marks: it may mark thousands.
        specials = set(self._tokenizer.all_special_tokens)
        if getattr(self._tokenizer, "chat_template", None):
            user = {"role": "user", "content": _USER}
            chat = [user, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _AGAIN}]
            if parts := self._around(chat, specials):
                self._start, *turns, self._end = parts
                self._turns = [turn for turn in turns if turn.strip()]
            if parts := self._around([{"role": "system", "content": _SYSTEM}, user], specials):
                self._system = (parts[0], parts[1]) if parts[1].strip() else ("", "")
        names = map(re.escape, sorted(specials, key=len, reverse=True))
        self._specials = re.compile("|".join(names) if specials else r"(?!)")

    def _around(self, messages: list[dict[str, str]], specials: set[str]) -> list[str] | None:
        """What the template writes before, between and after these messages, None if it refuses them; its
        special tokens are added to `specials`."""
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            decode = self._tokenizer.decode
            ids = self._tokenizer.encode(rendered, add_special_tokens=False)
            parts = re.split("|".join(m["content"] for m in messages), str(decode(ids)))
            specials |= {
                str(decode([token_id])) for token_id in set(ids)
                if decode([token_id]) and not decode([token_id], skip_special_tokens=True)
            }
        except Exception as error:  # a template may refuse a role, or be broken
            logger.debug("pars-fast: the chat template is not understood: %r", error)
            return None
        return parts if len(parts) == len(messages) + 1 else None


def _load(tokenizer: str, revision: str | None) -> Any:
    """With the class that reads any `tokenizer.json`: `AutoTokenizer` imports all of text generation, which
    is five seconds of a core and 200 MB. It is for what has no such file."""
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(tokenizer, revision=revision)
    except Exception as error:  # what it raises of other files is not said anywhere
        logger.debug("pars-fast: %s: no tokenizer.json that can be read: %r", tokenizer, error)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer, revision=revision)
