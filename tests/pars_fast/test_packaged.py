"""The rankers in the package: they load, they are small, and they order what anybody would."""

import pytest

from pars_fast import Ranker
from pars_fast.packaged import PACKAGED, checkpoint_directory, serving_ranker


@pytest.fixture(scope="module", params=PACKAGED)
def ranker(request: pytest.FixtureRequest) -> Ranker:
    return Ranker.from_pretrained(request.param, device="cpu")


@pytest.mark.parametrize("name", PACKAGED)
def test_it_fits_the_wheel_and_says_what_it_is(name: str) -> None:
    assert (checkpoint_directory(name) / "model.safetensors").stat().st_size <= 48 * 2**20
    assert "licen" in (checkpoint_directory(name) / "README.md").read_text().lower()


def test_auto_takes_what_the_device_can_carry() -> None:
    assert serving_ranker("auto", "cuda") == "default"
    assert serving_ranker("auto", "cpu") == "small"
    assert serving_ranker("/some/folder", "cpu") == "/some/folder"


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (
            "Answer yes or no: is 7 a prime number?",
            "Write a detailed essay on the causes of the French Revolution.",
        ),
        (
            "What is the capital of France? Answer in one word.",
            "Explain in depth how a compiler works, with examples.",
        ),
        (
            "Translate 'good morning' into German.",
            "Write a long short story about a lighthouse keeper who finds a map.",
        ),
        (
            "Which is larger, 3 or 5?",
            "Plan a two-week trip through Japan, day by day, with costs and alternatives.",
        ),
    ],
    ids=["yes or no", "one word", "translation", "comparison"],
)
def test_obvious_prompts_are_in_order(ranker: Ranker, short: str, long: str) -> None:
    below, above = ranker.score([short, long])
    assert below < above


def test_its_scores_turn_into_tokens(ranker: Ranker) -> None:
    assert ranker.token_map is not None
    expected = ranker.token_map(
        ranker.score(["Answer yes or no: is it raining?", "Write a detailed essay on rain."])
    )
    assert 1 <= expected[0] < expected[1] < 5000
