"""The shape of a BERT encoder: what this project reads of a `config.json`.

Not `transformers.BertConfig`, which takes seconds of a core to import (its documentation pulls in all of text
generation) at every start of a ranker's process. Names and defaults are the same, so either reads what the
other wrote.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(slots=True)
class EncoderConfig:
    """Defaults are those of bert-base.

    Raises: ValueError: if a value is of another type or out of range; names it.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            kind: Any = field.type
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")
            if kind is int and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
            if kind is float and not 0 <= value < 1:
                raise ValueError(f"{field.name} must be in [0, 1), got {value}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide {self.hidden_size}")

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> "EncoderConfig":
        """From the content of a `config.json`, of which what is not an encoder's shape is passed over."""
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})
