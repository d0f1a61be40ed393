"""Scoring on a GPU: providers of `gpu_providers` at the sizes a server meets, weights drawn at random.

One prompt of 128 tokens is what a scheduler sends most of the time, with L2 warm (nothing else runs) and
flushed (decode has been there); 8 to 256 prompts of real lengths are a burst.
"""

from collections.abc import Iterator, Sequence
from functools import cache, partial

import torch

from bench.gpu_cases import Case
from bench.gpu_providers import PROVIDERS
from bench.limits import score_work
from bench.prompts import load_ranker, take_prompts, token_lengths
from bench.timers import Call, Timer, gpu_time, gpu_time_warm
from pars_fast.encoder_config import EncoderConfig
from pars_fast.model import ScoreModel
from pars_fast.ranker import Ranker

VOCABULARY = 30522
MODELS = {
    "MiniLM-L6": EncoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    ),
    "bert-base": EncoderConfig(vocab_size=VOCABULARY),
}
L2: dict[str, Timer] = {"warm": gpu_time_warm, "flushed": gpu_time}


def cases() -> Iterator[Case]:
    for model in MODELS:
        for l2 in L2:
            yield from _cases(model, [128], l2)
        for prompts in (8, 32, 256):
            yield from _cases(model, _real_lengths(prompts), "flushed")


def _cases(model: str, lengths: Sequence[int], l2: str) -> Iterator[Case]:
    work = score_work(MODELS[model], lengths, bytes_per_value=2)
    for provider in PROVIDERS:
        yield Case(
            "score",
            provider,
            {"model": model, "prompts": len(lengths), "tokens": sum(lengths), "l2": l2},
            partial(_setup, provider, model, tuple(lengths)),
            work.bytes_moved,
            work.flops,
            baseline="hf_eager",
            timer=L2[l2],
        )


def _setup(provider: str, model: str, lengths: tuple[int, ...]) -> Call:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return PROVIDERS[provider](_random_ranker(model), ids)


@cache
def _random_ranker(model: str) -> Ranker:
    torch.manual_seed(0)
    network = ScoreModel(MODELS[model], "mean").to("cuda", torch.float16)
    return Ranker(network, MODELS[model], load_ranker().tokenizer)


@cache
def _real_lengths(prompts: int) -> list[int]:
    return token_lengths(load_ranker(), take_prompts(prompts))
