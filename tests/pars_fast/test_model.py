"""The ranker's network."""

from pathlib import Path

import torch

from pars_fast import Ranker
from pars_fast.tokenization import pack


def test_under_autocast_scores_are_not_rounded(tiny_encoder: Path) -> None:
    """Training validates so: scores near 5 that are rounded to bf16 tie with their neighbours."""
    model = Ranker.from_encoder(tiny_encoder, pooling="mean", max_tokens=32).model
    torch.nn.init.constant_(model.score_head.bias, 5.0)
    batch = pack([[2, 5 + i, 6 + i, 3] for i in range(20)])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        scores = model(batch.input_ids, batch.cu_seqlens)
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16()).sum() > 15
