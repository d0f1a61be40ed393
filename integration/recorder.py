"""`PARS_RECORD=path`: finished requests in the form that `pars-fast train --data` reads.

One JSON object a line, appended; nothing is kept of the answers but their length. Runs in a background
thread of EngineCore: it decodes the prompt's first ids, as much as the ranker sees, with the served model's
tokenizer. Engines may share a file: each write is one append under a lock, and a line that a kill tore in two
is cut off when the next engine opens the file.
"""

import fcntl
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from pars_fast.integration.background import Background
from pars_fast.integration.metrics import CounterFile
from pars_fast.integration.runtime import MAX_PROMPT_IDS
from pars_fast.live_calibration import Ending
from pars_fast.text import HASHED_PROMPT, normalised

logger = logging.getLogger("vllm.pars_fast")

MAX_WAITING = 10_000  # requests not yet written; more are dropped and counted
MAX_BYTES = 2**30  # of the file; then recording stops

Decode = Callable[[list[int]], str]


class Recorder:
    """Appends finished requests to a file; `add` never blocks.

    Args:
        prompts: `hashed` or `plain`.
        load_decode: gives the tokenizer's decode; called once, in the background thread.
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
        self._counters = counters.values
        self._decode = functools.cache(load_decode)
        self._background = Background("recording", max_jobs=MAX_WAITING)
        self._open = functools.cache(lambda: _open_whole(path))
        self._full = False

    def add(self, prompt_token_ids: list[int] | None, output_tokens: int, ending: Ending) -> None:
        """Note a finished request; one without ids or answer is left out."""
        if output_tokens < 1 or not prompt_token_ids or self._full:
            return
        ids, count = prompt_token_ids[:MAX_PROMPT_IDS], len(prompt_token_ids)
        taken = self._background.submit(lambda: self._write(ids, count, output_tokens, ending))
        self._counters["pars_recorded" if taken else "pars_record_dropped"] += 1

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was added is in the file; False if that took longer."""
        return self._background.drain(timeout_s)

    def _write(self, ids: list[int], count: int, output_tokens: int, ending: Ending) -> None:
        prompt = self._decode()(ids)
        if not prompt.strip():
            return
        same = hashlib.sha256(normalised(prompt).encode(errors="replace")).hexdigest()
        share = int(same[:8], 16) % 100
        row = {
            "id": same[:16],
            "split": "train" if share < 70 else "val" if share < 85 else "test",
            "prompt": prompt if self._plain else HASHED_PROMPT + same,
            "prompt_tokens": count,
            "output_tokens": {self._model: output_tokens},
            "finish_reason": "length" if ending is Ending.CAPPED else "stop",
        }
        line = json.dumps(row).encode() + b"\n"
        descriptor = self._open()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            size = os.fstat(descriptor).st_size
            if size + len(line) > MAX_BYTES:
                self._full = True
                logger.warning("pars-fast: %s has reached %d bytes; recording ends", self._path, MAX_BYTES)
            elif os.write(descriptor, line) < len(line):  # the disk is full
                os.ftruncate(descriptor, size)
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def _open_whole(path: Path) -> int:
    """Descriptor for appending to `path`, whose last line is cut off if it is not whole."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        end = size = os.fstat(descriptor).st_size
        while end and os.pread(descriptor, 1, end - 1) != b"\n":
            end -= 1
        if end < size:
            os.ftruncate(descriptor, end)
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    return descriptor
