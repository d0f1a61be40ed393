"""BERT encoder over a packed batch: prompts lie end to end, nothing is padded.

Parameter names are those of `transformers.BertModel`, so any BERT-family checkpoint (MiniLM, BERT, BGE)
loads as it is and a saved one opens in transformers. Source: Devlin et al. 2019 (arXiv 1810.04805);
transformers, models/bert/modeling_bert.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pars_fast.encoder_config import EncoderConfig


class Embeddings(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
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
    def __init__(self, config: EncoderConfig) -> None:
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

    def of_first_tokens(self, first: Tensor, hidden: Tensor, lengths: list[int]) -> Tensor:
        """(B, H) first tokens, (T, H) all tokens -> (B, H), what `forward` gives for the first tokens.

        Keys and values are not computed: q . (W_k x) = (W_k' q) . x, the bias of keys shifts all scores of a
        query alike, and sum a (W_v x + b) = W_v (sum a x) + b. With one query a prompt that is far less work.
        """
        by_head = (self.num_heads, -1, self.key.in_features)
        query = self.query(first).view(len(first), self.num_heads, -1)
        query = torch.einsum("bnd,ndh->bnh", query, self.key.weight.view(by_head)) / query.shape[-1] ** 0.5
        dropout_p = self.dropout_p if self.training else 0.0
        attended = torch.stack([
            F.dropout((q @ tokens.T).softmax(-1), dropout_p) @ tokens
            for q, tokens in zip(query, hidden.split(lengths), strict=True)
        ])
        context = torch.einsum("bnh,ndh->bnd", attended, self.value.weight.view(by_head))
        return context.reshape(first.shape) + self.value.bias


class ResidualOutput(nn.Module):
    """LayerNorm(residual + dense(x)), which closes both halves of a layer."""

    def __init__(self, in_features: int, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Attention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, hidden: Tensor, lengths: list[int], first: Tensor | None) -> Tensor:
        if first is None:
            return self.output(self.self(hidden, lengths), hidden)
        return self.output(self.self.of_first_tokens(first, hidden, lengths), first)


class Intermediate(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = _activation(config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden))


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name == "gelu":
        return F.gelu
    from transformers.activations import ACT2FN  # has all others, and takes seconds to import

    activation: Callable[[Tensor], Tensor] = ACT2FN[name]
    return activation


class Layer(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden: Tensor, lengths: list[int], first: Tensor | None = None) -> Tensor:
        """(T, H) -> (T, H), or for the prompts' first tokens alone, `first` (B, H) -> (B, H)."""
        attended = self.attention(hidden, lengths, first)
        return self.output(self.intermediate(attended), attended)


class LayerStack(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class PackedBertEncoder(nn.Module):
    """Encoder of a packed batch; BERT's pooler is not built, since the score head pools."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = LayerStack(config)

    def hidden_states(
        self, input_ids: Tensor, cu_seqlens: Tensor, *, first_tokens: bool = False
    ) -> Tensor:
        """Those of the last layer.

        Args:
            input_ids: (T,) int32, the prompts' token ids end to end.
            cu_seqlens: (B + 1,) int32; prompt i owns input_ids[cu_seqlens[i]:cu_seqlens[i + 1]].
            first_tokens: only those of each prompt's first token; the last layer then computes no other row.
        Returns: (T, H), or (B, H), in the dtype of the weights.
        """
        lengths = cu_seqlens.diff()
        starts = cu_seqlens[:-1].repeat_interleave(lengths, output_size=len(input_ids))
        position_ids = torch.arange(len(input_ids), device=input_ids.device) - starts
        hidden = self.embeddings(input_ids, position_ids)
        *layers, last = self.encoder.layer
        for layer in layers:
            hidden = layer(hidden, lengths.tolist())
        return last(hidden, lengths.tolist(), hidden[cu_seqlens[:-1]] if first_tokens else None)
