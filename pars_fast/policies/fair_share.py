"""Ideal fair sharing in virtual time: who would finish next if all applications were served at once.

In the ideal (generalised processor sharing, Parekh & Gallager 1993) the service done in any moment is divided
equally among the N applications that still have demand. Virtual time V is what each of them has got since it
began: it grows by `service / N`. An application that joins at V with demand C has had its share when V is
`V + C`, its virtual finish time, whoever comes later; so the order of finishing is known at arrival.
Source: Justitia (arXiv 2510.17015), virtual-time fair queuing.
"""

import heapq

_MIN_HEAP = 64


class FairShare:
    """Applications in ideal sharing. Joining takes O(log n), serving O(log n) for each that is done.

    `virtual_time` is V, in units of service.
    """

    def __init__(self) -> None:
        self.virtual_time = 0.0
        self._finish: dict[str, float] = {}
        self._next: list[tuple[float, str]] = []  # heap; what is not in `_finish` is out of date

    def __len__(self) -> int:
        """Number of applications that still have demand in the ideal."""
        return len(self._finish)

    def join(self, application: str, demand: float) -> float:
        """An application that is not there arrives with a demand > 0; its virtual finish time."""
        finish = self.virtual_time + demand
        self.move(application, finish)
        return finish

    def move(self, application: str, finish: float) -> None:
        """Give an application, there or not, another virtual finish time; with one that is past it leaves."""
        if finish <= self.virtual_time:
            self._finish.pop(application, None)
            return
        self._finish[application] = finish
        heapq.heappush(self._next, (finish, application))
        if len(self._next) > max(_MIN_HEAP, 2 * len(self._finish)):
            self._next = [(finish, application) for application, finish in self._finish.items()]
            heapq.heapify(self._next)

    def until_next(self) -> float:
        """Service after which the next application has had its share; infinity if there is none."""
        while self._next and self._finish.get(self._next[0][1]) != self._next[0][0]:
            heapq.heappop(self._next)
        if not self._next:
            return float("inf")
        return max(0.0, self._next[0][0] - self.virtual_time) * len(self._finish)

    def serve(self, service: float) -> list[str]:
        """So much was done, whoever got it in reality; what nobody has a demand for is dropped.

        Returns: the applications that have now had their share, in order.
        """
        done = []
        while (needed := self.until_next()) <= service and self._next:
            service -= needed
            self.virtual_time, application = heapq.heappop(self._next)
            del self._finish[application]
            done.append(application)
        if self._finish:
            self.virtual_time += service / len(self._finish)
        return done
