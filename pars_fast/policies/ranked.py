"""What the policies that order by a score have in common."""

from pars_fast.policies.base import Policy, QueuedRequest


class Ranked(Policy):
    """Waits for a score; key: expected output tokens, unless a subclass has another."""

    uses_ranker = True

    def key_on_arrival(self, request: QueuedRequest) -> None:
        return None
