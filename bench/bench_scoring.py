"""Scoring prompts of real lengths on the CPU, from text to scores; see `cpu_providers`."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from scipy.stats import kendalltau

from bench.cpu_providers import PROVIDERS, load_provider
from bench.limits import score_work
from bench.prompts import load_ranker, take_prompts, token_lengths
from pars_fast.bf16_products import native_bf16

ROUNDS = {1: 50, 16: 10, 256: 3}  # prompts: rounds
# Scores are log tokens, from 2 to 10, and fp32 differs by the order of sums; fewer bits are judged by tau.
ATOL = dict.fromkeys(PROVIDERS, 1e-4) | {"onnxruntime_int8": 1.0, "hf_bf16": 0.2}
if native_bf16():
    ATOL["pars_fast"] = 0.02


@pytest.mark.parametrize("provider", list(PROVIDERS))
@pytest.mark.parametrize("prompts", list(ROUNDS))
def bench_score(benchmark: BenchmarkFixture, prompts: int, provider: str) -> None:
    ranker, texts = load_ranker(), take_prompts(prompts)
    score, expected = load_provider(provider, ranker), load_provider("hf_eager", ranker)(texts)
    scores = score(texts)
    torch.testing.assert_close(scores, expected, atol=ATOL[provider], rtol=1e-4)
    lengths = token_lengths(ranker, texts)
    work = score_work(ranker.config, lengths, bytes_per_value=4)
    benchmark.extra_info |= {
        "op": "score",
        "provider": provider,
        "baseline": "hf_eager",
        "shape": {"prompts": prompts, "tokens": sum(lengths)},
        "bytes_moved": work.bytes_moved,
        "flops": work.flops,
    }
    if prompts > 1:
        benchmark.extra_info["kendall_tau"] = float(kendalltau(scores.numpy(), expected.numpy()).statistic)
    benchmark.pedantic(score, args=(texts,), rounds=ROUNDS[prompts], warmup_rounds=1)
