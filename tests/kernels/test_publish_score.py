"""Scores to keys of slots, against the map in float64: which slots are written is exact, values are close."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pars_fast.calibration import MAX_KNOTS, TokenMap
from pars_fast.kernels.pool_score import pool_score
from pars_fast.kernels.publish_score import (
    ScoreDestination,
    map_knots,
    publish_score,
    publish_score_reference,
)

TILE = 16
NUM_SLOTS = 40
# Knots are fp32 as the kernel has them; three roundings between two knots, of values up to the upper one.
RTOL = 4e-7


def destination_of(
    slots: Sequence[int],
    generations: Sequence[int],
    token_map: TokenMap,
    device: torch.device,
    prompt_work: Sequence[float] = (),
) -> ScoreDestination:
    """Slot i is in its generation i; destinations lie in rows of 4, as the host sends them."""
    rows = torch.tensor([[*pair, -7, -7] for pair in zip(slots, generations, strict=True)], device=device)
    work = rows.view(torch.float64)[:, 2]
    work.copy_(torch.tensor(prompt_work or [0.0] * len(slots), dtype=torch.float64))
    map_scores, map_tokens = map_knots(token_map, device)
    return ScoreDestination(
        slot=rows[:, 0],
        generation=rows[:, 1],
        prompt_work=work,
        key=torch.full((NUM_SLOTS,), -1.0, device=device),
        slot_generation=torch.arange(NUM_SLOTS, device=device),
        dirty=torch.zeros(3, dtype=torch.int32, device=device),
        tile_size=TILE,
        map_scores=map_scores,
        map_tokens=map_tokens,
        tokens=torch.full((len(slots),), torch.nan, device=device),
    )


def assert_as_reference(score: torch.Tensor, destination: ScoreDestination) -> None:
    expected = replace(destination, key=destination.key.clone(), dirty=destination.dirty.clone())
    tokens = publish_score_reference(score, expected)
    published = publish_score(score, destination)
    assert published.dtype == torch.float32
    atol = RTOL * float(destination.map_tokens.max())
    torch.testing.assert_close(published.double().cpu(), tokens, rtol=RTOL, atol=atol, equal_nan=True)
    worst = float(destination.prompt_work.max()) + float(destination.map_tokens.max())
    atol_key = RTOL * math.sqrt(worst * float(destination.map_tokens.max()))
    torch.testing.assert_close(destination.key, expected.key, rtol=2 * RTOL, atol=atol_key, equal_nan=True)
    assert destination.dirty.tolist() == expected.dirty.tolist()
    # Where prompts are not weighed, a key is the same number as the host gets.
    for slot, at, work, value in zip(
        destination.slot.tolist(), destination.generation.tolist(), destination.prompt_work.tolist(),
        published.tolist(), strict=False,
    ):  # fmt: skip
        if slot >= 0 and slot == at and work == 0:
            assert destination.key[slot].item() == pytest.approx(value, abs=0, rel=0, nan_ok=True)


def knots(max_size: int) -> st.SearchStrategy[TokenMap]:
    """Maps with steps (equal scores) and plateaus (equal tokens)."""

    def rising(low: int, high: int, size: int) -> st.SearchStrategy[tuple[float, ...]]:
        values = st.lists(st.integers(low, high), min_size=size, max_size=size)
        return values.map(lambda drawn: tuple(sorted(value / 4 for value in drawn)))

    return st.integers(1, max_size).flatmap(
        lambda size: st.builds(TokenMap, rising(-40, 40, size), rising(0, 4000, size))
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch(data: st.DataObject, device: torch.device) -> None:
    token_map = data.draw(knots(MAX_KNOTS))
    special = [*token_map.scores, math.nan, math.inf, -math.inf, -0.0, 1e-45, 3e38, -3e38]
    scores = data.draw(
        st.lists(st.sampled_from(special) | st.floats(-12, 12, width=32), min_size=1, max_size=9)
    )
    slots = data.draw(st.permutations(range(NUM_SLOTS)))[: len(scores)]
    generations = [slot + data.draw(st.sampled_from([0, 0, 1, -1])) for slot in slots]
    slots = [-1 if data.draw(st.integers(0, 4)) == 0 else slot for slot in slots]
    score = torch.tensor(scores, dtype=torch.float32, device=device)
    works = [data.draw(st.sampled_from([0.0, 0.25, 3.0, 700.0, 1e6])) for _ in scores]
    assert_as_reference(score, destination_of(slots, generations, token_map, device, works))


def test_a_score_whose_slot_changed_hands_is_dropped_whatever_else_is_in_the_batch(
    device: torch.device,
) -> None:
    token_map = TokenMap((0.0, 10.0), (0.0, 100.0))
    for generations, key in (((7, 6), 10.0), ((6, 7), 20.0), ((6, 8), -1.0)):
        destination = destination_of([7, 7], generations, token_map, device)
        tokens = publish_score(torch.tensor([1.0, 2.0], device=device), destination)
        assert tokens.tolist() == [10.0, 20.0]  # the host learns of both
        assert destination.key[7].item() == key
        assert destination.dirty.tolist() == [int(key > 0), 0, 0]


def test_order_by_key_is_order_by_score(device: torch.device) -> None:
    """Rounding may make ties, never an inversion, close to knots least of all."""
    rng = np.random.default_rng(0)
    scores = np.sort(rng.normal(4, 1, MAX_KNOTS)).astype(np.float32)
    token_map = TokenMap(
        tuple(map(float, scores)), tuple(map(float, np.sort(rng.lognormal(4, 1, MAX_KNOTS)).round(3)))
    )
    near = [scores]
    for direction in (-np.inf, np.inf):
        step = scores
        for _ in range(3):
            step = np.nextafter(step, np.float32(direction))
            near.append(step)
    score = torch.from_numpy(np.sort(np.concatenate(near))).to(device)
    destination = destination_of([-1] * len(score), [0] * len(score), token_map, device)
    tokens = publish_score(score, destination)
    assert bool((tokens.diff() >= 0).all())
    assert destination.dirty.tolist() == [0, 0, 0]


def test_of_equal_answers_the_shorter_prompt_has_the_lower_key(device: torch.device) -> None:
    destination = destination_of([0, 1, 2], [0, 1, 2], TokenMap((0.0,), (9.0,)), device, [0.0, 16.0, 27.0])
    assert publish_score(torch.zeros(3, device=device), destination).tolist() == [9.0, 9.0, 9.0]
    assert destination.key[:3].tolist() == [9.0, 15.0, 18.0]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_gives_no_key_whatever_the_prompt(
    score: float, device: torch.device
) -> None:
    token_map = TokenMap((0.0, 1.0), (1.0, 9.0))
    destination = destination_of([0, 1, 2, 3], [0, 1, 2, 3], token_map, device, [0.0, 0.25, 700.0, 1e6])
    assert publish_score(torch.full((4,), score, device=device), destination).isnan().all()
    assert destination.key[:4].isnan().all()


@pytest.mark.parametrize("work", [0.0, 0.25, 700.0, 1e6])
def test_a_key_is_exact_to_rounding_at_any_size_of_prompt(work: float, device: torch.device) -> None:
    """Scores are knots, so only the key's own arithmetic rounds: an addition, a product, a root."""
    tokens = torch.tensor([1.0, 3.0, 100.0, 4097.0, 32768.0], device=device)
    knots = torch.arange(5, device=device).float()
    token_map = TokenMap(tuple(knots.tolist()), tuple(tokens.tolist()))
    destination = destination_of(range(5), range(5), token_map, device, [work] * 5)
    assert publish_score(knots, destination).tolist() == tokens.tolist()
    keys = (tokens.double() * (tokens.double() + work)).sqrt()
    rtol = 0 if work == 0 else 2**-23
    torch.testing.assert_close(destination.key[:5].double(), keys, rtol=rtol, atol=0)


