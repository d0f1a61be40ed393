"""What a policy decides: the key of a request, waiting or running."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

from pars_fast.guards import Guard, NoGuard


class QueuedRequest(Protocol):
    """The part of vLLM's `Request` that a queue may read. Only an oracle may read `max_tokens`."""

    request_id: str
    num_prompt_tokens: int
    priority: int
    max_tokens: int

    @property
    def num_output_tokens(self) -> int: ...


def _nothing(request: QueuedRequest) -> int:
    return 0


class Policy(ABC):
    """A lower key runs first, within one priority and lane; equal keys run in order of arrival.

    Attributes:
        uses_ranker: whether requests are scored; if not, no ranker is started.
        knows_lengths: whether the key at arrival is the answer's real length, which then counts as its
            expected length.
        default_guard: bounds the order unless another guard is asked for.
        predictor: whose scores the paper orders by, a name of `pars_fast.baselines`; None for the ranker's.
        preempts: whether a running request yields to a waiting one of a lower key (`preemption.py`). Its key
            is then asked anew at each step, so it may fall with `num_output_tokens`.
        repredict_tokens: a running request's length is predicted anew after so many tokens; None: never.
        swaps_kv: whether a preempted request's KV cache is kept in host memory and not computed again: in
            simulation; a live engine does so if it has a KV offloading connector.
        asks_model: whether the served model itself is asked for the length of its answer first.
        not_live: why a live engine refuses the policy, None if it does not.
        cached_tokens: how much of a waiting prompt the engine's prefix cache holds; set by who has one.
    """

    uses_ranker: ClassVar[bool] = False
    knows_lengths: ClassVar[bool] = False
    default_guard: ClassVar[Guard] = NoGuard()
    predictor: ClassVar[str | None] = None
    preempts: ClassVar[bool] = False
    repredict_tokens: ClassVar[int | None] = None
    swaps_kv: ClassVar[bool] = False
    asks_model: ClassVar[bool] = False
    not_live: ClassVar[str | None] = None
    cached_tokens: Callable[[QueuedRequest], int] = staticmethod(_nothing)

    @abstractmethod
    def key_on_arrival(self, request: QueuedRequest) -> float | None:
        """The key known at arrival, or None for one that waits for a score."""

    def key(self, expected_tokens: float, request: QueuedRequest | None = None) -> float:
        """The key of a scored request as it is now.

        Args:
            expected_tokens: of the whole answer, finite and positive.
            request: None for a typical request, whose key those without a score share.
        """
        return expected_tokens

    def uncached_tokens(self, request: QueuedRequest) -> int:
        """Of a waiting request's prompt, what is to be computed as the prefix cache is now."""
        return request.num_prompt_tokens - self.cached_tokens(request)
