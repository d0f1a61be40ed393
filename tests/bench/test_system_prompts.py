"""System prompts: what the serving path leaves of them, by real scores."""

from pathlib import Path

from bench.system_prompts import RULES_PER_PROMPT, measure, system_prompt
from pars_fast import Ranker
from pars_fast.data import LengthFile, LengthRow

THINGS = ("rain", "snow", "bread", "wine", "gold", "iron", "paper", "glass", "salt", "wool", "silk", "tea")


def test_behind_a_system_prompt_the_window_keeps_the_order() -> None:
    asked = {"Is {} wet? Answer yes or no.": 3, "Write a long, detailed essay on the history of {}.": 900}
    rows = [
        LengthRow(f"{thing} {tokens}", "test", ask.format(thing), {"model": tokens})
        for thing in THINGS
        for ask, tokens in asked.items()
    ]
    file = LengthFile("toy", Path("toy"), tuple(rows))
    none, *behind = measure([file], Ranker.from_pretrained("small", device="cpu"), None)
    assert len(behind) == 2 * len(RULES_PER_PROMPT)
    by_cut = {(row["cut"], row["system_prompt_tokens"]): row["tau_within_files"] for row in behind}
    longest = max(tokens for _, tokens in by_cut)
    assert longest > 512
    bare, windowed = none["tau_within_files"], by_cut["prompt_window", longest]
    assert bare > 0.6
    assert windowed > 0.8 * bare
    assert not by_cut["first_ids", longest] > 0


def test_system_prompts_differ_from_the_beginning() -> None:
    texts = [system_prompt(application, 12) for application in range(3)]
    assert len({text.split()[3] for text in texts}) == 3
    assert all(len(text.splitlines()) == 13 for text in texts)
