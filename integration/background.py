"""Work that the scheduling thread hands away: estimates, log lines, files."""

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger("vllm.pars_fast")


class Background:
    """Runs jobs one after the other in a daemon thread of its own, which starts with the first job.

    `submit` never blocks: with `max_jobs` waiting it refuses, and where the system has no room for a thread,
    until it has. A job that fails is said once, and the next one runs.
    """

    def __init__(self, name: str, *, max_jobs: int) -> None:
        self._name, self._max_jobs = name, max_jobs
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failed = False

    def submit(self, job: Callable[[], None]) -> bool:
        """False if the job was refused."""
        if self._jobs.qsize() >= self._max_jobs or not self._started():
            return False
        self._jobs.put(job)
        return True

    def drain(self, timeout_s: float) -> bool:
        """Wait until all that was submitted has run; False if that took longer."""
        if self._thread is None:
            return True
        done = threading.Event()
        self._jobs.put(done.set)  # whatever waits already
        return done.wait(timeout_s)

    def _started(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # "can't start new thread"
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception:
                if not self._failed:
                    logger.exception("pars-fast: %s failed; serving goes on", self._name)
                self._failed = True
