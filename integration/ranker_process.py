"""The ranker's own process on the CPU: `python -m pars_fast.integration.ranker_process --endpoint ...`.

Runs when a core has nothing else to do, so that the engine's steps come first. It ends when its parent does:
the parent holds the other end of its standard input. Messages are msgpack, `[Prompt]` in and `[Scored]` out.
"""

import argparse
import contextlib
import os
import sys
from collections import deque
from pathlib import Path

import msgspec
import torch
import zmq

from pars_fast.integration.runtime import READY, Prompt
from pars_fast.integration.scoring import PromptScorer
from pars_fast.ranker import Ranker

BATCH_PROMPTS = 2  # small, so that the first of a burst are ordered while the others are scored


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores prompts for a vLLM engine; started by it.")
    for name in ("endpoint", "ranker", "tokenizer"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--chat-template", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):  # the engine may have pinned itself, and us with it, to its cores
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    torch.set_num_threads(arguments.threads)
    ranker = Ranker.from_pretrained(arguments.ranker, device="cpu")
    scorer = PromptScorer(ranker, arguments.tokenizer, arguments.revision, arguments.chat_template)
    socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)  # what is left to say to an engine that has died is not waited for
    socket.connect(arguments.endpoint)
    _serve(socket, scorer)


def _serve(socket: "zmq.Socket[bytes]", scorer: PromptScorer) -> None:
    encode = msgspec.msgpack.Encoder().encode
    decode = msgspec.msgpack.Decoder(list[Prompt]).decode
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    waiting: deque[Prompt] = deque()
    socket.send(encode([READY]))
    while True:
        ready = dict(poller.poll(0 if waiting else None))
        if sys.stdin.fileno() in ready:
            return
        if socket in ready:
            waiting += decode(socket.recv())
            continue
        batch = [waiting.popleft() for _ in range(min(BATCH_PROMPTS, len(waiting)))]
        socket.send(encode(scorer(batch)))


if __name__ == "__main__":
    main()
