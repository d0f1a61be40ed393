"""Tuples in ascending order, for a queue that is mostly read at its front.

A heap's front costs a path to the leaves for each taken item, compared tuple by tuple, and that within the
scheduling step. Here taking the first is a `pop` from a short list, and the work is where an item is added.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T", bound=tuple[float, int])
_MAX_BLOCK = 512


class SortedBlocks(Generic[T]):
    """A sorted list cut into blocks of at most 512, so that an item moves no more than one block.

    `blocks` may be read: no block is empty, and `blocks[0][0]` is the first item.
    """

    __slots__ = ("_lasts", "_size", "blocks")

    def __init__(self, items: Iterable[T] = ()) -> None:
        ordered = sorted(items)
        half = _MAX_BLOCK // 2
        self.blocks = [ordered[start : start + half] for start in range(0, len(ordered), half)]
        self._lasts = [block[-1] for block in self.blocks]
        self._size = len(ordered)

    def __len__(self) -> int:
        return self._size

    def add(self, item: T) -> None:
        self._size += 1
        lasts = self._lasts
        place = bisect_left(lasts, item)
        if place < len(lasts):
            block = self.blocks[place]
            insort(block, item)
        elif place:
            place -= 1
            block = self.blocks[place]
            block.append(item)
            lasts[place] = item
        else:
            block = [item]
            self.blocks.append(block)
            lasts.append(item)
        if len(block) > _MAX_BLOCK:
            half = len(block) // 2
            self.blocks.insert(place, block[:half])
            lasts.insert(place, block[half - 1])
            del block[:half]

    def pop_first(self) -> T:
        """Raises: IndexError: if there is none."""
        block = self.blocks[0]
        item = block.pop(0)
        if not block:
            del self.blocks[0], self._lasts[0]
        self._size -= 1
        return item
