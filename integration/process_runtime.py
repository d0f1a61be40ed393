"""The ranker as a process of its own on the CPU.

It is spoken to over a ZeroMQ socket, whose I/O thread needs no GIL.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from pars_fast.integration.runtime import Prompt, Scored


class ProcessRuntime:
    """A `RankerRuntime` whose process runs at idle priority (`ranker_process.py`).

    One that is ended is killed and reaped at a later start: to wait for it could take for ever. `tokenizer`,
    `revision` and `chat_template` are `PromptText`'s.
    """

    max_in_flight = 4
    weighs_prompts = False

    def __init__(
        self,
        ranker: str,
        tokenizer: str,
        revision: str | None,
        threads: int,
        chat_template: Path | None = None,
    ) -> None:
        self._arguments = ["--ranker", ranker, "--tokenizer", tokenizer, "--threads", str(threads)]
        if revision:
            self._arguments += ["--revision", revision]
        if chat_template is not None:
            self._arguments += ["--chat-template", str(chat_template)]
        self._context = zmq.Context()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._killed: list[subprocess.Popen[bytes]] = []
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(list[Scored]).decode

    def start(self) -> "ProcessRuntime":
        self.close()
        self._killed = [process for process in self._killed if process.poll() is None]
        # A folder each start: a late answer to the last one goes nowhere.
        self._folder = tempfile.TemporaryDirectory(prefix="pars-fast-", ignore_cleanup_errors=True)
        endpoint = f"ipc://{self._folder.name}/ranker"
        try:
            self._socket = self._context.socket(zmq.PAIR)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise OSError(error.errno, error.strerror) from error
        environment = {name: value for name, value in os.environ.items() if name != "PARS_ENABLE"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "pars_fast.integration.ranker_process", "--endpoint", endpoint]
        self._process = subprocess.Popen([*command, *self._arguments], stdin=subprocess.PIPE, env=environment)
        return self

    def submit(self, prompts: Sequence[Prompt]) -> bool:
        assert self._socket is not None
        try:
            self._socket.send(self._encode(prompts), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def poll(self) -> list[Scored]:
        assert self._socket is not None
        scored: list[Scored] = []
        with contextlib.suppress(zmq.Again):
            while True:
                scored += self._decode(self._socket.recv(zmq.NOBLOCK))
        return scored

    def order(self) -> None:
        return None

    def forget(self, seqs: Sequence[int]) -> None:
        pass

    def failure(self) -> str | None:
        code = self._process.poll() if self._process is not None else None
        return None if code is None else f"the ranker process ended with code {code}"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._killed.append(self._process)
        if self._socket is not None:
            self._socket.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._process = self._socket = self._folder = None
