"""`PARS_RECORD=path`: finished requests in the form that `pars-fast train --data` reads.

One JSON object a line, appended; nothing is kept of the answers but their length. Runs in a background
thread of EngineCore: with the served model's tokenizer it decodes as much of the prompt as the ranker gets.
Whatever stops it, serving goes on: it is said once, and what is not kept is counted.
"""

import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pars_fast.data import split_of
from pars_fast.errors import OutputError
from pars_fast.integration.background import Background
from pars_fast.integration.metrics import CounterFile
from pars_fast.integration.prompt_window import PromptWindow, Seen
from pars_fast.live_calibration import Ending
from pars_fast.text import HASHED_PROMPT, hashed, is_text

logger = logging.getLogger("vllm.pars_fast")

MAX_WAITING = 10_000  # requests not yet written; more are dropped and counted
MAX_BYTES = 2**30  # of the file; then recording ends
MAX_LINE_BYTES = 2**20
ROW_START = b'{"id": "'  # how each of our lines begins

Decode = Callable[[list[int], int], str]  # ids of a prompt, and how many of them others begin with, too


class Recorder:
    """Appends finished requests to a file; `add` never blocks.

    Args:
        prompts: `hashed` or `plain`.
        load_decode: gives the tokenizer's decode; called once, in the background thread, which it is given
            at once so that it loads while the engine starts.
        model: name of the column of lengths.
    """

    def __init__(
        self,
        path: Path,
        prompts: str,
        model: str,
        counters: CounterFile,
        load_decode: Callable[[], Decode],
    ) -> None:
        self._path, self._plain, self._model = path, prompts == "plain", model
        self._counters, self._counting = counters.values, threading.Lock()
        self._load_decode = load_decode
        self._window = PromptWindow()
        self._ended = False
        self._background = Background("recording", max_jobs=MAX_WAITING)
        self._background.submit(self._begin)

    def add(self, prompt_token_ids: list[int] | None, output_tokens: int, ending: Ending) -> None:
        """Note a finished request; one without ids or answer is left out."""
        if output_tokens < 1 or not prompt_token_ids:
            return
        seen, count = self._window.cut(prompt_token_ids), len(prompt_token_ids)
        if self._ended or not self._background.submit(
            lambda: self._write(seen, count, output_tokens, ending)
        ):
            self._count("pars_record_dropped")

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was added is in the file; False if that took longer."""
        return self._background.drain(timeout_s)

    def _begin(self) -> None:
        try:
            self._file = LineFile(self._path)
            self._decode = self._load_decode()
        except Exception as error:  # loading a tokenizer shares no narrower base
            self._end(error)

    def _write(self, seen: Seen, count: int, output_tokens: int, ending: Ending) -> None:
        written = False
        try:
            if self._ended:
                return
            prompt = self._decode(seen.ids, seen.shared)
            if prompt.strip() and is_text(prompt):
                self._file.append(self._row(prompt, count, output_tokens, ending))
                written = True
        except OutputError as error:
            self._end(error)
        finally:  # a prompt that cannot be decoded, too, which the background thread says once
            self._count("pars_recorded" if written else "pars_record_dropped")

    def _row(self, prompt: str, count: int, output_tokens: int, ending: Ending) -> bytes:
        row = {
            "id": hashed(prompt).removeprefix(HASHED_PROMPT)[:16],
            "split": split_of(prompt),
            "prompt": prompt if self._plain else hashed(prompt),
            "prompt_tokens": count,
            "output_tokens": {self._model: output_tokens},
            "finish_reason": "length" if ending is Ending.CAPPED else "stop",
        }
        return json.dumps(row).encode() + b"\n"

    def _end(self, error: Exception) -> None:
        """Nothing more is kept: an attempt a request would cost time and change nothing."""
        self._ended = True
        logger.warning("pars-fast: recording ends, serving goes on: %s", error)

    def _count(self, counter: str) -> None:
        with self._counting:  # the scheduling thread and the background one
            self._counters[counter] += 1


class LineFile:
    """A file to which several engines may append: each line is one write under a lock, whole or not there.

    Raises: OutputError: if the file cannot be opened, or ends in something that is neither a line nor the
        begin of one of ours, which a kill tore in two and which is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            with _locked(self._descriptor):
                self._mend()
        except OSError as error:
            raise self._error(error.strerror) from error

    def append(self, line: bytes) -> None:
        """Raises: OutputError: if the line cannot be written, or the file would have over `MAX_BYTES`."""
        try:
            with _locked(self._descriptor):
                self._append(line)
        except OSError as error:
            raise self._error(error.strerror) from error

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._descriptor).st_size
        if size + len(line) > MAX_BYTES:
            raise OutputError(f"{self._path} has reached {MAX_BYTES} bytes")
        if os.write(self._descriptor, line) < len(line):
            os.ftruncate(self._descriptor, size)
            raise self._error("the disk is full")

    def _mend(self) -> None:
        """See to it that the file ends with a line's end."""
        size = os.fstat(self._descriptor).st_size
        first = max(0, size - MAX_LINE_BYTES)
        last = os.pread(self._descriptor, size - first, first).rpartition(b"\n")[2]
        if not last:
            return
        if _is_json(last):  # only its end is missing
            self._append(b"\n")
        elif last.startswith(ROW_START):
            os.ftruncate(self._descriptor, size - len(last))
        else:
            raise OutputError(f"{self._path} ends in half a line of something else; name another file")

    def _error(self, reason: str | None) -> OutputError:
        return OutputError(f"{self._path}: cannot be written ({reason})")


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """Other processes that lock the file wait meanwhile."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
