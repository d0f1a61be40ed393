"""A long run of random operations on the queue against a sorted reference, guard included.

The reference keeps the waiting requests in a sorted list of keys and a list by arrival, and every remaining
budget in an array that each charge changes at once; it shares no code with the queue. Tokens are whole and
beta is an eighth, so that floats compare exactly.
"""

import random
from bisect import bisect_left, insort

import numpy as np
import pytest

from pars_fast.guards import OvertakingBudget
from pars_fast.host_index import HostIndex
from pars_fast.policies import POLICIES
from pars_fast.priority_class import Entry

BETA, FLOOR = 0.125, 100.0
INITIAL = 128.0
WINDOW = 511
WAITING = 120  # about so many


class ReferenceQueue:
    """One class. `budget` and `charged` are by seq, of all requests ever seen."""

    def __init__(self, requests: int) -> None:
        self.lanes: tuple[list[tuple[float, int]], ...] = ([], [])  # of (key, seq), for those with a score
        self.unscored: tuple[list[int], ...] = ([], [])
        self.waiting: list[int] = []  # of lane 1, by arrival
        self.expected: dict[int, float] = {}
        self.budget, self.charged = np.zeros(requests), np.zeros(requests)
        self.scores: list[float] = []
        self.tokens_waiting = 0.0  # of those of lane 1 with a score
        self.ranking = True
        self.oldest = 0

    @property
    def median(self) -> float:
        last = sorted(self.scores[-WINDOW:])
        return last[len(last) // 2] if last else INITIAL

    def put(self, seq: int, lane: int) -> None:
        if seq in self.expected:
            insort(self.lanes[lane], (self.expected[seq], seq))
            self.tokens_waiting += lane * self.expected[seq]
        else:
            insort(self.unscored[lane], seq)
        if lane:
            insort(self.waiting, seq)

    def take(self, seq: int, lane: int) -> None:
        if seq in self.expected:
            del self.lanes[lane][bisect_left(self.lanes[lane], (self.expected[seq], seq))]
            self.tokens_waiting -= lane * self.expected[seq]
        else:
            self.unscored[lane].remove(seq)
        if lane:
            self.waiting.remove(seq)

    def arrive(self, seq: int) -> None:
        ahead = self.tokens_waiting + len(self.unscored[1]) * self.median
        self.budget[seq] = FLOOR + BETA * ahead
        self.put(seq, 1)
        self.oldest = self.waiting[0]

    def charge(self, seq: int, tokens: float) -> None:
        # What is popped after an arrival comes back before the next one, if at all.
        self.charged[self.oldest : seq] += tokens

    def head(self) -> int:
        for lane in (0, 1):
            scored, unscored = self.lanes[lane], self.unscored[lane]
            if not scored and not unscored:
                continue
            if not self.ranking:
                return min([*(seq for _, seq in scored), *unscored])
            seq = min([*scored[:1], *((self.median, seq) for seq in unscored[:1])])[1]
            return seq if lane == 0 else self._first_that_cannot_be_passed(seq)
        raise IndexError

    def _first_that_cannot_be_passed(self, seq: int) -> int:
        while True:
            older = self.waiting[: bisect_left(self.waiting, seq)]
            tokens = self.expected.get(seq, self.median)
            short = np.flatnonzero(self.budget[older] - self.charged[older] < tokens)
            if not short.size:
                return seq
            seq = older[short[0]]


class Player:
    """Plays the same operations on both."""

    def __init__(self, seed: int, operations: int) -> None:
        self.rng = random.Random(seed)
        self.index = HostIndex(
            POLICIES["pars"](), OvertakingBudget(BETA, FLOOR), initial_expected_tokens=INITIAL
        )
        self.reference = ReferenceQueue(operations)
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []
        self.arrived = 0
        self.done: dict[str, int] = {}

    def play(self, operations: int) -> None:
        names = ("arrive", "score", "admit", "finish", "abort", "skip", "preempt", "switch")
        weights = (30, 25, 22, 18, 8, 4, 4, 0.2)
        for number, name in enumerate(self.rng.choices(names, weights, k=operations)):
            if number % 10 == 0:
                self.index.begin_step(float(number))
            if getattr(self, f"_{name}")():
                self.done[name] = self.done.get(name, 0) + 1

    def _arrive(self) -> bool:
        if len(self.waiting) > WAITING:
            return self._admit()
        entry = Entry(self.arrived, 0, None)
        self.arrived += 1
        self.reference.arrive(entry.seq)
        self.index.add(entry)
        if self.rng.random() < 0.1:
            assert self.index.slack(entry) == self.reference.budget[entry.seq]
        self.waiting.append(entry)
        return True

    def _score(self) -> bool:
        entry = self._any(self.waiting if self.rng.random() < 0.8 else self.running)
        if entry is None:
            return False
        tokens = float(2 * self.rng.randint(1, 60 if self.rng.random() < 0.9 else 900))
        if entry.waiting:
            self.reference.take(entry.seq, entry.lane)
        self.reference.expected[entry.seq] = tokens
        self.reference.scores.append(tokens)
        if entry.waiting:
            self.reference.put(entry.seq, entry.lane)
        self.index.set_expected_tokens(entry, tokens)
        return True

    def _admit(self) -> bool:
        if not self.waiting:
            return False
        if self.rng.random() < 0.5:
            assert self.index.head().seq == self.reference.head()
        seq = self.reference.head()
        entry = self.index.pop()
        assert entry.seq == seq
        self.waiting.remove(entry)
        self.reference.take(seq, entry.lane)
        if entry.lane == 1:
            self.reference.charge(seq, self.reference.expected.get(seq, self.reference.median))
        self.running.append(entry)
        return True

    def _skip(self) -> bool:
        """Some are admitted, and taken back before anything else happens."""
        count = len(self.running)
        for _ in range(self.rng.randint(1, 3)):
            self._admit()
        skipped = self.running[count:]
        del self.running[count:]
        for entry in reversed(skipped):
            if entry.lane == 1:
                self.reference.charge(entry.seq, -entry.charged_tokens)
            self._back(entry)
        return bool(skipped)

    def _preempt(self) -> bool:
        entry = self._any(self.running)
        if entry is None:
            return False
        self.running.remove(entry)
        entry.lane = 0
        self._back(entry)
        return True

    def _back(self, entry: Entry) -> None:
        self.reference.put(entry.seq, entry.lane)
        self.index.put_back(entry)
        self.waiting.append(entry)

    def _finish(self) -> bool:
        entry = self._any(self.running)
        if entry is None:
            return False
        tokens = 2 * self.rng.randint(1, 80)
        self.reference.charge(entry.seq, tokens - entry.charged_tokens)
        self.index.finish(entry, tokens)
        self.running.remove(entry)
        return True

    def _abort(self) -> bool:
        entry = self._any(self.waiting)
        if entry is None:
            return False
        self.waiting.remove(entry)
        self.reference.take(entry.seq, entry.lane)
        self.index.remove(entry)
        return True

    def _switch(self) -> bool:
        self.reference.ranking = not self.reference.ranking
        self.index.ranking = self.reference.ranking
        return True

    def _any(self, entries: list[Entry]) -> Entry | None:
        return self.rng.choice(entries) if entries else None


@pytest.mark.parametrize(
    "operations", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)], ids=lambda n: f"{n:,}"
)
def test_random_operations_equal_a_sorted_reference(operations: int) -> None:
    player = Player(seed=operations, operations=operations)
    player.play(operations)
    assert len(player.done) == 8
    assert player.index.promotions > operations / 100
    assert player.index.overtakes > operations / 100
    assert len(player.index) == len(player.waiting)
    while player.waiting:
        player._admit()
    assert len(player.index) == 0
