"""What a policy that shares the engine among applications is told, beyond arrivals."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from pars_fast.policies.base import Policy


class SharingPolicy(Policy):
    """A policy whose order depends on what was served. It must not raise: it runs inside the step.

    Requests are vLLM's. Keys are known at arrival; `key_now` may raise them later.
    """

    @abstractmethod
    def key_on_arrival(self, request: Any) -> float:
        """The key of a request that arrives now."""

    def key_now(self, request: Any, key: float) -> float:
        """The key of a waiting request that has had `key`; never below it."""
        return key

    def admitted(self, request: Any) -> None:
        """A request leaves the queue to run; again after it was put back or preempted."""

    def planned(self, requests: Sequence[Any], num_tokens: Sequence[int]) -> None:
        """A step was planned: so many tokens of each request, already in `num_computed_tokens`."""

    def ended(self, request: Any) -> None:
        """A request finished or was aborted, wherever it was."""
