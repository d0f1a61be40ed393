"""What the ranker gets of a prompt: not what others say, too."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pars_fast.integration.prompt_window import LEAST_IDS, MAX_IDS, SHORT_BEGINNING, PromptWindow

SYSTEM = list(range(1000, 1405))  # no whole number of chunks
OTHER_SYSTEM = list(range(3000, 3203))


def fresh(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(10_000, 20_000), k=count)


def is_subsequence(ids: Sequence[int], of: Sequence[int]) -> bool:
    left = iter(of)
    return all(each in left for each in ids)


@pytest.mark.parametrize("length", [1, SHORT_BEGINNING, MAX_IDS])
def test_alone_a_prompt_that_fits_is_untouched(length: int) -> None:
    ids = fresh(length, 0)
    assert PromptWindow()(ids) == ids


@pytest.mark.parametrize("own", [LEAST_IDS, 60, 300])
def test_a_system_prompt_is_left_out_once_two_others_have_had_it(own: int) -> None:
    window = PromptWindow()
    prompts = [[*SYSTEM[:200], *fresh(own, seed)] for seed in range(4)]
    assert [window(prompt) for prompt in prompts[:2]] == prompts[:2]
    assert [window(prompt) for prompt in prompts[2:]] == [prompt[200:] for prompt in prompts[2:]]


def test_what_is_left_out_stands_for_the_application() -> None:
    window = PromptWindow()
    systems = [SYSTEM[:200], OTHER_SYSTEM] * 6
    seen = [window.cut([*system, *fresh(60, seed)]) for seed, system in enumerate(systems)]
    assert {each.application for each in seen[:4]} == {None}
    one, other = ({each.application for each in seen[first::2]} for first in (4, 5))
    assert len(one) == len(other) == 1
    assert one != other
    assert window.cut(fresh(60, 99)).application is None


def test_a_beginning_is_shown_beside_what_is_left_unless_it_is_long() -> None:
    for system, shown in ((SYSTEM[:200], 200), (SYSTEM, 0)):
        window = PromptWindow()
        for seed in range(3):
            own = fresh(60, seed)
            seen = window.cut([*system, *own])
        assert (seen.ids, seen.shared) == ([*system[:shown], *own], shown)


def test_a_short_beginning_stays() -> None:
    window = PromptWindow()
    prompts = [[*SYSTEM[:SHORT_BEGINNING], *fresh(60, seed)] for seed in range(4)]
    assert [window(prompt) for prompt in prompts] == prompts


def test_something_of_every_prompt_is_left() -> None:
    window = PromptWindow()
    for last in range(4):
        ids = [*SYSTEM, last]
        got = window(ids)
    assert got == ids[-LEAST_IDS:]


def test_of_a_long_document_after_a_system_prompt_both_ends_are_given() -> None:
    window = PromptWindow()
    for seed in range(3):
        ids = [*SYSTEM, *fresh(50_000, seed)]
        got = window(ids)
    assert got == [*ids[len(SYSTEM) : len(SYSTEM) + MAX_IDS // 2], *ids[-MAX_IDS // 2 :]]


def test_applications_do_not_hide_each_others_system_prompts() -> None:
    window = PromptWindow()
    for seed in range(40):
        system = (SYSTEM, OTHER_SYSTEM)[seed % 8 == 0]  # one is seven times as frequent
        ids = [*system, *fresh(150, seed)]
        got = window(ids)
        if seed >= 20:
            assert got == ids[len(system) :]


def test_the_same_prompt_sent_again_is_no_reason_to_leave_anything_out() -> None:
    window = PromptWindow()
    ids = fresh(300, 1)
    assert [window(ids) for _ in range(6)] == [ids] * 6


def test_a_conversation_of_two_turns_is_seen_from_its_beginning() -> None:
    window = PromptWindow()
    first = fresh(200, 1)
    second = [*first, *fresh(100, 2)]
    assert window(first) == first
    assert window(second) == second


def test_words_that_only_some_users_begin_with_stay() -> None:
    window = PromptWindow()
    write = [7, 8, 9]  # "write a story"
    for seed in range(40):
        own = [*write, *fresh(40, seed)] if seed % 3 == 0 else fresh(50, seed)
        got = window([*SYSTEM, *own])
        if seed >= 20:
            assert got == own


def test_memory_is_bounded() -> None:
    window = PromptWindow()
    for seed in range(100):
        for turn in range(10):
            window([*fresh(100, seed), *fresh(9_000, 1000 + turn)])
    kept = list(window._recent.values())
    assert len(kept) == 16
    assert max(map(len, kept)) == 8
    assert max(len(ids) for recent in kept for ids in recent) == 8192


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 5, 40, 170, 333]), st.integers(1, 900), st.integers(0, 3)),
        min_size=1,
        max_size=12,
    )
)
def test_what_is_given_is_of_the_prompt_in_its_order_and_keeps_its_end(
    shapes: list[tuple[int, int, int]],
) -> None:
    window = PromptWindow()
    for shared, own, seed in shapes:
        ids = [*SYSTEM[:shared], *fresh(own, seed)]
        got = window(ids)
        assert is_subsequence(got, ids)
        assert min(len(ids), LEAST_IDS) <= len(got) <= MAX_IDS
        assert got[-LEAST_IDS:] == ids[-LEAST_IDS:]


def test_prompts_with_a_long_common_beginning_are_not_compared_id_by_id() -> None:
    compared = 0

    class Id(int):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return int(self) == other

        __hash__ = int.__hash__

    def prompt(seed: int) -> list[int]:
        return [Id(each) for each in (*range(8000), *fresh(1000, seed))]  # nothing is the same object

    window = PromptWindow()
    for seed in range(8):
        window(prompt(seed))
    compared = 0
    assert window.cut(prompt(8)).ids == fresh(1000, 8)[:256] + fresh(1000, 8)[-256:]
    assert compared < 4000
