"""Which ids of a prompt the ranker gets: not a long beginning that other prompts share with it.

A ranker reads a hundred or two of a prompt's tokens. Where an application's requests begin with the same
system prompt, that would fill its window, and even a short one drowns what differs
(`bench/system_prompts.py`).
"""

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import NamedTuple

MAX_IDS = 512  # of a prompt; one of 100k tokens costs no more than its two ends
MAX_BEGINNING = 256  # ids; so long a shared beginning is shown beside them, for the system prompt in it
SHORT_BEGINNING = 32  # ids; an instruction of so many is left, it tells one kind of prompt from another
LEAST_IDS = 16  # are always left
_CHUNK = 16  # ids compared at a time
_RECENT, _LEAST_SHARING = 8, 2  # of the last eight that begin alike half must share it, and two at least
_MAX_APPLICATIONS = 16
_MAX_SHARED_IDS = 8192


class Seen(NamedTuple):
    """What the ranker gets of a prompt: how many of its `ids` are a beginning that is not to be scored, and
    what stands for the beginning that is left out; None: for none.

    `application` is the same for prompts of one but for a few of them, whose words happen to agree, too.
    """

    ids: list[int]
    shared: int
    application: Hashable


class PromptWindow:
    """Cuts prompts, and remembers how the last ones began. One thread's.

    The work on a prompt does not grow with its length beyond `_MAX_SHARED_IDS`.
    """

    def __init__(self) -> None:
        # By their first ids, so that a busy application does not crowd the others out.
        self._recent: OrderedDict[tuple[int, ...], deque[list[int]]] = OrderedDict()

    def __call__(self, ids: list[int]) -> list[int]:
        """At most `MAX_IDS` ids: a prompt without a shared beginning longer than `SHORT_BEGINNING`, and of
        what is still too long both ends."""
        seen = self.cut(ids)
        return seen.ids[seen.shared :]

    def cut(self, ids: list[int]) -> Seen:
        """The same behind the shared beginning, if that is not too long, and whose it is."""
        start = min(self._shared(ids), len(ids) - LEAST_IDS)
        if start <= SHORT_BEGINNING:
            start = 0
        # In chunks, since the first words of what differs are sometimes the same.
        end = start // _CHUNK * _CHUNK
        # Its two ends tell it from others; all of a long one would take 0.1 ms to hash.
        application = hash((end, *ids[:SHORT_BEGINNING], *ids[end - _CHUNK : end])) if start else None
        own = ids[start:]
        if len(own) > MAX_IDS:
            own = [*own[: MAX_IDS // 2], *own[-MAX_IDS // 2 :]]
        shared = start if start <= MAX_BEGINNING else 0
        return Seen([*ids[:shared], *own], shared, application)

    def _shared(self, ids: list[int]) -> int:
        """How many of its first ids this one has in common with half of the recent ones that begin alike."""
        if len(ids) <= SHORT_BEGINNING:
            return 0
        head = ids[:_MAX_SHARED_IDS]
        beginning = tuple(head[:SHORT_BEGINNING])
        recent = self._recent.setdefault(beginning, deque(maxlen=_RECENT))
        self._recent.move_to_end(beginning)
        if len(self._recent) > _MAX_APPLICATIONS:
            self._recent.popitem(last=False)
        lengths = [(_common_ids(head, other), max(len(head), len(other))) for other in recent]
        common = [shared for shared, longer in lengths if shared < longer]
        if len(common) == len(recent):  # else it was sent again, which says nothing about others
            recent.append(head)
        sharing = max(_LEAST_SHARING, -(-len(common) // 2))
        return sorted(common)[-sharing] if sharing <= len(common) else 0


def _common_ids(ids: list[int], other: list[int]) -> int:
    """Length of the common beginning, by bisection.

    Only the chunk in question is compared, not all before it: prompts that differ and then agree again at the
    same places can mislead it, and what that costs is a worse window.
    """
    same, chunks = 0, -(-min(len(ids), len(other)) // _CHUNK)
    while same < chunks:
        middle = (same + chunks) // 2
        start = middle * _CHUNK
        if ids[start : start + _CHUNK] == other[start : start + _CHUNK]:
            same = middle + 1
        else:
            chunks = middle
    start, shorter = same * _CHUNK, min(len(ids), len(other))
    return next((i for i in range(start, min(start + _CHUNK, shorter)) if ids[i] != other[i]), shorter)
