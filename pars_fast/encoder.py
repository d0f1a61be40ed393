"""BERT encoder over a packed batch: prompts lie end to end, nothing is padded.

Parameter names are those of `transformers.BertModel`, so any BERT-family checkpoint (MiniLM, BERT, BGE)
loads as it is and a saved one opens in transformers. Source: Devlin et al. 2019 (arXiv 1810.04805);
transformers, models/bert/modeling_bert.py.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import BertConfig
from transformers.activations import ACT2FN


class Embeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        embedded = (
            self.word_embeddings(input_ids)
            + self.position_embeddings(position_ids)
            + self.token_type_embeddings.weight[0]
        )
        return self.dropout(self.LayerNorm(embedded))


class SelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        """(T, H) -> (T, H); a token attends to the tokens of its own prompt only."""
        heads = (
            projection(hidden).view(len(hidden), self.num_heads, -1).transpose(0, 1).split(lengths, dim=1)
            for projection in (self.query, self.key, self.value)
        )
        dropout_p = self.dropout_p if self.training else 0.0
        context = [
            F.scaled_dot_product_attention(q[None], k[None], v[None], dropout_p=dropout_p)[0]
            for q, k, v in zip(*heads, strict=True)
        ]
        return torch.cat(context, dim=1).transpose(0, 1).reshape(hidden.shape)


class ResidualOutput(nn.Module):
    """LayerNorm(residual + dense(x)), which closes both halves of a layer."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        return self.output(self.self(hidden, lengths), hidden)


class Intermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden))


class Layer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        hidden = self.attention(hidden, lengths)
        return self.output(self.intermediate(hidden), hidden)


class LayerStack(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class PackedBertEncoder(nn.Module):
    """Encoder of a packed batch; `config.pooler` is not built, since the score head pools."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = LayerStack(config)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Hidden states of the last layer.

        Args:
            input_ids: (T,) int32, the prompts' token ids end to end.
            cu_seqlens: (B + 1,) int32; prompt i owns input_ids[cu_seqlens[i]:cu_seqlens[i + 1]].
        Returns: (T, H) in the dtype of the weights.
        """
        lengths = cu_seqlens.diff()
        starts = cu_seqlens[:-1].repeat_interleave(lengths, output_size=len(input_ids))
        position_ids = torch.arange(len(input_ids), device=input_ids.device) - starts
        hidden = self.embeddings(input_ids, position_ids)
        for layer in self.encoder.layer:
            hidden = layer(hidden, lengths.tolist())
        return hidden
