"""The suite itself: it is collected, its providers agree, and what it writes reaches the table."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

from bench.bench_queue import BATCH, QUEUES, QueueWorkload
from bench.cpu_providers import PROVIDERS, load_provider, pad
from bench.limits import score_work
from bench.prompts import take_prompts
from bench.top_queues import QUEUES as TOP_QUEUES
from bench.top_queues import Ours
from pars_fast.bench_results import PROVENANCE, ROOT
from pars_fast.bench_table import read_report
from pars_fast.bf16_products import native_bf16
from pars_fast.encoder_config import EncoderConfig
from pars_fast.guards import NoGuard
from pars_fast.model import Pooling, ScoreModel
from pars_fast.ranker import Ranker

WORDS = ("tell", "me", "a", "story", "about", "sea")


def run_pytest(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", *arguments]
    # Under xdist's variables pytest-benchmark would take itself for a worker, and not time anything.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return run.stdout


def tiny_ranker(pooling: Pooling) -> Ranker:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = EncoderConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    return Ranker(ScoreModel(config, pooling), config, tokenizer, max_tokens=8)


def test_every_benchmark_is_collected() -> None:
    listed = run_pytest("--collect-only")
    counts = {name: listed.count(f"::bench_{name}[") for name in ("score", "queue", "top_queue", "step")}
    assert counts == {"score": 18, "queue": 28, "top_queue": 24, "step": 3}
    assert "::bench_copy" in listed
    assert "::bench_matmul[float32]" in listed


def test_a_run_reaches_the_table(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    run_pytest("-k", "100-add-pars_fast", "--benchmark-only", f"--benchmark-json={out}")
    report = read_report(out)
    assert [(row.op, row.provider, row.shape) for row in report.rows] == [
        ("queue_add", "pars_fast", {"waiting": 100})
    ]
    assert tuple(report.provenance) == PROVENANCE
    assert report.provenance["cpu"]


# A first compilation takes a minute here; the suite checks each provider's scores before it is timed.
FAST_PROVIDERS = [name for name in PROVIDERS if name != "torch_compile"]


@pytest.mark.parametrize("provider", FAST_PROVIDERS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_providers_give_the_same_scores(pooling: Pooling, provider: str) -> None:
    ranker = tiny_ranker(pooling)
    prompts = [
        "tell me a story about the sea",
        "story",
        "a sea",
        *WORDS,
        " ".join(WORDS * 3),
    ]  # the last is cut
    expected = load_provider("hf_eager", ranker)(prompts)
    fewer_bits = provider in ("onnxruntime_int8", "hf_bf16") or (provider == "pars_fast" and native_bf16())
    atol = 0.05 if fewer_bits else 1e-5
    torch.testing.assert_close(load_provider(provider, ranker)(prompts), expected, atol=atol, rtol=1e-5)
    assert expected.std() > atol


def test_padding() -> None:
    ids, mask = pad([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_work_of_a_known_model() -> None:
    config = EncoderConfig(hidden_size=4, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8)
    work = score_work(config, [3, 1], bytes_per_value=2)
    assert work.flops == 2 * 2 * (4 * (4 * 16 + 2 * 32) + 2 * 4 * (9 + 1))
    assert work.bytes_moved == 2 * (4 * 16 + 2 * 32) * 2 + 4 * (4 * 2 + 4)


@pytest.mark.parametrize("provider", [name for name in TOP_QUEUES if name != "stock"])
def test_top_queues_keep_one_order(provider: str) -> None:
    rng = random.Random(3)
    # The guard would change the order.
    queue = Ours(NoGuard()) if provider == "pars_fast" else TOP_QUEUES[provider](300)
    waiting: dict[int, float] = {}
    arrived = 0
    for batch in (200, 16, 16, 16):
        keys = [rng.lognormvariate(5.0, 1.0) for _ in range(batch)]
        queue.add(keys)
        waiting |= dict(enumerate(keys, arrived))
        arrived += batch
        expected = sorted(waiting, key=lambda seq: (max(waiting[seq], 1.0), seq))[:16]
        assert queue.take(16) == expected
        for seq in expected:
            del waiting[seq]


@pytest.mark.parametrize("count", [1, 256])
def test_prompts_are_as_many_as_asked_for(count: int) -> None:
    prompts = take_prompts(count)
    assert len(prompts) == count
    assert all(prompts)


@pytest.mark.parametrize("provider", list(QUEUES))
@pytest.mark.parametrize(("operation", "after"), [("add", BATCH), ("pop", -BATCH), ("abort", -BATCH)])
def test_a_queue_is_refilled_before_each_round(provider: str, operation: str, after: int) -> None:
    if provider == "stock":
        pytest.importorskip("vllm", reason="the stock queue is vLLM's")
    sizes: list[int] = []
    queue = QUEUES[provider]()
    workload = QueueWorkload(queue, 50)
    for _ in range(5):
        workload.prepare()
        sizes.append(queue.size())
        getattr(workload, operation)()
        sizes.append(queue.size())
    assert sizes == [50, 50 + after] * 5


def test_a_devices_order_gives_what_the_hosts_own_does() -> None:
    popped: list[list[int]] = []
    for provider in ("pars_fast", "device_order"):
        workload = QueueWorkload(QUEUES[provider](), 300)
        seqs: list[int] = []
        for _ in range(5):
            workload.prepare()
            workload.pop()
            seqs += [entry.seq for entry in workload._left]
        popped.append(seqs)
    assert popped[0] == popped[1]
