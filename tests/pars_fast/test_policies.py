"""Policies on vLLM's own requests: what each order is, and that only the oracle knows the length."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pars_fast.distribution import LengthDistribution
from pars_fast.guards import OvertakingBudget
from pars_fast.host_index import HostIndex
from pars_fast.policies import POLICIES, Policy, with_lengths
from pars_fast.policies.prompt_size import PROMPT_WORK
from pars_fast.policies.tabulated import LONGEST
from pars_fast.policies.tie import BETA
from pars_fast.priority_class import Entry

pytest.importorskip("vllm")
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

SCORES = random.Random(3).choices(range(1, 900), k=40)
ORACLES = {"oracle", "srpt"}
HONEST = sorted(set(POLICIES) - ORACLES)


def request(
    number: int, *, max_tokens: int, min_tokens: int = 0, ignore_eos: bool = False, num_prompt_tokens: int = 2
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, ignore_eos=ignore_eos)
    prompt = [number] * num_prompt_tokens
    return Request(f"request-{number}", prompt, params, None, arrival_time=float(number))


def order(policy: str, requests: Sequence[Request]) -> list[str]:
    """Ids in the order of admission; of every four requests one has no score."""
    budget = OvertakingBudget(beta=0.5, floor_tokens=500.0)
    index = HostIndex(POLICIES[policy](), budget if policy == "pars_fast" else None)
    for seq, waiting in enumerate(requests):
        entry = Entry(seq, waiting.priority, waiting)
        index.add(entry)
        if index.policy.uses_ranker and seq % 4:
            index.set_expected_tokens(entry, SCORES[seq])
    return [index.pop().payload.request_id for _ in requests]


LENGTH_FIELDS: dict[str, Callable[[int], Request]] = {
    "max_tokens": lambda n: request(n, max_tokens=1000 - 20 * n),
    "min_tokens": lambda n: request(n, max_tokens=500, min_tokens=400 - 10 * n),
    "ignore_eos": lambda n: request(n, max_tokens=500, ignore_eos=n % 3 == 0),
    "all at once": lambda n: request(n, max_tokens=900 - 20 * n, min_tokens=n % 5, ignore_eos=n % 2 == 0),
}


@pytest.mark.parametrize("changed", LENGTH_FIELDS)
@pytest.mark.parametrize("policy", HONEST)
def test_no_policy_peeks_at_the_length(policy: str, changed: str) -> None:
    plain = order(policy, [request(n, max_tokens=500) for n in range(40)])
    assert order(policy, [LENGTH_FIELDS[changed](n) for n in range(40)]) == plain


@pytest.mark.parametrize("policy", HONEST)
def test_a_key_at_arrival_reads_no_more_than_the_prompt(policy: str) -> None:
    """Stronger than any field by name: the key is the same for an object without any other."""
    prompt = SimpleNamespace(request_id="a", num_prompt_tokens=7, priority=0)
    once, again = (POLICIES[policy]().key_on_arrival(prompt) for _ in range(2))  # type: ignore[arg-type]
    assert once == again


def test_prompt_length_is_shortest_prompt_first() -> None:
    requests = [request(n, max_tokens=5, num_prompt_tokens=length) for n, length in enumerate([9, 3, 6, 3])]
    assert order("prompt_length", requests) == ["request-1", "request-3", "request-2", "request-0"]


def test_the_oracle_is_shortest_first() -> None:
    lengths = [30, 10, 20, 10]
    requests = [request(n, max_tokens=length) for n, length in enumerate(lengths)]
    assert order("oracle", requests) == ["request-1", "request-3", "request-2", "request-0"]


def test_srpt_is_shortest_remaining_first() -> None:
    begun = request(0, max_tokens=30)
    begun.append_output_token_ids([1] * 25)
    policy = POLICIES["srpt"]()
    assert policy.key_on_arrival(begun) == 5.0
    assert policy.key_on_arrival(request(1, max_tokens=9)) == 9.0


def test_priority_goes_by_priority_then_arrival() -> None:
    params = SamplingParams(max_tokens=5)
    priorities = [2, 0, 1, 0]
    requests = [Request(f"request-{n}", [n], params, None, priority=p) for n, p in enumerate(priorities)]
    assert order("priority", requests) == ["request-1", "request-3", "request-2", "request-0"]


SPREAD = LengthDistribution(  # short answers are uncertain, long ones are not
    scores=(math.log(50), math.log(200), math.log(1000)),
    mu=(math.log(50), math.log(200), math.log(1000)),
    sigma=(1.2, 0.2, 0.05),
    dof=3.5,
)


def sampled(tokens: float, spread: LengthDistribution = SPREAD, count: int = 200_000) -> NDArray[np.float64]:
    """Lengths drawn from the distribution at an expected length, cut as the policies cut them."""
    mu, sigma = spread(math.log(tokens))
    draws = np.random.default_rng(0).standard_t(spread.dof, count)
    return np.clip(np.exp(mu + sigma * draws), 1.0, LONGEST)


# 400 quantiles stand for the distribution, which is coarse at both ends: hence the tolerances.
@pytest.mark.parametrize("tokens", [50, 90, 200, 700])
def test_tie_is_the_mean_and_half_of_the_worst_tenth(tokens: float) -> None:
    drawn = np.sort(sampled(tokens))
    expected = drawn.mean() + BETA * drawn[-len(drawn) // 10 :].mean()
    assert with_lengths("tie", SPREAD).key(tokens) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("tokens", [50, 90, 200, 700])
def test_gittins_is_the_least_work_for_a_chance_of_being_done(tokens: float) -> None:
    drawn = sampled(tokens)
    ends = np.quantile(drawn, np.linspace(0.005, 1, 300))
    expected = min(np.minimum(drawn, end).mean() / (drawn <= end).mean() for end in ends)
    assert with_lengths("gittins", SPREAD).key(tokens) == pytest.approx(expected, rel=0.08)


def test_an_uncertain_request_comes_late_by_its_tail_and_early_by_its_chance() -> None:
    uncertain = replace(SPREAD, sigma=(1.2, 1.2, 1.2))
    certain = replace(SPREAD, sigma=(0.1, 0.1, 0.1))
    for policy, sign in (("tie", 1), ("gittins", -1)):
        keys = [with_lengths(policy, spread).key(200.0) for spread in (uncertain, certain)]
        assert sign * (keys[0] - keys[1]) > 0


@pytest.mark.parametrize("policy", ["tie", "gittins", "cost_aware"])
@given(st.lists(st.floats(1, 20_000), min_size=2, max_size=20))
def test_with_one_spread_for_all_the_order_is_that_of_the_expected_length(
    policy: str, tokens: list[float]
) -> None:
    keys = [ONE_SPREAD[policy].key(length) for length in sorted(tokens)]
    assert keys == sorted(keys)


ONE_SPREAD = {name: POLICIES[name]() for name in ("tie", "gittins", "cost_aware")}


def test_cost_aware_counts_prompt_and_cache() -> None:
    policy = POLICIES["cost_aware"]()
    short, long = (request(0, max_tokens=5, num_prompt_tokens=n) for n in (10, 4000))
    assert policy.key(200.0, short) < policy.key(100.0, long)
    begun = request(0, max_tokens=500, num_prompt_tokens=10)
    before = policy.key(200.0, begun)
    begun.append_output_token_ids([1] * 100)
    assert 0 < policy.key(200.0, begun) - PROMPT_WORK * 110 < before


def test_pars_fast_weighs_prompt_and_answer_together() -> None:
    policy = POLICIES["pars_fast"]()
    short, long = (request(0, max_tokens=5, num_prompt_tokens=n) for n in (10, 4000))
    assert policy.key(100.0) == 100.0  # nobody has come yet, so nothing is known of prompts
    assert policy.key(100.0, short) < policy.key(200.0, short) < policy.key(100.0, long)
    assert policy.key(100.0, short) ** 2 == pytest.approx(100 * (100 + PROMPT_WORK * 10))
    assert policy.key_on_arrival(short) is None
    assert policy.key(100.0) == policy.key(100.0, short)  # what one without a score counts as
    for _ in range(2000):
        policy.key_on_arrival(long)
    assert policy.key(100.0) == pytest.approx(policy.key(100.0, long), rel=1e-3)


def test_elis_goes_by_what_remains() -> None:
    policy, begun = POLICIES["elis"](), request(0, max_tokens=500)
    begun.append_output_token_ids([1] * 60)
    assert (policy.key(100.0), policy.key(100.0, begun), policy.key(20.0, begun)) == (100.0, 40.0, 1.0)
    assert policy.repredict_tokens == 50


def test_alise_has_levels_and_one_that_outlasts_its_estimate_sinks() -> None:
    policy, waiting = POLICIES["alise"](), request(0, max_tokens=500, num_prompt_tokens=1)
    assert [policy.key(tokens, waiting) for tokens in (1, 30, 33, 60, 130, 1000)] == [0, 0, 1, 1, 3, 5]
    assert policy.key(30.0, request(0, max_tokens=5, num_prompt_tokens=1000)) > 4
    levels = []
    for _ in range(3):
        waiting.append_output_token_ids([1] * 90)
        levels.append(policy.key(100.0, waiting))
    assert levels == [0, 3, 4]  # 10 left; then 180 and 270 made, of 100


def test_fcfs_is_arrival_order() -> None:
    requests = [request(n, max_tokens=50 - n) for n in range(40)]
    assert order("fcfs", requests) == [waiting.request_id for waiting in requests]


def test_pars_fast_is_not_arrival_order() -> None:
    """Else the test on peeking would show nothing."""
    requests = [request(n, max_tokens=500) for n in range(40)]
    assert order("pars_fast", requests) != [waiting.request_id for waiting in requests]


@pytest.mark.parametrize(
    ("policy", "uses_ranker", "guard"),
    [
        ("fcfs", False, "none"),
        ("prompt_length", False, "none"),
        ("oracle", False, "none"),
        ("pars", True, "fixed_threshold"),
        ("pars_fast", True, "passing_limit"),
        ("justitia", False, "none"),
        ("vtc", False, "none"),
        ("srpt", False, "none"),
        ("ltr", True, "idle_quantum"),
        ("elis", True, "none"),
        ("alise", True, "none"),
        ("tie", True, "none"),
        ("relative_ageing", True, "relative_ageing"),
        ("uniboost", True, "uniboost"),
    ],
)
def test_what_a_policy_needs(policy: str, uses_ranker: bool, guard: str) -> None:
    assert (POLICIES[policy].uses_ranker, POLICIES[policy].default_guard.name) == (uses_ranker, guard)


def test_a_policy_must_say_its_key() -> None:
    with pytest.raises(TypeError, match="key_on_arrival"):
        Policy()  # type: ignore[abstract]
