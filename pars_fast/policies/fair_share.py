"""Ideal fair sharing in virtual time: who would finish next if all applications were served at once.

In the ideal (generalised processor sharing, Parekh & Gallager 1993) the service done in any moment is divided
equally among the N applications that still have demand. Virtual time V is what each of them has got since it
began: it grows by `service / N`. An application that joins at V with demand C has had its share when V is
`V + C`, its virtual finish time, whoever comes later; so the order of finishing is known at arrival.
Source: Justitia (arXiv 2510.17015), virtual-time fair queuing.
"""

import heapq


class FairShare:
    """Applications in ideal sharing. Joining takes O(log n), serving O(log n) for each that is done.

    `virtual_time` is V, in units of service.
    """

    def __init__(self) -> None:
        self.virtual_time = 0.0
        self._finish: dict[str, float] = {}
        self._next: list[tuple[float, str]] = []  # heap

    def __len__(self) -> int:
        """Number of applications that still have demand in the ideal."""
        return len(self._finish)

    def finish_of(self, application: str) -> float | None:
        """Virtual finish time, None if the application is not there, or had its share."""
        return self._finish.get(application)

    def join(self, application: str, demand: float) -> float:
        """An application that is not there arrives with a demand > 0; its virtual finish time."""
        finish = self._finish[application] = self.virtual_time + demand
        heapq.heappush(self._next, (finish, application))
        return finish

    def until_next(self) -> float:
        """Service after which the next application has had its share; infinity if there is none."""
        return (
            max(0.0, self._next[0][0] - self.virtual_time) * len(self._next) if self._next else float("inf")
        )

    def serve(self, service: float) -> list[str]:
        """So much was done, whoever got it in reality; what nobody has a demand for is dropped.

        Returns: the applications that have now had their share, in order.
        """
        done = []
        while self._next and (needed := self.until_next()) <= service:
            service -= needed
            self.virtual_time, application = heapq.heappop(self._next)
            del self._finish[application]
            done.append(application)
        if self._next:
            self.virtual_time += service / len(self._next)
        return done
