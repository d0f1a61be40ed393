"""A ranker's weights as the kernels read them: one tensor a role, layers stacked, query, key, value joined.

Stacked, a kernel that walks all layers finds the next one by an offset, and one pointer a role fits its
argument list; joined, the three projections of a layer are one matrix product.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from pars_fast.model import Pooling, ScoreModel

ACTIVATION = "gelu"  # the exact one, by erf: what BERT, MiniLM and BGE are trained with
PROJECTIONS = ("query", "key", "value")
# A layer's parameter behind each stacked tensor; query, key and value apart.
LAYER_PARAMETERS = {
    "attention_out_weight": "attention.output.dense.weight",
    "attention_out_bias": "attention.output.dense.bias",
    "attention_norm_weight": "attention.output.LayerNorm.weight",
    "attention_norm_bias": "attention.output.LayerNorm.bias",
    "up_weight": "intermediate.dense.weight",
    "up_bias": "intermediate.dense.bias",
    "down_weight": "output.dense.weight",
    "down_bias": "output.dense.bias",
    "output_norm_weight": "output.LayerNorm.weight",
    "output_norm_bias": "output.LayerNorm.bias",
}


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
        """Pack a model's weights, in its dtype and on its device: layers copied, embeddings and head shared.

        Raises: ValueError: if its activation is not the exact GELU.
        """
        if model.config.hidden_act != ACTIVATION:
            raise ValueError(
                f"the kernels compute {ACTIVATION!r}, the model wants {model.config.hidden_act!r}"
            )
        embeddings, layers = model.embeddings, list(model.encoder.layer)

        def joined(layer: nn.Module, name: str) -> Tensor:
            return torch.cat([layer.get_parameter(f"attention.self.{p}.{name}") for p in PROJECTIONS])

        stacked: dict[str, Any] = {
            name: torch.stack([layer.get_parameter(path) for layer in layers]).detach()
            for name, path in LAYER_PARAMETERS.items()
        }
        return cls(
            word_embedding=embeddings.word_embeddings.weight.detach(),
            position_embedding=embeddings.position_embeddings.weight.detach(),
            token_type_embedding=embeddings.token_type_embeddings.weight[0].detach(),
            embedding_norm_weight=embeddings.LayerNorm.weight.detach(),
            embedding_norm_bias=embeddings.LayerNorm.bias.detach(),
            qkv_weight=torch.stack([joined(layer, "weight") for layer in layers]).detach(),
            qkv_bias=torch.stack([joined(layer, "bias") for layer in layers]).detach(),
            head_weight=model.score_head.weight[0].detach(),
            head_bias=model.score_head.bias.detach(),
            num_heads=model.config.num_attention_heads,
            norm_eps=model.config.layer_norm_eps,
            pooling=model.pooling,
            **stacked,
        )

    @classmethod
    def sharing(cls, model: ScoreModel) -> "PackedWeights":
        """Pack a model and make its layers' parameters views of the pack: nothing is held twice, and training
        in place reaches both.

        Raises: ValueError: as `from_model`.
        """
        packed = cls.from_model(model)
        for index, layer in enumerate(model.encoder.layer):
            for name, path in LAYER_PARAMETERS.items():
                layer.get_parameter(path).data = getattr(packed, name)[index]
            for part, projection in enumerate(PROJECTIONS):
                rows = slice(part * packed.hidden_size, (part + 1) * packed.hidden_size)
                linear = layer.get_submodule(f"attention.self.{projection}")
                linear.weight.data = packed.qkv_weight[index, rows]
                linear.bias.data = packed.qkv_bias[index, rows]
        return packed

    def is_shared_with(self, model: ScoreModel) -> bool:
        """Whether this is still the model's memory: not once it was moved, cast or cut to fewer layers."""
        layers = model.encoder.layer
        query = layers[0].get_parameter("attention.self.query.weight")
        return (
            len(layers) == self.num_layers
            and query.data_ptr() == self.qkv_weight.data_ptr()
            and model.embeddings.word_embeddings.weight.data_ptr() == self.word_embedding.data_ptr()
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
        """Memory of all tensors, shared with the model or not."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
