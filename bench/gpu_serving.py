"""The ranker beside a server: what decode loses to it, and how soon an arrival is in the order.

Decode is stood in for by a CUDA graph of matrix-vector products over more weights than L2 holds, at a batch
of 16: bound by reading them, as decode is. It is timed alone, and while the ranker scores without a pause on
a stream of its own, its grid capped to so many programs. Both are queued before either starts, so neither
waits for the host.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bench.gpu_cases import Case
from bench.gpu_providers import capture, pars_fast
from bench.prompts import take_prompts
from bench.timers import Call, event_times, gpu_time_warm, host_time
from pars_fast.bench_results import Times
from pars_fast.packaged import checkpoint_directory
from pars_fast.policies.prompt_size import PROMPT_WORK
from pars_fast.ranker import Ranker
from pars_fast.slot_table import K_ORDER
from pars_fast.tokenization import encode

LAYERS, WIDTH, BATCH = 64, 4096, 16
DECODE_BYTES = 2 * LAYERS * WIDTH * WIDTH
MAX_PROGRAMS = (8, 16, 32, 64)
PROMPTS_BESIDE = 8
SCORINGS_BESIDE = 32  # enough to last out a decode step
LAUNCH_CYCLES = 40_000_000  # some 20 ms: the GPU idles while the host queues what is to run side by side
QUEUED = 512


def cases() -> Iterator[Case]:
    yield Case("decode_step", "alone", {}, _decode_step, DECODE_BYTES, baseline="alone", timer=gpu_time_warm)
    for max_programs in MAX_PROGRAMS:
        yield Case(
            "decode_step",
            "beside_ranker",
            {"max_programs": max_programs},
            partial(_decode_step_beside, max_programs),
            DECODE_BYTES,
            baseline="alone",
            timer=_time_beside,
        )
    yield Case("arrival_to_order", "pars_fast", {"prompts": 1, "waiting": QUEUED}, _arrival, timer=host_time)


@dataclass(frozen=True, slots=True)
class Beside:
    """A decode step, and what is launched ahead of it on another stream."""

    decode: Call
    rank: Call

    def __call__(self) -> object:
        return self.decode()


def _decode_step() -> Call:
    weights = torch.randn(LAYERS, WIDTH, WIDTH, dtype=torch.float16, device="cuda") / WIDTH**0.5
    hidden = torch.randn(BATCH, WIDTH, dtype=torch.float16, device="cuda")

    def step() -> torch.Tensor:
        x = hidden
        for weight in weights:
            x = x @ weight
        return x

    return capture(step)


def _decode_step_beside(max_programs: int) -> Call:
    ranker = Ranker.from_pretrained(device="cuda")
    ids = ranker.encode(take_prompts(PROMPTS_BESIDE))
    score = pars_fast(ranker, ids, max_programs=max_programs)
    stream = torch.cuda.Stream()

    def rank() -> None:
        """Queue the scorings on their stream, to start when the decode step that is launched next does."""
        torch.cuda.synchronize()
        torch.cuda._sleep(LAUNCH_CYCLES)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(SCORINGS_BESIDE):
                score()

    return Beside(_decode_step(), rank)


def _time_beside(call: Call) -> Times:
    assert isinstance(call, Beside)
    return event_times(call.rank, call.decode)


def _arrival() -> Call:
    """Token ids of one prompt to its place in the order of all, as the runtime's thread does it."""
    from pars_fast.integration.gpu_scoring import make_gpu_scorer
    from pars_fast.integration.runtime import Prompt

    tokenizer = str(checkpoint_directory("default"))  # stands in for the served model's
    device = torch.device("cuda", torch.cuda.current_device())
    scorer = make_gpu_scorer("default", tokenizer, None, device=device, prompt_work=PROMPT_WORK)
    prompts = encode(Ranker.from_pretrained(device="cpu").tokenizer, take_prompts(200), 128)
    seqs = itertools.count()

    def arrive() -> None:
        seq = next(seqs)
        ids = prompts[seq % len(prompts)]
        scorer([Prompt(seq, ids, len(ids))])
        order = scorer.order()
        if seq < K_ORDER and (order is None or seq not in order):
            raise RuntimeError("the arrival is not in the device's order")

    for _ in range(QUEUED):
        arrive()
    return arrive
