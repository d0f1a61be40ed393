"""The oldest member of a set, against `min`."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from pars_fast.arrival_order import ArrivalOrder


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_first_is_the_oldest_member(seed: int) -> None:
    """Members arrive, leave from anywhere, and come back in any order."""
    rng = random.Random(seed)
    order: ArrivalOrder[str] = ArrivalOrder()
    gone: list[int] = []
    for seq in range(600):
        if rng.random() < 0.5:
            order.add(seq, "new")
        if order.members and rng.random() < 0.6:
            left = min(order.members) if rng.random() < 0.5 else rng.choice(list(order.members))
            del order.members[left]
            gone.append(left)
        if gone and rng.random() < 0.3:
            order.add(gone.pop(rng.randrange(len(gone))), "back")
        assert order.first() == min(order.members, default=None)


def test_who_comes_and_goes_leaves_nothing_behind() -> None:
    order: ArrivalOrder[None] = ArrivalOrder()
    order.add(0, None)
    for seq in range(1, 2000):
        order.add(seq, None)
        del order.members[seq]
        del order.members[0]
        order.add(0, None)
    assert order.first() == 0
    assert len(order._arrived) + len(order._returned) < 100