def test_fewer_scores_than_destinations_leave_the_rest_alone(device: torch.device) -> None:
    destination = destination_of([1, 2, 3], [1, 2, 3], TokenMap((0.0,), (5.0,)), device)
    assert publish_score(torch.tensor([0.0, 1.0], device=device), destination).tolist() == [5.0, 5.0]
    assert destination.key[:4].tolist() == [-1.0, 5.0, 5.0, -1.0]
    assert bool(destination.tokens[2].isnan())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's 0 / 0
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pool_score_publishes_what_it_scores(pooling: Literal["cls", "mean"], device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 24, generator=generator).to(device)
    weight, bias = torch.randn(24, generator=generator).to(device), torch.zeros(1, device=device)
    cu_seqlens = torch.tensor([0, 3, 4, 4, 12], dtype=torch.int32, device=device)  # one has no token: NaN
    token_map = TokenMap((-10.0, 0.0, 10.0), (1.0, 50.0, 400.0))
    slots, generations = [3, 39, 0, 17], [3, 39, 0, 16]  # the last has lost its slot
    work = [0.0, 1e6, 700.0, 3.0]
    alone, fused = (destination_of(slots, generations, token_map, device, work) for _ in range(2))
    score = pool_score(hidden, weight, bias, cu_seqlens, pooling=pooling)
    publish_score(score, alone)
    same = pool_score(hidden, weight, bias, cu_seqlens, pooling=pooling, destination=fused)
    for one, other in ((same, score), (fused.key, alone.key), (fused.tokens, alone.tokens)):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert fused.dirty.tolist() == alone.dirty.tolist() == [1, 0, 1]
    assert_as_reference(score, destination_of(slots, generations, token_map, device, work))
    tokens = fused.tokens.tolist()
    assert fused.key[[3, 39]].tolist() == pytest.approx(
        [tokens[0], math.sqrt(tokens[1] * (tokens[1] + 1e6))], rel=2 * RTOL
    )
    small = destination_of([0], [0], token_map, device)
    with pytest.raises(ValueError, match="the destination takes 1 prompts, got 4"):
        pool_score(hidden, weight, bias, cu_seqlens, pooling=pooling, destination=small)


