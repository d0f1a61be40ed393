"""The waiting requests of one priority class in flat arrays: order and guard of a scheduling step, compiled.

Requests are numbered by `place`, in order of arrival. Over the places stands one implicit binary tree: node 1
is the root, node n has the children 2n and 2n + 1, the leaf of a place is `capacity + place`. A node knows

- the waiting place of the lowest key below it, so that the root names who runs next;
- the least slack below it. The slack of a request is what may still go ahead of it. Whoever leaves the
  queue uses up slack of all who came before: an addition to a prefix of the places, written into O(log n)
  nodes that stand for all below them. Whether anybody would be passed beyond his limit is seen at the root.

So every operation takes O(log n), and nobody has to be looked at again and again. What happens between two
steps is noted in a log and applied at once (`apply`), because a call of compiled code costs as much as
several operations in it; then `plan` takes out those who run next, and `undo` puts back whom the step had no
room for.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pars_fast.guards.base import NO_LIMIT, REQUESTS, TOKENS, Limit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EMPTY = -1
GONE, WAITING, TAKEN = range(3)
ARRIVE, SCORE, LEAVE, TAKE, RETURN, CHARGE = range(6)  # operations of a log
LOG_FIELDS = 5  # operation, seq, and three values
OVERTAKES, PROMOTED = 1, 2  # flags of a planned request
MIN_CAPACITY = 64

# Places in `WaitingTree`'s arrays. What is read together lies together: two neighbours of the tree share a
# cache line.
_USED, _OLDEST, _UNKEYED, _NUM_WAITING, _NUM_UNKEYED, _NUM_UNSCORED, _NUM_PEAKS, _HINTED = range(8)
_KIND, _FACTOR, _FLOOR, _MAX_GROWTH, _GROWTH_FROM, _WORK = range(6)
_SEQ, _STATE, _PEAK_SEQ = range(3)
_KEY, _TOKENS, _KEPT, _KEPT_CAPPED, _PEAK = range(5)
_FIRST_KEY, _FIRST = range(2)
_SLACK, _CAPPED, _ADDED, _ADDED_CAPPED = range(4)


def _compiled(function: Callable[..., Any]) -> Any:
    """As for the fast simulator: no divisor is 0, and compiled code makes no array.

    Kept on disk, since an engine has it compiled while it starts; where that cannot be, anew each time.
    """
    try:
        return njit(error_model="numpy", _nrt=False, cache=True)(function)
    except RuntimeError:
        return njit(error_model="numpy", _nrt=False)(function)


class WaitingTree(NamedTuple):
    """The state; seqs ascend with places.

    `count` (8,) int64: places used; lower bounds of the oldest waiting place and of the oldest one without a
    key; waiting requests, those without a key, those without a score; peaks; used up of the hint.
    `limit` (6,) float64: a `Limit`, and the expected tokens of the waiting requests that have a score.
    `ints` (capacity, 3) int64: seq, state, seqs of the peaks.
    `floats` (capacity, 5) float64: key and expected tokens, NaN while unknown; the two slacks less what the
    tree adds; requests that waited before the peaks.
    `first` (2 * capacity, 2) float64: lowest key below a node, and its place.
    `slack` (2 * capacity, 4) float64: least slack and least capped slack below a node, and what is added to
    all below it of each.

    A peak is an arrival that met a longer queue than all since. Slack that grows with the longest queue has a
    cap, which is a slack of its own; the lower of the two counts.
    """

    count: Ints  # type: ignore[assignment]  # hides `tuple.count`
    limit: Floats
    ints: Ints
    floats: Floats
    first: Floats
    slack: Floats

    @property
    def capacity(self) -> int:
        return self.ints.shape[0]


def make_tree(limit: Limit, capacity: int = MIN_CAPACITY) -> WaitingTree:
    """An empty one; `capacity` is a power of two."""
    slack = np.zeros((2 * capacity, 4))
    slack[:, :_ADDED] = math.inf
    return WaitingTree(
        np.zeros(8, np.int64),
        np.array([*limit, 0.0]),
        np.zeros((capacity, 3), np.int64),
        np.zeros((capacity, 5)),
        np.full((2 * capacity, 2), [math.inf, EMPTY]),
        slack,
    )


def regrown(tree: WaitingTree, limit: Limit, out: Ints, returning: int = EMPTY) -> WaitingTree:
    """The waiting requests without the places of those who left, and with room for as many again.

    Args:
        out: (n,) seqs, ascending, of requests that were taken and may come back: they keep their places.
        returning: seq of a request that comes back and has no place any more: it gets one.
    """
    needed = 2 * (int(tree.count[_NUM_WAITING]) + len(out) + 1)
    new = make_tree(limit, max(MIN_CAPACITY, 1 << (needed - 1).bit_length()))
    _copy(*tree, *new, out, returning)
    return new


def new_hint(tree: WaitingTree) -> None:
    """The next plan gets another hint."""
    tree.count[_HINTED] = 0


# --- What the queue calls: the arrays one by one, since a tuple of them costs more to hand over -------------


@_compiled
def apply(
    count: Ints, limit: Floats, ints: Ints, floats: Floats, first: Floats, slack: Floats, log: Floats
) -> int:
    """Do what a log of (operations * LOG_FIELDS,) says; gives the number of operations done.

    | operation | values |
    |---|---|
    | ARRIVE | key, expected tokens (NaN while unknown), what is met: see `_meet_queue` |
    | SCORE | key, expected tokens |
    | LEAVE | |
    | TAKE | slack to take from all who came before |
    | RETURN | key, expected tokens, slack that its leaving took from others |
    | CHARGE | slack to take from all who came before |

    Stops before an arrival for which there is no place, and before the return of a request that has none.
    """
    t = WaitingTree(count, limit, ints, floats, first, slack)
    for done in range(len(log) // LOG_FIELDS):
        at = done * LOG_FIELDS
        operation, seq = int(log[at]), int(log[at + 1])
        a, b, c = log[at + 2], log[at + 3], log[at + 4]
        if operation == ARRIVE:
            place = count[_USED]
            if place == ints.shape[0]:
                return done
            count[_USED] += 1
            ints[place, _SEQ], floats[place, _KEY], floats[place, _TOKENS] = seq, a, b
            _meet_queue(t, place, c)
            _put(t, place)
            continue
        place = _place_of(t, seq)
        known = place < count[_USED] and ints[place, _SEQ] == seq
        if operation == CHARGE:
            _add_before(t, place, -a, -a)
        elif operation == RETURN:
            if not known:
                return done
            floats[place, _KEY], floats[place, _TOKENS] = a, b
            _add_before(t, place, c, c)
            _put(t, place)
        elif known and operation == LEAVE:
            _take(t, place, GONE)
            if limit[_KIND] == REQUESTS:
                _add_before(t, place, -1.0, -1.0)
        elif known and operation == TAKE:
            _take(t, place, TAKEN)
            _add_before(t, place, -a, -a)
        elif known and ints[place, _STATE] == WAITING:
            _account(t, place, -1)
            floats[place, _KEY], floats[place, _TOKENS] = a, b
            _account(t, place, 1)
            _play(t, place)
    return len(log) // LOG_FIELDS


@_compiled
def plan(
    count: Ints,
    limit: Floats,
    ints: Ints,
    floats: Floats,
    first: Floats,
    slack: Floats,
    ranking: bool,
    typical_key: float,
    typical_tokens: float,
    hint: Ints,
    seqs: Ints,
    flags: Ints,
) -> int:
    """Take out who runs next, as many as `seqs` and `flags` (n,) have room for; gives how many there were.

    Args:
        ranking: by key; if not, by arrival.
        typical_key, typical_tokens: of a request without a score.
        hint: seqs of requests with a score, lowest key first, to be used as far as they wait; the same until
            `new_hint`.
    """
    t = WaitingTree(count, limit, ints, floats, first, slack)
    for k in range(len(seqs)):
        if count[_NUM_WAITING] == 0:
            return k
        oldest = _oldest(t)
        chosen, flag = oldest, 0
        if ranking:
            while count[_HINTED] < len(hint) and not _waits_keyed(t, hint[count[_HINTED]]):
                count[_HINTED] += 1
            chosen = int(first[1, _FIRST])
            if count[_HINTED] < len(hint):
                chosen = _place_of(t, hint[count[_HINTED]])
            if count[_NUM_UNKEYED] > 0:
                unkeyed = _oldest_unkeyed(t)
                if chosen == EMPTY or (typical_key, unkeyed) < (floats[chosen, _KEY], chosen):
                    chosen = unkeyed
            if limit[_KIND] != NO_LIMIT:
                older = _short_of(t, _cost(t, chosen, typical_tokens))
                while older != EMPTY and older < chosen:
                    chosen, flag = older, PROMOTED
                    older = _short_of(t, _cost(t, chosen, typical_tokens))
        if chosen != oldest:
            flag |= OVERTAKES
        _take(t, chosen, TAKEN)
        if limit[_KIND] != NO_LIMIT:
            cost = _cost(t, chosen, typical_tokens)
            _add_before(t, chosen, -cost, -cost)
        seqs[k], flags[k] = ints[chosen, _SEQ], flag
    return len(seqs)


@_compiled
def take(
    count: Ints, limit: Floats, ints: Ints, floats: Floats, first: Floats, slack: Floats, seq: int
) -> int:
    """Take out a waiting request, as a plan does, whoever should be next; gives its flags."""
    t = WaitingTree(count, limit, ints, floats, first, slack)
    place = _place_of(t, seq)
    flag = OVERTAKES if place != _oldest(t) else 0
    _take(t, place, TAKEN)
    return flag


@_compiled
def undo(
    count: Ints,
    limit: Floats,
    ints: Ints,
    floats: Floats,
    first: Floats,
    slack: Floats,
    typical_tokens: float,
    seqs: Ints,
) -> None:
    """Put back the last (n,) seqs of a plan, before anything else happens."""
    t = WaitingTree(count, limit, ints, floats, first, slack)
    count[_HINTED] = 0
    for k in range(len(seqs) - 1, -1, -1):
        place = _place_of(t, seqs[k])
        if limit[_KIND] != NO_LIMIT:
            cost = _cost(t, place, typical_tokens)
            _add_before(t, place, cost, cost)
        _put(t, place)


@_compiled
def slack_of(
    count: Ints, limit: Floats, ints: Ints, floats: Floats, first: Floats, slack: Floats, seq: int
) -> float:
    """What may still go ahead of a waiting request; infinity without a limit."""
    t = WaitingTree(count, limit, ints, floats, first, slack)
    free, capped = _slacks(t, _place_of(t, seq))
    return min(free, capped)


# --- Order --------------------------------------------------------------------------------------------------


@_compiled
def _place_of(t: WaitingTree, seq: int) -> int:
    """The first place whose seq is not below `seq`."""
    low, high = 0, t.count[_USED]
    while low < high:
        middle = (low + high) // 2
        if t.ints[middle, _SEQ] < seq:
            low = middle + 1
        else:
            high = middle
    return low


@_compiled
def _waits_keyed(t: WaitingTree, seq: int) -> bool:
    place = _place_of(t, seq)
    return (place < t.count[_USED] and t.ints[place, _SEQ] == seq and t.ints[place, _STATE] == WAITING
            and not math.isnan(t.floats[place, _KEY]))


@_compiled
def _oldest(t: WaitingTree) -> int:
    """The oldest place that waits; one does."""
    while t.ints[t.count[_OLDEST], _STATE] != WAITING:
        t.count[_OLDEST] += 1
    return t.count[_OLDEST]


@_compiled
def _oldest_unkeyed(t: WaitingTree) -> int:
    """The oldest place that waits without a key; one does."""
    place = t.count[_UNKEYED]
    while t.ints[place, _STATE] != WAITING or not math.isnan(t.floats[place, _KEY]):
        place += 1
    t.count[_UNKEYED] = place
    return place


@_compiled
def _put(t: WaitingTree, place: int) -> None:
    """The request at `place` waits."""
    t.ints[place, _STATE] = WAITING
    t.count[_OLDEST] = min(t.count[_OLDEST], place)
    if math.isnan(t.floats[place, _KEY]):
        t.count[_UNKEYED] = min(t.count[_UNKEYED], place)
    _account(t, place, 1)
    _play(t, place)
    if t.limit[_KIND] != NO_LIMIT:
        leaf = t.ints.shape[0] + place
        t.slack[leaf, _SLACK] = t.floats[place, _KEPT] + t.slack[leaf, _ADDED]
        t.slack[leaf, _CAPPED] = t.floats[place, _KEPT_CAPPED] + t.slack[leaf, _ADDED_CAPPED]
        _lift(t, leaf)


@_compiled
def _take(t: WaitingTree, place: int, state: int) -> None:
    """The request at `place` waits no longer."""
    t.ints[place, _STATE] = state
    _account(t, place, -1)
    _play(t, place)
    if t.limit[_KIND] != NO_LIMIT:
        leaf = t.ints.shape[0] + place
        t.slack[leaf, _SLACK] = t.slack[leaf, _CAPPED] = math.inf
        _lift(t, leaf)


@_compiled
def _account(t: WaitingTree, place: int, sign: int) -> None:
    t.count[_NUM_WAITING] += sign
    if math.isnan(t.floats[place, _KEY]):
        t.count[_NUM_UNKEYED] += sign
    if math.isnan(t.floats[place, _TOKENS]):
        t.count[_NUM_UNSCORED] += sign
    else:
        t.limit[_WORK] += sign * t.floats[place, _TOKENS]


@_compiled
def _play(t: WaitingTree, place: int) -> None:
    """State or key of a place has changed: who is first below the nodes above it? Of equal keys the older."""
    node = t.ints.shape[0] + place
    if t.ints[place, _STATE] == WAITING and not math.isnan(t.floats[place, _KEY]):
        t.first[node, _FIRST_KEY], t.first[node, _FIRST] = t.floats[place, _KEY], place
    elif t.first[node, _FIRST] == EMPTY:
        return
    else:
        t.first[node, _FIRST_KEY], t.first[node, _FIRST] = math.inf, EMPTY
    while node > 1:
        node >>= 1
        winner = 2 * node
        if t.first[winner, _FIRST] == EMPTY or t.first[winner + 1, _FIRST_KEY] < t.first[winner, _FIRST_KEY]:
            winner += 1
        t.first[node, _FIRST_KEY] = t.first[winner, _FIRST_KEY]
        t.first[node, _FIRST] = t.first[winner, _FIRST]


# --- Slack --------------------------------------------------------------------------------------------------


@_compiled
def _cost(t: WaitingTree, place: int, typical_tokens: float) -> float:
    """Slack that admitting `place` takes from all who came before."""
    if t.limit[_KIND] != TOKENS:
        return 1.0
    tokens = t.floats[place, _TOKENS]
    return typical_tokens if math.isnan(tokens) else tokens


@_compiled
def _allowed(t: WaitingTree, queue: float) -> float:
    """Whole requests that may go ahead if the longest queue was `queue`; the last term is for rounding."""
    return np.floor(t.limit[_FACTOR] * queue + t.limit[_FLOOR] + 1e-9)


@_compiled
def _meet_queue(t: WaitingTree, place: int, met: float) -> None:
    """The newest request gets its slack, and those before it what this queue adds to theirs.

    `met`: of a limit in requests, how many waited when it came, planned ones among them; of one in tokens,
    those of a request without a score.
    """
    if t.limit[_KIND] == TOKENS:
        _give(t, place, t.limit[_WORK] + t.count[_NUM_UNSCORED] * met, 0.0)
    if t.limit[_KIND] != REQUESTS:
        return
    peaks = t.count[_NUM_PEAKS]
    while peaks > 0 and (t.floats[peaks - 1, _PEAK] <= met or met == 0.0):
        peaks -= 1
        gain = _allowed(t, met) - _allowed(t, t.floats[peaks, _PEAK])
        if gain > 0.0:
            _add_before(t, _place_of(t, t.ints[peaks, _PEAK_SEQ] + 1), gain, 0.0)
            if peaks > 0:
                _add_before(t, _place_of(t, t.ints[peaks - 1, _PEAK_SEQ] + 1), -gain, 0.0)
    t.ints[peaks, _PEAK_SEQ], t.floats[peaks, _PEAK] = t.ints[place, _SEQ], met
    t.count[_NUM_PEAKS] = peaks + 1
    _give(t, place, met, met)


@_compiled
def _give(t: WaitingTree, place: int, ahead: float, longest: float) -> None:
    """Slack of a request with `ahead` before it, tokens or requests; `longest` is the longest queue since."""
    if t.limit[_KIND] == TOKENS:
        t.floats[place, _KEPT] = t.limit[_FLOOR] + t.limit[_FACTOR] * ahead
        t.floats[place, _KEPT_CAPPED] = math.inf
    else:
        most = t.limit[_MAX_GROWTH] * max(ahead, t.limit[_GROWTH_FROM])
        t.floats[place, _KEPT] = _allowed(t, longest) - ahead
        t.floats[place, _KEPT_CAPPED] = _allowed(t, most) - ahead


@_compiled
def _add_before(t: WaitingTree, place: int, amount: float, capped: float) -> None:
    """Add to both slacks of all places before `place`."""
    capacity = t.ints.shape[0]
    if place == capacity:
        _add_below(t, 1, amount, capped)
        return
    node = capacity + place
    while node > 1:
        if node & 1:  # all below its left neighbour come before
            _add_below(t, node - 1, amount, capped)
        node >>= 1
        _settle(t, node)


@_compiled
def _add_below(t: WaitingTree, node: int, amount: float, capped: float) -> None:
    t.slack[node, _SLACK] += amount
    t.slack[node, _ADDED] += amount
    t.slack[node, _CAPPED] += capped
    t.slack[node, _ADDED_CAPPED] += capped


@_compiled
def _lift(t: WaitingTree, node: int) -> None:
    """A node has changed; so do those above it."""
    while node > 1:
        node >>= 1
        _settle(t, node)


@_compiled
def _settle(t: WaitingTree, node: int) -> None:
    left, right = 2 * node, 2 * node + 1
    t.slack[node, _SLACK] = min(t.slack[left, _SLACK], t.slack[right, _SLACK]) + t.slack[node, _ADDED]
    t.slack[node, _CAPPED] = (
        min(t.slack[left, _CAPPED], t.slack[right, _CAPPED]) + t.slack[node, _ADDED_CAPPED]
    )


@_compiled
def _slacks(t: WaitingTree, place: int) -> tuple[float, float]:
    """(slack, capped slack) of a waiting place, or of one that was taken as if it had come back."""
    node = t.ints.shape[0] + place
    free, capped = t.slack[node, _SLACK], t.slack[node, _CAPPED]
    if t.ints[place, _STATE] == TAKEN:
        free = t.floats[place, _KEPT] + t.slack[node, _ADDED]
        capped = t.floats[place, _KEPT_CAPPED] + t.slack[node, _ADDED_CAPPED]
    while node > 1:
        node >>= 1
        free += t.slack[node, _ADDED]
        capped += t.slack[node, _ADDED_CAPPED]
    return free, capped


@_compiled
def _short_of(t: WaitingTree, cost: float) -> int:
    """The oldest waiting place with a slack below `cost`, or EMPTY."""
    if t.slack[1, _SLACK] >= cost and t.slack[1, _CAPPED] >= cost:
        return EMPTY
    capacity = t.ints.shape[0]
    node, added, added_capped = 1, 0.0, 0.0
    while node < capacity:
        added += t.slack[node, _ADDED]
        added_capped += t.slack[node, _ADDED_CAPPED]
        node *= 2
        if t.slack[node, _SLACK] + added >= cost and t.slack[node, _CAPPED] + added_capped >= cost:
            node += 1
    return node - capacity


# --- Room ---------------------------------------------------------------------------------------------------


@_compiled
def _copy(
    count: Ints,
    limit: Floats,
    ints: Ints,
    floats: Floats,
    first: Floats,
    slack: Floats,
    new_count: Ints,
    new_limit: Floats,
    new_ints: Ints,
    new_floats: Floats,
    new_first: Floats,
    new_slack: Floats,
    out: Ints,
    returning: int,
) -> None:
    """Who waits or is out, and the peaks that concern them, go into an empty tree; see `regrown`."""
    t = WaitingTree(count, limit, ints, floats, first, slack)
    new = WaitingTree(new_count, new_limit, new_ints, new_floats, new_first, new_slack)
    next_out = 0
    for place in range(count[_USED]):
        seq, state = ints[place, _SEQ], ints[place, _STATE]
        while next_out < len(out) and out[next_out] < seq:
            next_out += 1
        is_out = state == TAKEN and next_out < len(out) and out[next_out] == seq
        if state != WAITING and not is_out:
            continue
        if returning != EMPTY and returning < seq:
            _make_place(t, new, returning)
            returning = EMPTY
        copy = _copy_place(t, new, place)
        new_floats[copy, _KEPT], new_floats[copy, _KEPT_CAPPED] = _slacks(t, place)
    if returning != EMPTY:
        _make_place(t, new, returning)
    for place in range(new_count[_USED]):
        if new_ints[place, _STATE] == WAITING:
            _put(new, place)


@_compiled
def _make_place(t: WaitingTree, new: WaitingTree, seq: int) -> None:
    """A place in `new` for a request that is to return, as if it came now."""
    place = new.count[_USED]
    new.count[_USED] += 1
    new.ints[place, _SEQ], new.ints[place, _STATE] = seq, TAKEN
    queue = float(t.count[_NUM_WAITING])
    if t.limit[_KIND] == REQUESTS:
        longest = queue
        for peak in range(t.count[_NUM_PEAKS]):
            if t.ints[peak, _PEAK_SEQ] >= seq:
                longest = max(longest, t.floats[peak, _PEAK])
        _give(new, place, queue, longest)
        _keep_peak(t, new, seq)
    else:
        _give(new, place, t.limit[_WORK], 0.0)


@_compiled
def _copy_place(t: WaitingTree, new: WaitingTree, place: int) -> int:
    copy = new.count[_USED]
    new.count[_USED] += 1
    new.ints[copy, _SEQ], new.ints[copy, _STATE] = t.ints[place, _SEQ], t.ints[place, _STATE]
    new.floats[copy, _KEY], new.floats[copy, _TOKENS] = t.floats[place, _KEY], t.floats[place, _TOKENS]
    _keep_peak(t, new, t.ints[place, _SEQ])
    return copy


@_compiled
def _keep_peak(t: WaitingTree, new: WaitingTree, seq: int) -> None:
    """The peak that concerns `seq`, the first one from it on, goes along; seqs come in ascending order."""
    kept = new.count[_NUM_PEAKS]
    if kept > 0 and new.ints[kept - 1, _PEAK_SEQ] >= seq:
        return
    low, high = 0, t.count[_NUM_PEAKS]
    while low < high:
        middle = (low + high) // 2
        if t.ints[middle, _PEAK_SEQ] < seq:
            low = middle + 1
        else:
            high = middle
    if low < t.count[_NUM_PEAKS]:
        new.ints[kept, _PEAK_SEQ], new.floats[kept, _PEAK] = t.ints[low, _PEAK_SEQ], t.floats[low, _PEAK]
        new.count[_NUM_PEAKS] = kept + 1
