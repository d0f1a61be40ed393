"""Ids back to what was said: chat templates of the kinds in use, and none."""

import datetime
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pars_fast.integration.prompt_text import PromptText

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "[INST]"]
SPECIALS += ["[/INST]"]
CHATML = """\
{%- if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
DATED = """\
<s><|start|>system<|end|>

Cutting Knowledge Date: December 2023
Today Date: {{ strftime_now('%d %b %Y') }}

{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}
{#- #}<|eot|>
{%- for m in messages %}<|start|>{{ m.role }}<|end|>

{{ m.content | trim }}<|eot|>{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant<|end|>

{% endif %}"""
NO_SYSTEM = """\
<s>{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}
{%- endfor %}"""
WORDS = """\
A chat between a user and an assistant. {% for m in messages %}
{%- if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}USER: {{ m.content }} {% else -%}
ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}ASSISTANT:"""
TEMPLATES = {"chatml": CHATML, "dated": DATED, "no system": NO_SYSTEM, "words": WORDS}


def make_tokenizer(template: str | None, directory: Path) -> PreTrainedTokenizerFast:
    """Of bytes, as those of the models in use are at heart."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_alone = Tokenizer(BPE(vocab=alphabet, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, additional_special_tokens=SPECIALS, chat_template=template
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def chat_ids(tokenizer: PreTrainedTokenizerFast, *turns: tuple[str, str]) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_of_one_message_only_what_was_written_is_left(template: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template, tmp_path)
    text = PromptText(str(tmp_path), None)
    for said in ("Why is the sky blue?", "Translate: user\nassistant\n", "日本語 🙂", "a"):
        assert text(chat_ids(tokenizer, ("user", said))) == said.strip()


def test_the_servers_own_template_takes_the_place_of_the_tokenizers(tmp_path: Path) -> None:
    """vLLM's `--chat-template`, for a tokenizer that has another one or none."""
    (tmp_path / "chat.jinja").write_text(WORDS)
    for template in (CHATML, None):
        tokenizer = make_tokenizer(template, tmp_path)
        tokenizer.chat_template = WORDS
        ids = chat_ids(tokenizer, ("system", "You sell tools."), ("user", "Why?"))
        text = PromptText(str(tmp_path), None, tmp_path / "chat.jinja")
        assert text.read(ids) == ("Why?", "You sell tools.")
        assert PromptText(str(tmp_path), None)(ids) != "Why?"
    with pytest.raises(OSError, match="missing"):
        PromptText(str(tmp_path), None, tmp_path / "missing")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_turns_stand_on_lines_of_their_own(template: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template, tmp_path)
    ids = chat_ids(tokenizer, ("user", "Name a fruit."), ("assistant", "Apple."), ("user", "Another."))
    lines = [line.strip() for line in PromptText(str(tmp_path), None)(ids).splitlines() if line.strip()]
    assert lines == ["Name a fruit.", "Apple.", "Another."]


@pytest.mark.parametrize("name", ["chatml", "dated", "words"])
def test_a_system_prompt_is_left_out(name: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name], tmp_path)
    text = PromptText(str(tmp_path), None)
    ids = chat_ids(tokenizer, ("system", "You sell tools."), ("user", "Why?"))
    assert text.read(ids) == ("Why?", "You sell tools.")
    turns = [("system", "You sell tools."), ("user", "Why?"), ("assistant", "So."), ("user", "Really?")]
    said, system_prompt = text.read(chat_ids(tokenizer, *turns))
    assert (said.split(), system_prompt) == (["Why?", "So.", "Really?"], "You sell tools.")


