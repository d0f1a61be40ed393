"""The ranked queue as vLLM uses it: the whole interface, on vLLM's own requests."""

import inspect
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request, RequestStatus

from pars_fast.guards import NoGuard, OvertakingBudget
from pars_fast.host_index import MAX_EXPECTED_TOKENS, HostIndex
from pars_fast.integration.queue import RankedRequestQueue
from pars_fast.policies import POLICIES

MakeRequest = Callable[..., Request]
NO_GUARD = OvertakingBudget(beta=0.0, floor_tokens=math.inf)


def make_queue(
    policy: str = "pars_fast", *, guard: OvertakingBudget = NO_GUARD, trust_caller: bool = False
) -> Any:
    return RankedRequestQueue(HostIndex(POLICIES[policy](), guard), trust_caller=trust_caller)


def filled(make_request: MakeRequest, expected: list[float | None]) -> tuple[Any, list[Request]]:
    """A queue with one request for each score."""
    queue = make_queue()
    requests = [make_request() for _ in expected]
    for request, tokens in zip(requests, expected, strict=True):
        queue.add_request(request)
        if tokens is not None:
            queue.set_expected_tokens(queue.entries[request.request_id], tokens)
    return queue, requests


def drain(queue: Any) -> list[Request]:
    return [queue.pop_request() for _ in range(len(queue))]


def test_nothing_of_the_interface_is_missing() -> None:
    assert issubclass(RankedRequestQueue, RequestQueue)
    assert not inspect.isabstract(RankedRequestQueue)


def test_peek_pop_iterate_and_index_agree(make_request: MakeRequest) -> None:
    queue, requests = filled(make_request, [30.0, 10.0, None, 20.0])
    order = [requests[i] for i in (1, 2, 3, 0)]  # upper median of 10, 20, 30 is 20, and 2 came before 3
    assert list(queue) == order
    assert [queue[i] for i in range(4)] == order
    assert queue[-1] is requests[0]
    for request in order:
        assert queue.peek_request() is request
        assert queue.pop_request() is request
    assert not queue
    assert len(queue) == 0


def test_an_empty_queue(make_request: MakeRequest) -> None:
    queue = make_queue()
    assert not queue
    assert list(queue) == []
    queue.prepend_requests([])
    queue.remove_requests([make_request()])
    for method in (queue.peek_request, queue.pop_request):
        with pytest.raises(IndexError, match="empty queue"):
            method()


def test_a_skipped_request_keeps_its_place(make_request: MakeRequest) -> None:
    queue, requests = filled(make_request, [30.0, 10.0, 20.0])
    skipped = queue.pop_request()
    assert skipped.status is RequestStatus.WAITING
    queue.prepend_request(skipped)
    assert drain(queue) == [requests[i] for i in (1, 2, 0)]


def test_a_preempted_request_goes_first(make_request: MakeRequest) -> None:
    queue, requests = filled(make_request, [30.0, 10.0, 20.0])
    drain(queue)
    for request in requests:
        queue.add_request(request)  # as if all were new again
    requests[0].status = RequestStatus.PREEMPTED
    queue.remove_request(requests[0])
    queue.prepend_request(requests[0])
    assert drain(queue) == [requests[i] for i in (0, 1, 2)]


@pytest.mark.parametrize("status", [RequestStatus.WAITING, RequestStatus.PREEMPTED], ids=lambda s: s.name)
def test_prepend_requests_takes_both_kinds(make_request: MakeRequest, status: RequestStatus) -> None:
    queue, requests = filled(make_request, [30.0, 10.0, 20.0])
    popped = [queue.pop_request() for _ in range(3)]
    popped[2].status = status  # the longest
    queue.prepend_requests(popped)
    lane_zero = [requests[0]] if status is RequestStatus.PREEMPTED else []
    assert drain(queue) == lane_zero + [
        r for r in (requests[1], requests[2], requests[0]) if r not in lane_zero
    ]


def test_a_request_that_never_waited_here_can_be_prepended(make_request: MakeRequest) -> None:
    queue, requests = filled(make_request, [30.0])
    stranger = make_request()
    queue.prepend_request(stranger)
    assert set(drain(queue)) == {stranger, *requests}


def test_a_preempted_request_that_never_waited_here_comes_first(make_request: MakeRequest) -> None:
    """Until 0.30 one with a grammar waited in vLLM's second queue, and comes here if it is preempted."""
    queue, requests = filled(make_request, [30.0, 10.0])
    stranger = make_request()
    stranger.status = RequestStatus.PREEMPTED
    queue.prepend_request(stranger)
    assert drain(queue) == [stranger, requests[1], requests[0]]


