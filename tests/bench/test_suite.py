"""The suite itself: it is collected, its providers agree, and what it writes reaches the table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from transformers import BertConfig

from bench.bench_queue import BATCH, QUEUES, QueueWorkload
from bench.bench_scoring import hf_eager, take_prompts
from pars_fast.bench_table import ROOT, read_report
from pars_fast.model import Pooling, ScoreModel
from pars_fast.ranker import Ranker

WORDS = ("tell", "me", "a", "story", "about", "sea")


def run_pytest(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def tiny_ranker(pooling: Pooling) -> Ranker:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = BertConfig(
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
    counts = {name: listed.count(f"::bench_{name}[") for name in ("score", "queue", "step")}
    assert counts == {"score": 6, "queue": 18, "step": 3}


def test_a_run_reaches_the_table(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    run_pytest("-k", "add and 100-pars_fast", "--benchmark-only", f"--benchmark-json={out}")
    report = read_report(out)
    assert [(row.op, row.provider, row.shape) for row in report.rows] == [
        ("queue_add", "pars_fast", {"waiting": 100})
    ]
    assert report.provenance.keys() >= {"cpu", "threads", "pars_fast", "vllm", "torch", "commit", "date"}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_providers_give_the_same_scores(pooling: Pooling) -> None:
    ranker = tiny_ranker(pooling)
    prompts = ["tell me a story about the sea", "story", "a sea", " ".join(WORDS * 3)]  # the last is cut
    expected = hf_eager(ranker)(prompts)
    torch.testing.assert_close(ranker.score(prompts), expected, atol=1e-5, rtol=1e-5)


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
