"""Factors of applications: found where they differ, left alone where they do not."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pars_fast.application_factors import LEAST_OBSERVATIONS, fit_application_factors
from pars_fast.live_calibration import Ending, Observation


def observations(
    factors: dict[str, float], count: int, *, spread: float = 0.6, seed: int = 0,
    ending: Ending = Ending.COMPLETE,
) -> list[Observation]:
    """`count` requests of each application, whose answers are that much longer than expected, with noise."""
    rng = np.random.default_rng(seed)
    made = []
    for application, factor in factors.items():
        for _ in range(count):
            expected = float(rng.uniform(20, 400))
            tokens = max(1, round(factor * expected * math.exp(spread * rng.standard_normal())))
            made.append(Observation(expected, None, application, output_tokens=tokens, ending=ending))
    return made


def test_what_a_system_prompt_does_is_found() -> None:
    fitted = fit_application_factors(observations({"one word": 0.05, "essay": 3.0, "plain": 1.0}, 60))
    assert fitted["essay"] / fitted["plain"] == pytest.approx(3.0, rel=0.25)
    assert fitted["one word"] / fitted["plain"] == pytest.approx(0.05, rel=0.25)


def test_where_applications_are_alike_nothing_is_changed() -> None:
    alike = {f"{i}": 1.0 for i in range(8)}
    found = [fit_application_factors(observations(alike, 40, seed=seed)) for seed in range(40)]
    assert sum(map(bool, found)) <= 2


def test_one_with_few_requests_is_moved_less() -> None:
    seen = observations({"a": 4.0, "b": 1.0, "c": 0.25}, 50)
    few = [Observation(100.0, None, "few", output_tokens=800, ending=Ending.COMPLETE)]
    many = [Observation(100.0, None, "many", output_tokens=800, ending=Ending.COMPLETE)] * 40
    fitted = fit_application_factors([*seen, *few, *many])
    assert 1.0 < fitted["few"] < fitted["many"]


def test_a_common_factor_is_the_scales_and_not_theirs() -> None:
    fitted = fit_application_factors(observations({"a": 5.0, "b": 10.0, "c": 20.0}, 100, spread=0.1))
    assert fitted["b"] == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    "seen",
    [
        [],
        observations({"a": 1.0}, 200),
        observations({"a": 1.0, "b": 9.0}, LEAST_OBSERVATIONS // 2 - 1),
        observations({"a": 1.0, "b": 9.0}, 100, ending=Ending.CUT),
        observations({f"{i}": 1.0 for i in range(100)}, 1),
    ],
)
def test_without_ground_nothing_is_said(seen: list[Observation]) -> None:
    assert fit_application_factors(seen) == {}


@given(
    st.lists(
        st.tuples(st.sampled_from([None, 1, 2, 3]), st.floats(1.0, 1e6), st.integers(0, 1_000_000),
                  st.sampled_from(Ending)),
        max_size=200,
    )
)
@settings(deadline=None)
def test_factors_are_finite_and_positive_whatever_ended(
    given_: list[tuple[int | None, float, int, Ending]],
) -> None:
    seen = [Observation(expected, None, application, output_tokens=tokens, ending=ending)
            for application, expected, tokens, ending in given_]
    assert all(0.0 < factor < math.inf for factor in fit_application_factors(seen).values())