def test_remove_request(make_request: MakeRequest) -> None:
    queue, requests = filled(make_request, [30.0, 10.0, 20.0])
    assert queue.peek_request() is requests[1]
    queue.remove_request(requests[1])
    assert queue.peek_request() is requests[2]
    with pytest.raises(ValueError, match=f"{requests[1].request_id} is not in the queue"):
        queue.remove_request(requests[1])
    with pytest.raises(ValueError, match="stranger is not in the queue"):
        queue.remove_request(make_request("stranger"))


def test_remove_requests_leaves_strangers_and_running_ones_alone(make_request: MakeRequest) -> None:
    queue, requests = filled(make_request, [30.0, 10.0, 20.0])
    running = queue.pop_request()
    queue.remove_requests(iter([requests[0], make_request(), running, requests[0]]))
    assert drain(queue) == [requests[2]]


def test_what_was_shown_is_what_is_popped_when_a_finish_changes_the_guard(make_request: MakeRequest) -> None:
    """vLLM gives memory to the request it peeked at and then pops: they must be one, step after step."""
    queue = make_queue(guard=OvertakingBudget(beta=0.0, floor_tokens=10.0))
    long, first, second = (make_request(max_tokens=n) for n in (900, 10, 10))
    for request, tokens in ((long, 900.0), (first, 10.0), (second, 10.0)):
        queue.add_request(request)
        queue.set_expected_tokens(queue.entries[request.request_id], tokens)
    assert queue.pop_request() is first
    assert queue.peek_request() is long  # its budget is used up; say no memory is free for it
    queue.finish(first.request_id)  # aborted at once: the budget is back
    assert queue.peek_request() is queue.pop_request() is second


def test_random_use_never_shows_one_and_pops_another(make_request: MakeRequest) -> None:
    rng = random.Random(0)
    queue = make_queue(guard=OvertakingBudget(beta=0.5, floor_tokens=100.0))
    running: list[Request] = []
    finished = added = 0
    while finished < 300:
        if added < 300 and rng.random() < 0.6:
            queue.add_request(make_request())
            added += 1
        shown = queue.peek_request() if queue else None
        if queue.arrivals and rng.random() < 0.6:
            entry = queue.arrivals.popleft()
            queue.set_expected_tokens(entry, rng.lognormvariate(4, 1.5))
            shown = None  # new scores may change the order
        if running and rng.random() < 0.5:
            queue.finish(running.pop(rng.randrange(len(running))).request_id)
            finished += 1
            shown = None
        if queue and rng.random() < 0.7:
            assert shown in (None, queue.peek_request())
            shown = queue.peek_request()
            popped = queue.pop_request()
            assert popped is shown
            running.append(popped)
    assert not queue.entries


def test_new_requests_are_left_for_whoever_scores(make_request: MakeRequest) -> None:
    queue = make_queue()
    requests = [make_request() for _ in range(3)]
    for request in requests:
        queue.add_request(request)
    assert [entry.payload for entry in queue.arrivals] == requests
    for policy in ("fcfs", "oracle"):
        unranked = make_queue(policy)
        unranked.add_request(make_request())
        assert not unranked.arrivals


@pytest.mark.parametrize("trust_caller", [False, True])
def test_a_callers_estimate_counts_only_if_trusted(make_request: MakeRequest, trust_caller: bool) -> None:
    queue = make_queue(trust_caller=trust_caller)
    long, short = make_request(pars_score=900), make_request(pars_score=1.5)
    queue.add_request(long)
    queue.add_request(short)
    assert drain(queue) == ([short, long] if trust_caller else [long, short])
    assert len(queue.arrivals) == (0 if trust_caller else 2)


@pytest.mark.parametrize(
    "value", ["120", "", math.nan, math.inf, -1, 0, -0.5, True, False, [120], {"tokens": 1}], ids=repr
)
def test_a_malformed_estimate_is_ignored(make_request: MakeRequest, value: Any) -> None:
    queue = make_queue(trust_caller=True)
    queue.add_request(make_request(pars_score=value))
    assert [entry.expected_tokens for entry in queue.arrivals] == [None]