DESTINATION_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "slot": ({"slot": torch.zeros(3).long()}, r"slot must be \(2,\) torch.int64 on cpu, got \(3,\)"),
    "slot dtype": ({"slot": torch.zeros(2).int()}, "slot must be .*got .*torch.int32"),
    "generation": ({"generation": torch.zeros(2, device="meta").long()}, "generation must be .* on meta"),
    "work": ({"prompt_work": torch.zeros(2)}, r"prompt_work must be \(2,\) torch.float64 .*got .*float32"),
    "key": ({"key": torch.zeros(40).double()}, "key must be contiguous .*torch.float32, got .*torch.float64"),
    "owner": ({"slot_generation": torch.zeros(39).long()}, r"slot_generation must .*\(40,\) .*got \(39,\)"),
    "dirty": ({"dirty": torch.zeros(2).int()}, r"dirty must be contiguous \(3,\) torch.int32, got \(2,\)"),
    "map": ({"map_scores": torch.zeros(3)}, r"map_scores must be contiguous \(2,\) .*got \(3,\)"),
    "map dtype": ({"map_tokens": torch.zeros(2).int()}, "map_tokens must be .*torch.float32, got .*int32"),
    "tokens": ({"tokens": torch.zeros(2).half()}, "tokens must be .*torch.float32, got .*float16"),
}


@pytest.mark.parametrize("case", DESTINATION_ERRORS)
def test_a_destination_names_what_is_wrong(case: str) -> None:
    change, message = DESTINATION_ERRORS[case]
    sound = destination_of([0, 1], [0, 1], TokenMap((0.0, 1.0), (0.0, 1.0)), torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        replace(sound, **change)


SCORE_ERRORS: dict[str, tuple[torch.Tensor, str]] = {
    "empty": (torch.zeros(0), r"score must be \(B,\) with B from 1 to 2, got \(0,\)"),
    "too many": (torch.zeros(3), r"score must be \(B,\) with B from 1 to 2, got \(3,\)"),
    "2-d": (torch.zeros(2, 1), r"score must be \(B,\) with B from 1 to 2, got \(2, 1\)"),
    "dtype": (torch.zeros(2).half(), "score must be .*torch.float32, got .*torch.float16"),
    "strided": (torch.zeros(4)[::2], "score must be contiguous"),
    "device": (torch.zeros(2, device="meta"), "score must lie on cpu like key, got meta"),
}


@pytest.mark.parametrize("case", SCORE_ERRORS)
def test_errors_name_what_is_wrong(case: str) -> None:
    score, message = SCORE_ERRORS[case]
    destination = destination_of([0, 1], [0, 1], TokenMap((0.0, 1.0), (0.0, 1.0)), torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        publish_score(score, destination)
