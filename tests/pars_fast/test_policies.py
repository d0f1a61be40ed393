"""Policies on vLLM's own requests: what each order is, and that only the oracle knows the length."""

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from pars_fast.guards import OvertakingBudget
from pars_fast.host_index import Entry, HostIndex
from pars_fast.policies import POLICIES, Policy

pytest.importorskip("vllm")
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

SCORES = random.Random(3).choices(range(1, 900), k=40)
HONEST = sorted(set(POLICIES) - {"oracle"})


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
    prompt = SimpleNamespace(request_id="a", num_prompt_tokens=7)
    once, again = (POLICIES[policy]().key_on_arrival(prompt) for _ in range(2))  # type: ignore[arg-type]
    assert once == again


def test_prompt_length_is_shortest_prompt_first() -> None:
    requests = [request(n, max_tokens=5, num_prompt_tokens=length) for n, length in enumerate([9, 3, 6, 3])]
    assert order("prompt_length", requests) == ["request-1", "request-3", "request-2", "request-0"]


def test_the_oracle_is_shortest_first() -> None:
    lengths = [30, 10, 20, 10]
    requests = [request(n, max_tokens=length) for n, length in enumerate(lengths)]
    assert order("oracle", requests) == ["request-1", "request-3", "request-2", "request-0"]


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
    ],
)
def test_what_a_policy_needs(policy: str, uses_ranker: bool, guard: str) -> None:
    assert (POLICIES[policy].uses_ranker, POLICIES[policy].default_guard.name) == (uses_ranker, guard)


def test_a_policy_must_say_its_key() -> None:
    with pytest.raises(TypeError, match="key_on_arrival"):
        Policy()  # type: ignore[abstract]
