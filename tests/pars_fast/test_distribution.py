from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pars_fast import Ranker
from pars_fast.cli import main
from pars_fast.data import read_length_file
from pars_fast.distribution import LEVELS, LengthDistribution, fit_length_distribution, recorded_answers
from pars_fast.errors import CheckpointError, DataError

WriteLengths = Callable[..., Path]


def test_a_known_distribution_is_found_again_and_covers_what_it_says() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(2, 7, size=20_000)
    log_lengths = scores + (0.2 + 0.1 * scores) * rng.standard_t(4, size=len(scores))
    ones = np.ones(len(scores))
    fit = fit_length_distribution(scores, log_lengths, ones)
    mu, sigma = fit([3.0, 5.0, 6.0])
    np.testing.assert_allclose(mu, [3, 5, 6], atol=0.1)
    np.testing.assert_allclose(sigma, [0.5, 0.7, 0.8], rtol=0.1)
    assert 3 <= fit.dof <= 5
    for level in LEVELS:
        assert fit.coverage(scores, log_lengths, ones, level) == pytest.approx(level, abs=0.015)


def test_a_weight_counts_as_so_many_answers() -> None:
    rng = np.random.default_rng(1)
    scores, logs = rng.normal(size=60).round(1), rng.normal(4, 1, size=60)
    weights = rng.integers(1, 4, size=60)
    once = fit_length_distribution(scores, logs, weights.astype(float))
    many = fit_length_distribution(
        np.repeat(scores, weights), np.repeat(logs, weights), np.ones(weights.sum())
    )
    low, high = (
        once.coverage(scores, logs, weights.astype(float), 0.8),
        many.coverage(np.repeat(scores, weights), np.repeat(logs, weights), np.ones(weights.sum()), 0.8),
    )
    assert low == pytest.approx(high, abs=0.15)


@given(
    st.lists(
        st.tuples(st.floats(-9, 9, width=32), st.floats(0, 9, width=32), st.floats(0.01, 5)),
        min_size=1,
        max_size=80,
    )
)
def test_any_answers_give_a_sound_distribution(answers: list[tuple[float, float, float]]) -> None:
    scores, logs, weights = (np.array(column) for column in zip(*answers, strict=True))
    fit = fit_length_distribution(scores, logs, weights)
    mu, sigma = fit(np.linspace(-10, 10, 50))
    assert (np.diff(mu) >= -1e-9).all()
    assert (sigma > 0).all()
    assert (fit.quantile(scores, 0.9) >= fit.quantile(scores, 0.1)).all()


def test_quantiles_are_in_tokens() -> None:
    fit = LengthDistribution((0.0, 1.0), (np.log(10), np.log(100)), (0.5, 0.5), 5.0)
    assert fit.quantile([0.0, 1.0, 9.0], 0.5) == pytest.approx([10, 100, 100])
    assert fit.quantile(0.0, 0.9) > 10


def test_answers_are_weighted_by_file_prompt_and_model(write_lengths: WriteLengths) -> None:
    files = [
        read_length_file(write_lengths(rows, name))
        for name, rows in [
            ("a.jsonl", [("val", "p", {"m": 1, "n": 2}), ("val", "q", {"m": 4}), ("test", "r", {"m": 9})]),
            ("b.jsonl", [("val", "s", {"m": 8}), ("val", "banned", {"m": 5})]),
        ]
    ]
    answers = recorded_answers(files, "val", forbidden=frozenset({"banned"}))
    assert answers.prompts == ["p", "q", "s"]
    assert answers.prompt_index.tolist() == [0, 0, 1, 2]
    assert answers.weight.tolist() == [0.25, 0.25, 0.5, 1]
    assert np.exp(answers.log_length) == pytest.approx([1, 2, 4, 8])
    only_m = recorded_answers(files[:1], "val", model="m")
    assert np.exp(only_m.log_length) == pytest.approx([1, 4])
    with pytest.raises(DataError, match="no model column 'x'"):
        recorded_answers(files, "val", model="x")
    with pytest.raises(DataError, match="no val answers"):
        recorded_answers(files[1:], "val", forbidden=frozenset({"banned", "s"}))


def test_a_ranker_keeps_its_distribution(tiny_ranker: Ranker, tmp_path: Path) -> None:
    tiny_ranker.distribution = LengthDistribution((0.0, 1.0), (2.0, 3.0), (0.5, 0.4), 3.5)
    tiny_ranker.save_pretrained(tmp_path / "a")
    assert Ranker.from_pretrained(tmp_path / "a", device="cpu").distribution == tiny_ranker.distribution


def test_the_command_writes_it_into_the_ranker(
    checkpoint: Path, write_lengths: WriteLengths, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("val", f"write {letter} story", {"m": 5 + n, "n": 90}) for n, letter in enumerate("abcdefgh")]
    assert (
        main(["calibrate", str(checkpoint), "--data", str(write_lengths(rows)), "--model-column", "m"]) == 0
    )
    assert str(checkpoint) in capsys.readouterr().out
    fit = Ranker.from_pretrained(checkpoint, device="cpu").distribution
    assert fit is not None
    assert 5 <= np.exp(fit(0.0)[0]) <= 12


@pytest.mark.parametrize(
    "knots",
    [
        ((), (), (), 3.0),
        ((0.0,), (1.0, 2.0), (1.0,), 3.0),
        ((0.0, 1.0), (2.0, 1.0), (1.0, 1.0), 3.0),
        ((1.0, 0.0), (1.0, 2.0), (1.0, 1.0), 3.0),
        ((0.0,), (1.0,), (0.0,), 3.0),
        ((0.0,), (float("nan"),), (1.0,), 3.0),
        ((0.0,), (1.0,), (1.0,), -1.0),
    ],
    ids=["empty", "lengths differ", "mu falls", "scores fall", "sigma zero", "nan", "dof"],
)
def test_unsound_knots_are_refused(
    knots: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], float],
) -> None:
    with pytest.raises(CheckpointError, match="must be three equally long lists"):
        LengthDistribution(*knots)
