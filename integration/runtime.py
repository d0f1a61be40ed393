"""Where the ranker runs: beside the scheduling thread, never on it.

A runtime takes prompts and gives back expected tokens; no call of it blocks. On the CPU the ranker is a
process of its own at idle priority (`process_runtime.py`). On a GPU it is a thread of EngineCore, since one
GPU is one process there.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pars_fast.errors import KernelError


class Scored(NamedTuple):
    """What the ranker says of a prompt. msgpack has it as an array."""

    seq: int
    expected_tokens: float  # NaN if the prompt could not be scored
    system_prompt: int = 0  # stands for the one that was not scored with the rest; 0: there was none


READY = Scored(-1, 0.0)


class Prompt(NamedTuple):
    """What is to be scored. msgpack has it as an array."""

    seq: int
    ids: list[int]  # of the served model: what `PromptWindow` leaves of the prompt, and the answer so far
    num_tokens: int  # of the whole prompt, less what is cached for a runtime that weighs prompts
    shared: int = 0  # how many of the ids are a beginning that others have, too


class RankerRuntime(Protocol):
    """What `RankingLoop` needs. `poll` gives READY once when the ranker can take prompts.

    Attributes:
        max_in_flight: prompts it should hold at a time: few, so that no work goes into requests that are
            admitted meanwhile; enough to keep it busy from one step to the next.
        weighs_prompts: whether an order of its own needs what is to be computed of each prompt, which takes
            look-ups in the prefix cache.
    """

    max_in_flight: int
    weighs_prompts: bool

    def start(self) -> "RankerRuntime":
        """Begin anew, whatever state it is in.

        Returns: what was started: itself, or another in its place where this one cannot run.
        Raises: OSError, RuntimeError: if the system has no room for it.
        """

    def submit(self, prompts: Sequence[Prompt]) -> bool:
        """Hand over prompts; False if they cannot be taken now."""

    def poll(self) -> list[Scored]:
        """What has been scored since the last call."""

    def order(self) -> Sequence[int] | None:
        """Seqs of all scored requests that run next, as of the last `poll`; None without a GPU's order."""

    def forget(self, seqs: Sequence[int]) -> None:
        """These requests have finished; they need no place in the order any more."""

    def failure(self) -> str | None:
        """Why the ranker ended, None while it runs."""

    def close(self) -> None:
        """End it; safe to call twice."""


class Scorer(Protocol):
    """What a `ThreadRuntime` runs in its thread."""

    def __call__(self, prompts: Sequence[Prompt]) -> list[Scored]:
        """Score prompts."""

    def order(self) -> Sequence[int] | None:
        """Seqs of the scored requests that run next, None if this scorer keeps no order."""

    def forget(self, seqs: Sequence[int]) -> None:
        """Drop finished requests from the order."""


class ThreadRuntime:
    """The ranker as a daemon thread on the engine's GPU; `make_scorer` loads it, inside the thread.

    Once that has raised KernelError, `other` is started in its place, if there is one.
    """

    max_in_flight = 64  # one batch, scored long before the next step
    weighs_prompts = True

    def __init__(self, make_scorer: Callable[[], Scorer], other: RankerRuntime | None = None) -> None:
        self._make_scorer, self._other = make_scorer, other
        self._channel = _Channel()

    def start(self) -> RankerRuntime:
        # A hung thread cannot be killed; it keeps its own channel, and ends if it ever comes back to it.
        self.close()
        if self._channel.refused and self._other is not None:
            return self._other.start()
        self._channel = _Channel()
        self._order: Sequence[int] | None = None
        arguments = (self._make_scorer, self._channel)
        threading.Thread(target=_score_forever, args=arguments, name="pars-fast", daemon=True).start()
        return self

    def submit(self, prompts: Sequence[Prompt]) -> bool:
        self._channel.prompts.put(prompts)
        return True

    def poll(self) -> list[Scored]:
        scored: list[Scored] = []
        while not self._channel.scored.empty():
            batch, self._order = self._channel.scored.get_nowait()
            scored += batch
        return scored

    def order(self) -> Sequence[int] | None:
        return self._order

    def forget(self, seqs: Sequence[int]) -> None:
        self._channel.finished.put(seqs)

    def failure(self) -> str | None:
        return self._channel.failure

    def close(self) -> None:
        self._channel.prompts.put(None)


@dataclass(slots=True)
class _Channel:
    """Between the scheduling thread and one ranker thread. `prompts` ends with None; `finished` is read
    before each batch, since it changes nothing that anybody waits for."""

    prompts: "queue.SimpleQueue[Sequence[Prompt] | None]" = field(default_factory=queue.SimpleQueue)
    finished: "queue.SimpleQueue[Sequence[int]]" = field(default_factory=queue.SimpleQueue)
    scored: "queue.SimpleQueue[tuple[list[Scored], Sequence[int] | None]]" = field(
        default_factory=queue.SimpleQueue
    )
    failure: str | None = None
    refused: bool = False  # by the GPU, which will not think better of it


def _score_forever(make_scorer: Callable[[], Scorer], channel: _Channel) -> None:
    try:
        score = make_scorer()
        channel.scored.put(([READY], None))
        while (batch := channel.prompts.get()) is not None:
            waiting = list(batch)
            with contextlib.suppress(queue.Empty):
                while (more := channel.prompts.get_nowait()) is not None:
                    waiting += more
                channel.prompts.put(None)  # closed meanwhile: end after this batch
            while not channel.finished.empty():
                score.forget(channel.finished.get_nowait())
            channel.scored.put((score(waiting), score.order()))
    except Exception as error:  # whatever it is, the scheduler must learn of it and go on
        channel.refused = isinstance(error, KernelError)
        channel.failure = f"the ranker thread ended: {error!r}"
