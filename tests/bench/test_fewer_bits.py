"""Rounding to fewer bits: the grid that each format leaves, and scores through rounded layers."""

import pytest
import torch
from torch import nn

from bench.fewer_bits import FORMATS, RoundedLinear, scores_of
from pars_fast.bf16_products import with_linears
from pars_fast.tokenization import pack
from tests.bench.test_suite import tiny_ranker


@pytest.mark.parametrize("form", FORMATS)
def test_rounding_is_by_row_and_changes_nothing_twice(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, generator=generator) * torch.tensor([[1e-2], [1.0], [30.0], [0.0]])
    once = FORMATS[form](x)
    torch.testing.assert_close(FORMATS[form](once), once, rtol=1e-5, atol=0)
    largest = x.abs().amax(dim=1)
    error = (once - x).abs().amax(dim=1)
    assert (error <= largest / 16).all()  # e4m3 has 3 bits behind the leading one
    if form == "int8":
        assert all(len(row.unique()) <= 255 for row in once)


def test_fewer_bits_move_the_scores_more() -> None:
    ranker = tiny_ranker("mean")
    ids = [[2, 4, 5, 6, 3], [2, 3], [2, 9, 3]]
    exact = scores_of(ranker.model, ids)
    batch = pack(ids)
    with torch.inference_mode():
        assert exact.tolist() == ranker.model(batch.input_ids, batch.cu_seqlens).double().tolist()

    def error(form: str) -> float:
        def rounded(linear: nn.Linear) -> RoundedLinear:
            return RoundedLinear(linear, FORMATS[form])

        return float(abs(scores_of(with_linears(ranker.model, rounded), ids) - exact).max())

    assert 0 < error("fp16") < error("bf16") < error("fp8_e4m3")
