import time

import pytest

from pars_fast import Ranker
from pars_fast.errors import PromptError
from pars_fast.tokenization import MAX_CHARS_PER_TOKEN, encode, pack


def test_packing_lays_prompts_end_to_end() -> None:
    batch = pack([[2, 3], [2], [2, 9, 3]])
    assert batch.input_ids.tolist() == [2, 3, 2, 2, 9, 3]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 6]
    assert len(batch) == 3


def test_packing_nothing_or_an_empty_prompt_says_so() -> None:
    with pytest.raises(PromptError, match="no prompts"):
        pack([])
    with pytest.raises(PromptError, match="prompt 1 has no tokens"):
        pack([[2], []])


def test_encoding_frames_and_cuts_to_the_window(tiny_ranker: Ranker) -> None:
    cls, sep = (tiny_ranker.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    short, long = encode(tiny_ranker.tokenizer, ["no", "a " * 100], tiny_ranker.max_tokens)
    assert short == [cls, tiny_ranker.tokenizer.token_to_id("no"), sep]
    assert len(long) == tiny_ranker.max_tokens
    assert (long[0], long[-1]) == (cls, sep)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 1 is empty"),
        (" \n\t", "prompt 1 is empty"),
        (b"bytes", "prompt 1 must be a string, got bytes"),
        (None, "prompt 1 must be a string, got NoneType"),
        ([1, 2], "prompt 1 must be a string, got list"),
        ("lone \udce9 surrogate", r"prompt 1 holds code points that are no text \(lone surrogates\)"),
    ],
    ids=["empty", "blank", "bytes", "none", "token ids", "lone surrogate"],
)
def test_a_bad_prompt_is_named_by_its_position(tiny_ranker: Ranker, prompt: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        encode(tiny_ranker.tokenizer, ["fine", prompt], 32)


def test_a_prompt_of_a_hundred_thousand_tokens_is_not_read_to_its_end(tiny_ranker: Ranker) -> None:
    window = tiny_ranker.max_tokens * MAX_CHARS_PER_TOKEN
    head = ("write a story " * window)[:window]
    assert encode(tiny_ranker.tokenizer, [head + "\udce9"], 32) == encode(tiny_ranker.tokenizer, [head], 32)
    started = time.perf_counter()
    encode(tiny_ranker.tokenizer, ["a " * 100_000], tiny_ranker.max_tokens)
    assert time.perf_counter() - started < 0.1  # about 1 ms; reading it all takes 100 times as long


@pytest.mark.parametrize(
    "prompt", ["\0", "\x07\x1b[31m", "‮", "🙂" * 300, "\ufeff", "ﷺ" * 100, "a\u0301" * 400]
)
def test_odd_text_is_text(tiny_ranker: Ranker, prompt: str) -> None:
    (ids,) = encode(tiny_ranker.tokenizer, [prompt], tiny_ranker.max_tokens)
    assert 2 <= len(ids) <= tiny_ranker.max_tokens


def test_of_a_prompt_longer_than_the_window_head_and_tail_are_read(tiny_ranker: Ranker) -> None:
    token = tiny_ranker.tokenizer.token_to_id
    words = ["a"] * 500 + ["no"] * 500
    for text in (" ".join(words), " ".join(words) * 40):  # the second is not even read to its end
        (ids,) = encode(tiny_ranker.tokenizer, [text], 32, 8)
        assert ids == [token("[CLS]"), *[token("a")] * 22, *[token("no")] * 8, token("[SEP]")]
    (short,) = encode(tiny_ranker.tokenizer, [" ".join(words[485:515])], 32, 8)
    assert short == [token("[CLS]"), *[token("a")] * 15, *[token("no")] * 15, token("[SEP]")]


def test_a_window_may_be_all_tail(tiny_ranker: Ranker) -> None:
    (ids,) = encode(tiny_ranker.tokenizer, ["a " * 50 + "no " * 50], 32, 30)
    no = tiny_ranker.tokenizer.token_to_id("no")
    assert ids[1:-1] == [no] * 30


def test_bad_text_in_the_tail_is_found(tiny_ranker: Ranker) -> None:
    with pytest.raises(PromptError, match="prompt 0 holds code points"):
        encode(tiny_ranker.tokenizer, ["a " * 10_000 + "\udce9"], 32, 8)