@pytest.mark.parametrize("value", [1e300, 10**400])
def test_a_huge_estimate_is_clamped(make_request: MakeRequest, value: float) -> None:
    queue = make_queue(trust_caller=True)
    queue.add_request(make_request("huge", pars_score=value))
    assert queue.entries["huge"].expected_tokens == MAX_EXPECTED_TOKENS


@pytest.mark.parametrize("policy", ["fcfs", "oracle"])
def test_an_estimate_does_not_touch_policies_without_a_ranker(make_request: MakeRequest, policy: str) -> None:
    queue = make_queue(policy, trust_caller=True)
    requests = [make_request(pars_score=100 - i) for i in range(5)]
    for request in requests:
        queue.add_request(request)
    assert drain(queue) == requests


def test_priority_is_honoured(make_request: MakeRequest) -> None:
    queue = make_queue()
    requests = [make_request(priority=priority) for priority in (5, 0, -3)]
    for request, tokens in zip(requests, (1.0, 100.0, 900.0), strict=True):
        queue.add_request(request)
        queue.set_expected_tokens(queue.entries[request.request_id], tokens)
    assert drain(queue) == requests[::-1]


def test_pooling_requests_have_no_sampling_parameters(make_request: MakeRequest) -> None:
    queue = make_queue(trust_caller=True)
    request = make_request(pooling=True)
    assert request.sampling_params is None
    queue.add_request(request)
    assert queue.pop_request() is request


def test_an_id_can_be_used_again_after_its_request_finished(make_request: MakeRequest) -> None:
    queue = make_queue()
    queue.add_request(make_request("again"))
    late = queue.arrivals[0]
    queue.remove_requests([late.payload])
    queue.finish("again")
    queue.add_request(make_request("again"))
    queue.set_expected_tokens(late, 7.0)
    assert queue.entries["again"].expected_tokens is None
    assert queue.entries["again"].seq != late.seq
    assert queue.finish("unknown") is None


FAILING = ("add", "put_back", "remove", "head", "set_expected_tokens", "finish", "begin_step", "plan_ahead")


@pytest.mark.parametrize("failing", FAILING)
@pytest.mark.parametrize("after", [0, 1, 7])
def test_whatever_the_order_raises_every_request_is_served_once(
    make_request: MakeRequest, failing: str, after: int
) -> None:
    """From then on in arrival order, and it is told once. Some failures come when all has been done."""
    failures: list[Exception] = []
    guard = NO_GUARD if failing == "finish" else NoGuard()  # which allows to plan ahead
    queue = RankedRequestQueue(HostIndex(POLICIES["pars_fast"](), guard), on_failure=failures.append)
    operation, calls = getattr(queue.index, failing), 0

    def fail(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= after:
            return operation(*arguments, **named)
        if after == 1:
            operation(*arguments, **named)
        raise RuntimeError("no order")

    setattr(queue.index, failing, fail)
    rng = random.Random(1)
    added: list[Request] = []
    served: list[Request] = []
    running: list[Request] = []
    aborted: list[Request] = []
    while len(added) < 120 or queue:
        if len(added) < 120:
            added.append(make_request())
            queue.add_request(added[-1])
            entry = queue.entries[added[-1].request_id]
            queue.set_expected_tokens(entry, rng.lognormvariate(4.0, 1.0))
        queue.begin_step(0.0, room=4)
        for _ in range(rng.choice((0, 1, 2, 3)) if len(queue) else 0):
            if not queue:
                break
            shown = queue.peek_request()
            request = queue.pop_request()
            assert request is shown
            if rng.random() < 0.2:
                queue.prepend_request(request)
            else:
                running.append(request)
        if running and rng.random() < 0.5:
            served.append(running.pop(0))
            queue.finish(served[-1].request_id)
        if queue and rng.random() < 0.3:
            aborted.append(rng.choice(list(queue)))
            queue.remove_requests([aborted[-1]])
        queue.plan_ahead()
    assert [str(failure) for failure in failures] == ["no order"]
    everyone = [*served, *running, *aborted]
    assert len(everyone) == len(set(everyone)) == 120


def test_after_a_failure_the_order_is_that_of_arrival(make_request: MakeRequest) -> None:
    queue, requests = filled(make_request, [30.0, 10.0, None, 20.0])
    assert queue.peek_request() is requests[1]
    queue.index.put_back = None  # type: ignore[method-assign, assignment]
    assert queue.pop_request() is requests[1]
    queue.prepend_request(requests[1])
    assert drain(queue) == requests
