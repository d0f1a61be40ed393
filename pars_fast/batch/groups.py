"""Batches of prompts whose answers should be of similar length: Sequence Scheduling (arXiv 2305.13144).

A batch that is not refilled lasts as long as its longest answer, so similar lengths go together. Batches of
short answers are larger, because each sequence holds less memory (variable batch size). An answer stops
where its batch was expected to end; whoever has not finished there is computed again later (failure
collection and recomputation). How far beyond the expected length a batch may go is set here: `MARGIN`, in
steps of `BUCKET` tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 1.5  # a ranker expects a mean, and half of the answers are longer
BUCKET = 32  # tokens


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt to complete: its number in the input, its length, and the expected length of its answer."""

    number: int
    prompt_tokens: int
    expected_tokens: float


@dataclass(frozen=True, slots=True)
class Group:
    """A batch: `max_tokens` is where its answers stop, finished or not."""

    tasks: tuple[Task, ...]
    max_tokens: int


def length_groups(
    tasks: Sequence[Task], *, max_tokens: int, batch_tokens: int, max_batch: int
) -> list[Group]:
    """Batches of similar expected length, short ones first; every task is in one of them.

    Args:
        tasks: what is to be done, in any order.
        max_tokens: longest answer that is wanted at all.
        batch_tokens: KV tokens that a batch may hold at its end, (longest prompt + `max_tokens`) * size; a
            single task may hold more.
        max_batch: sequences of a batch at most.
    """
    groups: list[Group] = []
    members: list[Task] = []
    prompt_tokens = 0
    for task in sorted(tasks, key=lambda task: (task.expected_tokens, task.number)):
        longest = max(prompt_tokens, task.prompt_tokens)
        held = (len(members) + 1) * (longest + _stop(task, max_tokens))
        if members and (len(members) == max_batch or held > batch_tokens):
            groups.append(Group(tuple(members), _stop(members[-1], max_tokens)))
            members, longest = [], task.prompt_tokens
        members.append(task)
        prompt_tokens = longest
    if members:
        groups.append(Group(tuple(members), _stop(members[-1], max_tokens)))
    return groups


def _stop(task: Task, max_tokens: int) -> int:
    """Where an answer as long as that of `task` should have ended."""
    return min(max_tokens, BUCKET * max(1, math.ceil(MARGIN * task.expected_tokens / BUCKET)))
