"""The job itself: which prompts go to the engine when, and what is done with what comes back."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pars_fast.batch.groups import Group, Task, length_groups
from pars_fast.batch.store import Completion, CompletionStore

Lengths = Callable[[Sequence[str]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A prompt as it goes to the engine: an answer of `max_tokens` at most."""

    number: int
    prompt: str
    max_tokens: int


class Engine(Protocol):
    """Completes prompts."""

    max_model_len: int

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Lengths of prompts, as the model sees them."""

    def generate(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, Completion]]:
        """(number, completion) of each, as they finish; nothing else runs meanwhile."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of answers and batches; see `length_groups`."""

    max_tokens: int = 1024
    batch_tokens: int = 32768
    max_batch: int = 64


@dataclass(slots=True)
class Report:
    """What a run did.

    Attributes:
        wanted, already: prompts of the input, and those of them done before this run.
        completed, output_tokens: by this run.
        batches: calls of the engine.
        recomputed, wasted_tokens: answers that stopped at the expected length unfinished, and their tokens.
        lengths_s: seconds that it took to tell lengths.
    """

    wanted: int
    already: int
    completed: int = 0
    output_tokens: int = 0
    batches: int = 0
    recomputed: int = 0
    wasted_tokens: int = 0
    lengths_s: float = 0.0


def run_job(
    prompts: Sequence[str],
    store: CompletionStore,
    engine: Engine,
    limits: Limits,
    lengths: Lengths | None,
    *,
    on_answer: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Complete what is missing. A run that ends early has kept all that the engine had finished.

    Args:
        prompts: each fits the model; `store` was made with them.
        lengths: expected output tokens of prompts; with it, batches of similar length, else all at once,
            which leaves batching to the engine.
        on_answer: told after each completion.
    """
    missing = store.missing()
    report = Report(len(prompts), len(prompts) - len(missing))
    if not missing:
        return report
    sizes = engine.prompt_tokens([prompts[number] for number in missing])
    room = dict(zip(missing, (engine.max_model_len - size for size in sizes), strict=True))

    def pieces(tasks: Iterable[int], max_tokens: int) -> list[Piece]:
        return [Piece(number, prompts[number], min(max_tokens, room[number])) for number in tasks]

    def complete(batch: list[Piece]) -> list[int]:
        """Numbers of those that stopped short of what is wanted."""
        stopped: list[int] = []
        report.batches += 1
        limit = {piece.number: piece.max_tokens for piece in batch}
        for number, completion in engine.generate(batch):
            wanted = min(limits.max_tokens, room[number])
            if completion.finish_reason == "length" and limit[number] < wanted:
                stopped.append(number)
                report.wasted_tokens += completion.output_tokens
                continue
            store.add(number, completion)
            report.completed += 1
            report.output_tokens += completion.output_tokens
            on_answer(report)
        return stopped

    if lengths is None:
        complete(pieces(missing, limits.max_tokens))
        return report
    stopped: list[int] = []
    for group in _groups(prompts, missing, sizes, limits, lengths, report):
        stopped += complete(pieces((task.number for task in group.tasks), group.max_tokens))
    report.recomputed = len(stopped)
    if stopped:
        complete(pieces(stopped, limits.max_tokens))
    return report


def _groups(
    prompts: Sequence[str],
    missing: Sequence[int],
    sizes: Sequence[int],
    limits: Limits,
    lengths: Lengths,
    report: Report,
) -> list[Group]:
    started = time.perf_counter()
    expected = lengths([prompts[number] for number in missing])
    report.lengths_s = time.perf_counter() - started
    tasks = [Task(*columns) for columns in zip(missing, sizes, expected, strict=True)]
    return length_groups(
        tasks, max_tokens=limits.max_tokens, batch_tokens=limits.batch_tokens, max_batch=limits.max_batch
    )