@pytest.mark.parametrize("name", ["chatml", "dated", "words"])
def test_around_a_system_prompt_nothing_of_the_user_is_lost(name: str, tmp_path: Path) -> None:
    """Users of one application whose first words agree: what they share is more than the system prompt."""
    tokenizer = make_tokenizer(TEMPLATES[name], tmp_path)
    text = PromptText(str(tmp_path), None)
    one, other = (
        chat_ids(tokenizer, ("system", "You sell tools."), ("user", f"Write a story about {what}."))
        for what in ("cats", "dogs")
    )
    shared = next(place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    assert text.read(one, shared) == ("Write a story about cats.", "You sell tools.")
    assert text.read(one, shared // 2) == ("Write a story about cats.", "You sell tools.")


@pytest.mark.parametrize("system", ["", "You sell tools."])
def test_examples_that_all_prompts_have_are_left_out_and_say_whose_they_are(
    system: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(CHATML, tmp_path)
    examples = "".join(f"Question {i}? Answer {i}.\n" for i in range(10))
    turns = [("system", system)] if system else []
    ids = chat_ids(tokenizer, *turns, ("user", f"{examples}Why is the sky blue?"))
    shared = len(tokenizer.encode(tokenizer.decode(ids).partition("Why")[0], add_special_tokens=False))
    assert PromptText(str(tmp_path), None).read(ids, shared) == ("Why is the sky blue?", "")


def test_a_prompt_without_the_template_stays_as_it_is(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(CHATML, tmp_path)
    said = "def f(user):\n    return user"
    assert PromptText(str(tmp_path), None).read(tokenizer.encode(said)) == (said, "")


def test_special_tokens_that_are_left_are_no_text(tmp_path: Path) -> None:
    """A beginning that was cut away takes half of the template with it."""
    tokenizer = make_tokenizer(CHATML, tmp_path)
    ids = chat_ids(tokenizer, ("user", "Why is the sky blue?"))[12:]
    got = PromptText(str(tmp_path), None)(ids)
    assert got.endswith("Why is the sky blue?")
    assert "<|" not in got


def test_a_tokenizer_without_a_template_just_decodes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(None, tmp_path)
    assert PromptText(str(tmp_path), None)(tokenizer.encode("<s>Why?</s>")) == "Why?"


def test_a_special_token_without_a_role_is_no_text_either(tmp_path: Path) -> None:
    """Llama 3's headers: marked in the vocabulary, named nowhere else but in the template."""
    tokenizer = make_tokenizer(DATED, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"extra_special_tokens": []}))
    ids = tokenizer.encode("half<|eot|><|start|>user<|end|>Why?<|eot|>", add_special_tokens=False)
    assert PromptText(str(tmp_path), None)(ids).split() == ["half", "user", "Why?"]


def test_code_beside_a_tokenizer_is_neither_run_nor_needed(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(CHATML, tmp_path)
    (tmp_path / "trap.py").write_text("raise SystemExit('executed')\n")
    file = tmp_path / "tokenizer_config.json"
    trap = {"auto_map": {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}, "tokenizer_class": "Trap"}
    file.write_text(json.dumps(json.loads(file.read_text()) | trap))
    assert PromptText(str(tmp_path), None)(chat_ids(tokenizer, ("user", "Why?"))) == "Why?"


def test_a_tokenizer_of_another_form_is_loaded_as_transformers_has_it(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    ids = AutoTokenizer.from_pretrained(tmp_path).encode("Why is it blue?")
    assert PromptText(str(tmp_path), None)(ids) == "Why is it blue?"


def test_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        PromptText(str(tmp_path), None)


def test_a_template_that_cannot_be_rendered_takes_nothing_away(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{{ raise_exception('broken') }}", tmp_path)
    assert PromptText(str(tmp_path), None)(tokenizer.encode("Why?")) == "Why?"


def test_a_date_in_the_template_moves_on(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(DATED, tmp_path)
    text = PromptText(str(tmp_path), None)
    ids = chat_ids(tokenizer, ("user", "Why?"))
    text._start, text._system = "of yesterday", ("of yesterday", text._system[1])
    assert text(ids) != "Why?"
    text._day = datetime.date.min  # a server that ran past midnight
    assert text(ids) == "Why?"
