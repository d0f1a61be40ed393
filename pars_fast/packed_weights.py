"""A ranker's weights as the kernels read them: one tensor a role, layers stacked, query, key, value joined.

Stacked, a kernel that walks all layers finds the next one by an offset, and one pointer a role fits its
argument list; joined, the three projections of a layer are one matrix product.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pars_fast.model import Pooling, ScoreModel

ACTIVATION = "gelu"  # the exact one, by erf: what BERT, MiniLM and BGE are trained with


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """L layers, hidden size H, inner size I, vocabulary V, P positions; contiguous, one dtype and device.

    Matrices are (out_features, in_features), as `torch.nn.Linear` has them.
    """

    word_embedding: Tensor  # (V, H)
    position_embedding: Tensor  # (P, H)
    token_type_embedding: Tensor  # (H,), of type 0
    embedding_norm_weight: Tensor  # (H,)
    embedding_norm_bias: Tensor  # (H,)
    qkv_weight: Tensor  # (L, 3 H, H): query, key, value
    qkv_bias: Tensor  # (L, 3 H)
    attention_out_weight: Tensor  # (L, H, H)
    attention_out_bias: Tensor  # (L, H)
    attention_norm_weight: Tensor  # (L, H)
    attention_norm_bias: Tensor  # (L, H)
    up_weight: Tensor  # (L, I, H)
    up_bias: Tensor  # (L, I)
    down_weight: Tensor  # (L, H, I)
    down_bias: Tensor  # (L, H)
    output_norm_weight: Tensor  # (L, H)
    output_norm_bias: Tensor  # (L, H)
    head_weight: Tensor  # (H,)
    head_bias: Tensor  # (1,)
    num_heads: int
    norm_eps: float
    pooling: Pooling

    @classmethod
    def from_model(cls, model: ScoreModel) -> "PackedWeights":
        """Copy a model's weights, in its dtype and on its device.

        Raises: ValueError: if its activation is not the exact GELU.
        """
        if model.config.hidden_act != ACTIVATION:
            raise ValueError(
                f"the kernels compute {ACTIVATION!r}, the model wants {model.config.hidden_act!r}"
            )
        embeddings, layers = model.embeddings, list(model.encoder.layer)

        def stack(role: Any) -> Tensor:
            return torch.stack([role(layer) for layer in layers]).detach().contiguous()

        def joined(name: str) -> Tensor:
            projections = ("query", "key", "value")
            return stack(
                lambda layer: torch.cat(
                    [getattr(getattr(layer.attention.self, p), name) for p in projections]
                )
            )

        return cls(
            word_embedding=embeddings.word_embeddings.weight.detach(),
            position_embedding=embeddings.position_embeddings.weight.detach(),
            token_type_embedding=embeddings.token_type_embeddings.weight[0].detach().clone(),
            embedding_norm_weight=embeddings.LayerNorm.weight.detach(),
            embedding_norm_bias=embeddings.LayerNorm.bias.detach(),
            qkv_weight=joined("weight"),
            qkv_bias=joined("bias"),
            attention_out_weight=stack(lambda layer: layer.attention.output.dense.weight),
            attention_out_bias=stack(lambda layer: layer.attention.output.dense.bias),
            attention_norm_weight=stack(lambda layer: layer.attention.output.LayerNorm.weight),
            attention_norm_bias=stack(lambda layer: layer.attention.output.LayerNorm.bias),
            up_weight=stack(lambda layer: layer.intermediate.dense.weight),
            up_bias=stack(lambda layer: layer.intermediate.dense.bias),
            down_weight=stack(lambda layer: layer.output.dense.weight),
            down_bias=stack(lambda layer: layer.output.dense.bias),
            output_norm_weight=stack(lambda layer: layer.output.LayerNorm.weight),
            output_norm_bias=stack(lambda layer: layer.output.LayerNorm.bias),
            head_weight=model.score_head.weight[0].detach().clone(),
            head_bias=model.score_head.bias.detach(),
            num_heads=model.config.num_attention_heads,
            norm_eps=model.config.layer_norm_eps,
            pooling=model.pooling,
        )

    @property
    def num_layers(self) -> int:
        return len(self.qkv_weight)

    @property
    def hidden_size(self) -> int:
        return self.word_embedding.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.up_weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.word_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embedding.dtype

    def num_bytes(self) -> int:
        """Memory of all tensors; the embeddings share it with the model they came from."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
