"""What a policy decides: the key of a request in the waiting queue."""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

from pars_fast.guards import Guard, NoGuard


class QueuedRequest(Protocol):
    """The part of vLLM's `Request` that a queue may read. Only the oracle may read `max_tokens`."""

    request_id: str
    num_prompt_tokens: int
    priority: int
    max_tokens: int


class Policy(ABC):
    """A lower key runs first, within one priority and lane; equal keys run in order of arrival.

    Attributes:
        uses_ranker: whether requests are scored; if not, no ranker is started.
        knows_lengths: whether the key at arrival is the answer's real length, which then counts as its
            expected length.
        default_guard: bounds the order unless another guard is asked for.
    """

    uses_ranker: ClassVar[bool] = False
    knows_lengths: ClassVar[bool] = False
    default_guard: ClassVar[Guard] = NoGuard()

    @abstractmethod
    def key_on_arrival(self, request: QueuedRequest) -> float | None:
        """The key known at arrival, or None for one that waits for a score."""

    def key(self, expected_tokens: float) -> float:
        """The key of a scored request; `expected_tokens` is finite and positive."""
        return expected_tokens
