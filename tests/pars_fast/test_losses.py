import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pars_fast.losses import (
    LOSSES,
    huber,
    informative_pairs,
    length_buckets,
    listmle,
    margin,
    margin_unfiltered,
)

LENGTHS = st.integers(1, 20_000)


def passes_filter(first: int, second: int) -> bool:
    """PARS's filter in whole numbers: |a - b| / max(a, b) >= 1 / 5."""
    return 5 * abs(first - second) >= max(first, second)


@given(st.lists(st.tuples(st.floats(-5, 5, width=32), LENGTHS), min_size=2, max_size=12))
def test_margin_is_the_mean_hinge_over_the_filtered_pairs(batch: list[tuple[float, int]]) -> None:
    hinges = []
    for i, (score_i, length_i) in enumerate(batch):
        for score_j, length_j in batch[i + 1 :]:
            if passes_filter(length_i, length_j):
                sign = 1 if length_i > length_j else -1
                hinges.append(max(0.0, 1.0 - sign * (score_i - score_j)))
    expected = sum(hinges) / len(hinges) if hinges else 0.0
    scores, lengths = (torch.tensor(column, dtype=torch.float32) for column in zip(*batch, strict=True))
    assert float(margin(scores, lengths.log())) == pytest.approx(expected, abs=1e-5)


@given(st.integers(1, 20_000), st.integers(-1, 1))
def test_the_filter_is_exact_at_its_edge(multiple: int, offset: int) -> None:
    """4 n against 5 n differ by exactly 0.2; one token more or less decides."""
    shorter, longer = 4 * multiple + offset, 5 * multiple
    log_lengths = torch.tensor([shorter, longer], dtype=torch.float64).log().float()
    first, second = informative_pairs(log_lengths)
    assert len(first) == len(second) == passes_filter(shorter, longer)


def test_each_pair_is_met_once() -> None:
    first, second = informative_pairs(torch.tensor([1.0, 3.0, 2.0, 1.0]))
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (1, 2),
        (1, 3),
        (2, 3),
    ]


def test_margin_without_a_pair_is_zero_and_has_a_gradient() -> None:
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = margin(scores, torch.zeros(2))
    loss.backward()
    assert float(loss.detach()) == 0
    assert scores.grad is not None
    assert scores.grad.tolist() == [0, 0]


def test_huber_is_quadratic_near_and_linear_far() -> None:
    assert float(huber(torch.tensor([0.5]), torch.tensor([0.0]))) == pytest.approx(0.125)
    assert float(huber(torch.tensor([4.0]), torch.tensor([0.0]))) == pytest.approx(3.5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_prefers_the_right_order(name: str) -> None:
    log_lengths = torch.tensor([math.log(n) for n in (5, 50, 500)])
    assert LOSSES[name](log_lengths * 1.5, log_lengths) < LOSSES[name](-log_lengths, log_lengths)


def test_margin_unfiltered_also_meets_pairs_that_are_close() -> None:
    scores, log_lengths = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([100.0, 101.0, 101.0]).log()
    assert float(margin(scores, log_lengths)) == 0
    assert float(margin_unfiltered(scores, log_lengths)) == pytest.approx(1)  # equal lengths make no pair


def test_listmle_is_the_likelihood_of_the_true_order() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0])
    log_lengths = torch.tensor([5.0, 500.0, 50.0]).log()
    placed = scores[[1, 2, 0]]
    likelihood = sum(float(placed[i:].log_softmax(0)[0]) for i in range(3))
    assert float(listmle(scores, log_lengths)) == pytest.approx(-likelihood / 3)


def test_listmle_takes_lengths_of_one_bucket_in_any_order() -> None:
    scores, log_lengths = torch.tensor([1.0, -1.0]), torch.tensor([12.0, 18.0]).log()
    torch.manual_seed(0)
    losses = {round(float(listmle(scores, log_lengths)), 3) for _ in range(30)}
    assert len(losses) == 2


def test_a_length_is_in_its_bucket_up_to_the_edges() -> None:
    lengths = torch.arange(1, 20_001)
    log_lengths = lengths.double().log().float()  # as labels come
    assert length_buckets(log_lengths).tolist() == (lengths // 10).tolist()


def test_listmle_keeps_a_bucket_apart_from_the_next() -> None:
    """Which 69 and 70 are, though exp(log 70) is less than 70 in float32."""
    scores, log_lengths = torch.tensor([1.0, -1.0]), torch.tensor([69.0, 70.0], dtype=torch.float64).log()
    losses = {round(float(listmle(scores, log_lengths.float())), 3) for _ in range(30)}
    assert len(losses) == 1
