"""Priority queues that live in flat arrays, for numba.

A pairing heap (Fredman, Sedgewick, Sleator, Tarjan 1986) over node numbers: `child` and `sibling` hold the
links of all nodes, so that a thousand heaps share two arrays and nothing is allocated. A heap is its root, -1
if empty. Order: (`key`, node). A tournament tree gives the least of a fixed number of values that change one
at a time.
"""

import numpy as np
from numpy.typing import NDArray

from pars_fast.simulation.arrays import Floats, Ints, compiled

EMPTY = -1


@compiled
def meld(a: int, b: int, key: Floats, child: Ints, sibling: Ints) -> int:
    """Join two heaps; a single node without children is one."""
    if a < 0:
        return b
    if b < 0:
        return a
    if key[b] < key[a] or (key[b] == key[a] and b < a):
        a, b = b, a
    sibling[b] = child[a]
    child[a] = b
    return a


@compiled
def pop(root: int, key: Floats, child: Ints, sibling: Ints) -> int:
    """Take the root off and return the heap that is left."""
    node = child[root]
    child[root] = EMPTY
    pairs = EMPTY
    while node >= 0:
        second = sibling[node]
        following = EMPTY if second < 0 else sibling[second]
        pair = meld(node, second, key, child, sibling)
        sibling[pair] = pairs
        pairs = pair
        node = following
    rest = EMPTY
    while pairs >= 0:
        following = sibling[pairs]
        rest = meld(rest, pairs, key, child, sibling)
        pairs = following
    return rest


def tournament(size: int, value: float) -> NDArray[np.float64]:
    """A tree over `size` values, all of them `value`; leaves beyond `size` are infinite."""
    leaves = 1 << (size - 1).bit_length()
    tree = np.full(2 * leaves, np.inf)
    tree[leaves : leaves + size] = value
    for node in range(leaves - 1, 0, -1):
        tree[node] = min(tree[2 * node], tree[2 * node + 1])
    return tree


@compiled
def set_value(tree: Floats, place: int, value: float) -> None:
    node = len(tree) // 2 + place
    tree[node] = value
    while node > 1:
        node //= 2
        tree[node] = min(tree[2 * node], tree[2 * node + 1])


@compiled
def least(tree: Floats) -> int:
    """The lowest place that holds the least value."""
    leaves = len(tree) // 2
    node = 1
    while node < leaves:
        node *= 2
        if tree[node + 1] < tree[node]:
            node += 1
    return node - leaves
