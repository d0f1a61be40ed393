"""The ranker's network: packed BERT encoder, pooling, and a linear score head.

Source: PARS (arXiv 2510.03243), section on the predictor: pooled [CLS] and Linear(H, 1). Mean pooling:
Reimers & Gurevych 2019 (arXiv 1908.10084), section 3.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from pars_fast.encoder import PackedBertEncoder, SelfAttention
from pars_fast.encoder_config import EncoderConfig

Pooling = Literal["cls", "mean"]


class ScoreModel(PackedBertEncoder):
    """Scores packed prompts; a larger score means a longer expected answer. Scores have no unit.

    In PyTorch alone: for training, for the CPU, and as the reference of `fused_encoder.score_packed`, which
    scores on a GPU.
    """

    def __init__(self, config: EncoderConfig, pooling: Pooling) -> None:
        super().__init__(config)
        self.pooling = pooling
        self.score_head = nn.Linear(config.hidden_size, 1)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(T,) int32 ids and (B + 1,) int32 offsets -> (B,) float32 scores."""
        pooled = self.embed(input_ids, cu_seqlens)
        # A bf16 of 5 is one of 4.97, 5 and 5.03: while training, too, that is no way to order prompts.
        with torch.autocast(pooled.device.type, enabled=False):
            return self.score_head(pooled.to(self.score_head.weight.dtype))[:, 0].float()

    def embed(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(T,) int32 ids and (B + 1,) int32 offsets -> (B, H): the last hidden state of each prompt's first
        token, or the mean over its tokens."""
        if self.pooling == "cls":
            return self.hidden_states(input_ids, cu_seqlens, first_tokens=True)
        hidden = self.hidden_states(input_ids, cu_seqlens)
        return torch.segment_reduce(hidden, "mean", lengths=cu_seqlens.diff().long(), axis=0)

    def set_dropout(self, probability: float) -> None:
        """Dropout of hidden states and attention while training."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability
            elif isinstance(module, SelfAttention):
                module.dropout_p = probability
