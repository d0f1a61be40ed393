"""Scoring with products in bf16: near the exact scores, on any CPU, and always of the weights as they are."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pars_fast import Ranker, ranker
from pars_fast.bf16_products import Bf16Linear, Bf16Products
from pars_fast.model import Pooling
from pars_fast.tokenization import pack


@pytest.fixture(params=["cls", "mean"])
def exact(tiny_encoder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ranker:
    """A ranker of a CPU without bf16."""
    monkeypatch.setattr(ranker, "native_bf16", lambda: False)
    torch.manual_seed(1)
    pooling: Pooling = request.param
    return Ranker.from_encoder(tiny_encoder, pooling=pooling, max_tokens=32)


def test_scores_are_those_of_the_exact_model_rounded(exact: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 33, (20,), generator=generator).tolist()
    batch = pack([torch.randint(5, 50, (n,), generator=generator).tolist() for n in lengths])
    scores = exact.score_ids(batch)
    monkeypatch.setattr(ranker, "native_bf16", lambda: True)
    rounded = exact.score_ids(batch)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, scores)
    torch.testing.assert_close(rounded, scores, atol=0.05 * float(scores.std()) + 1e-3, rtol=0)


def test_the_copy_follows_the_weights(exact: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training run scores its validation split between steps."""
    monkeypatch.setattr(ranker, "native_bf16", lambda: True)
    batch = pack([[5, 6, 7], [8, 9]])
    before = exact.score_ids(batch)
    assert torch.equal(exact.score_ids(batch), before)
    weights = dict(exact.model.named_parameters())
    with torch.no_grad():
        weights["encoder.layer.0.intermediate.dense.weight"].mul_(3.0)  # in place, as an optimiser does
    changed = exact.score_ids(batch)
    assert not torch.equal(changed, before)
    replaced = weights["encoder.layer.0.output.dense.weight"]
    replaced.data = 5.0 * replaced.data
    assert not torch.equal(exact.score_ids(batch), changed)


def test_the_copy_shares_what_it_does_not_round_and_leaves_the_model_alone(exact: Ranker) -> None:
    names = [name for name, _ in exact.model.named_modules()]
    copy = Bf16Products(exact.model)
    assert [name for name, _ in exact.model.named_modules()] == names
    assert not any(isinstance(module, Bf16Linear) for module in exact.model.modules())
    for one, other in zip(exact.model.parameters(), copy.model.parameters(), strict=True):
        assert one is other
    linear = [module for module in copy.model.encoder.modules() if isinstance(module, nn.Linear)]
    assert not linear
    assert copy.is_of(exact.model)
