"""Against `sorted`, over the size of a block; few values, so that many are equal."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pars_fast.sorted_blocks import SortedBlocks


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), first=st.sampled_from([0, 1, 256, 700]), adds=st.floats(0.3, 0.9))
def test_items_come_out_in_order(seed: int, first: int, adds: float) -> None:
    rng = random.Random(seed)
    items = [(float(rng.randrange(50)), seq) for seq in range(first)]
    blocks = SortedBlocks(items)
    items.sort()
    for seq in range(first, first + 1500):
        if rng.random() < adds:
            item = (float(rng.choice([rng.randrange(50), 1000])), seq)
            blocks.add(item)
            items.append(item)
            items.sort()
        elif items:
            assert blocks.blocks[0][0] == items[0]
            assert blocks.pop_first() == items.pop(0)
        assert len(blocks) == len(items)
        assert bool(blocks.blocks) == bool(items)
    assert [item for block in blocks.blocks for item in block] == items
    assert all(len(block) <= 512 for block in blocks.blocks)


def test_nothing_to_take() -> None:
    with pytest.raises(IndexError):
        SortedBlocks().pop_first()
