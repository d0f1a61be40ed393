"""Mixed applications: what their answers say is added to what their prompts say."""

from pathlib import Path

import pytest

from bench import mixed_applications
from bench.mixed_applications import WITH_SYSTEM_PROMPT, learnt_factors, measure, mixed
from pars_fast import Ranker
from pars_fast.data import LengthFile, LengthRow
from pars_fast.live_calibration import COHORT_SIZE

THINGS = ("rain", "snow", "bread", "wine", "gold", "iron", "paper", "glass", "salt", "wool", "silk", "tea")


def test_two_applications_with_the_same_prompts_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_applications, "REQUESTS", 1200)
    monkeypatch.setattr(mixed_applications, "SEEDS", range(1))
    asked = {"Is {} wet? Answer yes or no.": 60, "Write a long, detailed essay on the history of {}.": 90}
    rows = [
        LengthRow(f"{thing} {tokens}", "test", ask.format(thing),
                  {"model": tokens, "model" + WITH_SYSTEM_PROMPT: 20 * tokens})
        for thing in THINGS
        for ask, tokens in asked.items()
    ]
    file = LengthFile("toy", Path("toy"), tuple(rows))
    ranker = Ranker.from_pretrained("small", device="cpu")
    found = {row["mixed"]: row for row in measure([file], ranker, None)}
    pair = found["system_prompt"]
    assert pair["tau_ranker_and_factors"] > pair["tau_ranker"] + 0.2
    assert pair["gain_ranker_and_factors"] > pair["gain_ranker"]
    alone = found["files"]  # one application: there is nothing to be told apart
    assert alone["tau_ranker_and_factors"] == alone["tau_ranker"]


def test_a_request_is_judged_by_what_ended_before_it_came() -> None:
    served = mixed([[(100.0, 10, 5)], [(100.0, 1000, 5)]], seed=0)
    factors = learnt_factors(served)
    assert (factors[: 2 * COHORT_SIZE] == 1.0).all()
    late = slice(-500, None)
    long = served.output_tokens[late] == 1000
    assert factors[late][long].min() > factors[late][~long].max()
