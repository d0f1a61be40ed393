"""Workloads: what is read is checked, what is made has the load, burst and tau that were asked for."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pars_fast.data import LengthFile, LengthRow
from pars_fast.errors import DataError
from pars_fast.metrics import kendall_tau
from pars_fast.simulation.workload import (
    Workload,
    at_load,
    from_lengths,
    make_workload,
    poisson,
    read_trace,
    with_burst,
    with_noisy_scores,
    with_ties_shuffled,
    with_unscored,
)

HEADER = "arrival_s,prompt_tokens,output_tokens"


def mix(count: int = 500, seed: int = 0) -> Workload:
    rng = np.random.default_rng(seed)
    return make_workload("mix", np.cumsum(rng.exponential(1.0, count)), rng.integers(1, 2000, count),
                         rng.geometric(1 / 200, count))


def write(path: Path, *lines: str) -> Path:
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["trace_x.csv", "trace_x.csv.gz"])
def test_trace_is_read(tmp_path: Path, name: str) -> None:
    lines = [f"{HEADER},score,app", "0.5,10,20,19.5,chat", "0.5,1,1,,code"]
    workload = read_trace(write(tmp_path / name, *lines))
    assert workload.name == "x"
    assert workload.arrival_s.tolist() == [0.5, 0.5]
    assert workload.prompt_tokens.tolist() == [10, 1]
    assert workload.output_tokens.tolist() == [20, 1]
    np.testing.assert_array_equal(workload.expected_tokens, [19.5, np.nan])


@pytest.mark.parametrize(("lines", "message"), [
    (["arrival_s,prompt_tokens", "0,1"], r":1: the header lacks output_tokens"),
    ([f"{HEADER},colour", "0,1,1,red"], r":1: the header has colour"),
    ([HEADER, "0,1,1", "-1,1,1"], r":3: arrival_s must be finite and not negative"),
    ([HEADER, "nan,1,1"], r":2: arrival_s must be finite"),
    ([HEADER, "soon,1,1"], r":2: arrival_s must be a number, got 'soon'"),
    ([HEADER, "2,1,1", "1,1,1"], r":3: arrival_s 1 is earlier than the line before"),
    ([HEADER, "0,0,1"], r":2: prompt_tokens must be from 1 to 10,000,000, got 0"),
    ([HEADER, "0,1,99999999"], r":2: output_tokens must be from 1"),
    ([HEADER, "0,1,1.5"], r":2: output_tokens must be a whole number, got '1.5'"),
    ([HEADER, "0,1"], r":2: 2 fields, the header has 3"),
    ([f"{HEADER},score", "0,1,1,-3"], r":2: score must be finite and positive"),
    ([f"{HEADER},score", "0,1,1,low"], r":2: score must be a number of expected output tokens"),
    ([HEADER], "has no requests"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_trace(write(tmp_path / "trace.csv", *lines))


MOONCAKE = '{"timestamp": 1500, "input_length": 600, "output_length": 7, "hash_ids": [4, 5]}'


def test_a_trace_of_mooncake_says_what_prompts_share(tmp_path: Path) -> None:
    later = MOONCAKE.replace("1500", "2750").replace("600", "512").replace("[4, 5]", "[4]")
    workload = read_trace(write(tmp_path / "conversation_trace.jsonl.gz", MOONCAKE, later))
    assert workload.name == "conversation"
    assert workload.arrival_s.tolist() == [1.5, 2.75]
    assert workload.prompt_tokens.tolist() == [600, 512]
    assert workload.output_tokens.tolist() == [7, 7]
    assert workload.hash_ids == ((4, 5), (4,))
    assert workload.take([1]).hash_ids == ((4,),)
    assert make_workload("w", [2.0, 1.0], [1, 1], [1, 1], hash_ids=[[8], [9]]).hash_ids == ((9,), (8,))
    apart = make_workload("w", workload.arrival_s, workload.prompt_tokens, workload.output_tokens)
    assert workload.sha256() != apart.sha256()


@pytest.mark.parametrize(("line", "message"), [
    ("{", r":2: expected an object with timestamp, input_length, output_length, hash_ids"),
    ("[]", r":2: expected an object"),
    (MOONCAKE.replace("hash_ids", "ids"), r":2: expected an object"),
    (MOONCAKE.replace("[4, 5]", '["a", 5]'), r":2: expected an object"),
    (MOONCAKE.replace("[4, 5]", "[4]"), r":2: 1 hash_ids for 600 tokens; there is one for every 512"),
    (MOONCAKE.replace("1500", "1499"), r":2: timestamp 1499 is earlier than the line before"),
    (MOONCAKE.replace("600", "0"), r":2: input_length must be from 1"),
    (MOONCAKE.replace("7", "1.5"), r":2: output_length must be a whole number, got '1.5'"),
])
def test_what_is_wrong_in_a_trace_of_mooncake_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_trace(write(tmp_path / "trace.jsonl", MOONCAKE, line))


def test_an_empty_or_damaged_trace_of_mooncake_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="has no requests"):
        read_trace(tmp_path / "empty.jsonl")
    (tmp_path / "damaged.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"cannot be read .* expected JSON lines"):
        read_trace(tmp_path / "damaged.jsonl.gz")
    with pytest.raises(DataError, match="one hash id for every 512 tokens"):
        make_workload("w", [0.0], [600], [1], hash_ids=[[1]])


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv: no such file"):
        read_trace(tmp_path / "gone.csv")
    damaged = tmp_path / "damaged.csv.gz"
    damaged.write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"damaged\.csv\.gz: cannot be read"):
        read_trace(damaged)


def test_a_workload_checks_itself() -> None:
    with pytest.raises(DataError, match="columns of one length"):
        make_workload("w", [0.0, 1.0], [1], [1, 1])
    with pytest.raises(DataError, match="at least one token"):
        make_workload("w", [0.0], [1], [0])
    with pytest.raises(DataError, match="at least one request"):
        make_workload("w", [], [], [])


@settings(max_examples=20, deadline=None)
@given(load=st.floats(0.05, 3), capacity=st.floats(1, 1e5))
def test_load_is_offered_tokens_over_capacity(load: float, capacity: float) -> None:
    workload = at_load(mix(), load, capacity)
    offered = workload.output_tokens.sum() / workload.arrival_s[-1]
    assert offered == pytest.approx(load * capacity)
    assert workload.arrival_s[0] == 0


def test_load_of_a_trace_without_times_is_refused() -> None:
    with pytest.raises(DataError, match="give it Poisson arrivals"):
        at_load(make_workload("w", [0, 0], [1, 1], [1, 1]), 1.0, 10.0)
    with pytest.raises(DataError, match="a load must be positive"):
        at_load(mix(), 0.0, 10.0)


@pytest.mark.parametrize("capacity", [0.0, -1.0, float("nan")])
def test_a_capacity_of_nothing_is_refused(capacity: float) -> None:
    with pytest.raises(DataError, match=r"a capacity must be positive, got .* measure it on more requests"):
        at_load(mix(), 1.0, capacity)


def test_burst_moves_a_share_to_one_moment_and_keeps_every_request() -> None:
    plain = mix()
    burst = with_burst(plain, 0.2, seed=1)
    moment = plain.arrival_s[0] + 0.5 * (plain.arrival_s[-1] - plain.arrival_s[0])
    assert (burst.arrival_s == moment).sum() == 100
    assert sorted(burst.output_tokens) == sorted(plain.output_tokens)
    assert burst.arrival_s[-1] <= plain.arrival_s[-1]
    with pytest.raises(DataError, match="from 0 to 1"):
        with_burst(plain, 1.5, seed=0)


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.5, 0.9, 0.99, 1.0])
def test_noise_is_calibrated_to_tau(tau: float) -> None:
    workload = with_noisy_scores(mix(2000), tau, seed=3)
    lengths = workload.output_tokens.astype(np.float64)
    assert kendall_tau(workload.expected_tokens, lengths) == pytest.approx(tau, abs=0.005)
    assert sorted(workload.expected_tokens) == sorted(lengths)  # spread as the lengths are


def test_tau_outside_of_0_to_1_is_refused() -> None:
    with pytest.raises(DataError, match=r"tau must be from 0 \(random\) to 1"):
        with_noisy_scores(mix(), -0.1, seed=0)


def test_a_larger_share_takes_the_scores_that_a_smaller_takes() -> None:
    scored = with_noisy_scores(mix(), 1.0, seed=0)
    few, many = (np.isnan(with_unscored(scored, share, seed=5).expected_tokens) for share in (0.1, 0.4))
    assert (few.sum(), many.sum()) == (50, 200)
    assert (many | ~few).all()
    with pytest.raises(DataError, match="from 0 to 1"):
        with_unscored(scored, 2.0, seed=0)


def test_seeds_decide_everything() -> None:
    def made(seed: int) -> str:
        workload = with_burst(poisson(mix(), seed=seed), 0.1, seed=seed)
        return with_unscored(with_noisy_scores(workload, 0.5, seed=seed), 0.1, seed=seed).sha256()

    assert made(1) == made(1) != made(2)


def length_file(count: int = 40) -> LengthFile:
    rows = tuple(LengthRow(str(k), "test", f"{'word ' * (k + 1)}", {"m": k + 1} if k % 2 else {"n": 7})
                 for k in range(count))
    return LengthFile("f", Path("f"), rows)


def test_prompts_carry_their_own_length_and_score() -> None:
    asked: list[str] = []

    def scorer(prompts: Sequence[str]) -> list[float]:
        asked.extend(prompts)
        return [float(len(prompt)) for prompt in prompts]

    workload = from_lengths(length_file(), "m", 50, seed=0, scorer=scorer)
    assert len(asked) == len(set(asked)) == 20  # each prompt once, though drawn more often
    np.testing.assert_array_equal(workload.expected_tokens, 5.0 * workload.output_tokens)
    assert np.bincount(workload.output_tokens).max() == 3  # without replacement as far as the file goes


def test_prompts_can_arrive_at_the_times_of_a_trace() -> None:
    trace = mix(30)
    workload = from_lengths(length_file(), "n", 30, seed=0, arrivals=trace)
    assert workload.arrival_s.tolist() == trace.arrival_s.tolist()
    assert np.isnan(workload.expected_tokens).all()
    with pytest.raises(DataError, match="30 arrivals for 31 requests"):
        from_lengths(length_file(), "n", 31, seed=0, arrivals=trace)
    with pytest.raises(DataError, match="no model column 'x'"):
        from_lengths(length_file(), "x", 1, seed=0)


def test_requests_of_one_time_lose_their_order_and_nothing_else() -> None:
    workload = make_workload("ties", [0, 1, 1, 1, 1, 2], [9, 1, 2, 3, 4, 8], [5] * 6)
    shuffled = {tuple(with_ties_shuffled(workload, seed=seed).prompt_tokens) for seed in range(20)}
    assert {order[0] for order in shuffled} == {9}
    assert {order[-1] for order in shuffled} == {8}
    assert all(sorted(order) == [1, 2, 3, 4, 8, 9] for order in shuffled)
    assert len(shuffled) > 5
    assert with_ties_shuffled(workload, seed=0).sha256() == with_ties_shuffled(workload, seed=0).sha256()
