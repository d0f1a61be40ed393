"""The shape of an encoder: what transformers writes is read, and what is no shape is named."""

from dataclasses import asdict
from typing import Any

import pytest
from transformers import BertConfig

from pars_fast.encoder_config import EncoderConfig

SMALL = {"hidden_size": 96, "num_attention_heads": 6, "layer_norm_eps": 1e-5, "vocab_size": 50}


def test_defaults_are_those_of_transformers() -> None:
    theirs = BertConfig().to_dict()
    assert asdict(EncoderConfig()) == {name: theirs[name] for name in asdict(EncoderConfig())}


def test_what_transformers_writes_is_read_and_the_other_way_round() -> None:
    ours = EncoderConfig(**SMALL)  # type: ignore[arg-type]
    assert EncoderConfig.read(BertConfig(**SMALL).to_dict()) == ours
    assert EncoderConfig.read(BertConfig(**asdict(ours)).to_dict()) == ours
    assert EncoderConfig.read({"pars_fast": {}, "torch_dtype": "float16"}) == EncoderConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be of type int, got True"),
        ({"hidden_size": 96.0}, r"hidden_size must be of type int, got 96\.0"),
        ({"hidden_act": None}, "hidden_act must be of type str, got None"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps must be of type float, got 'small'"),
        ({"layer_norm_eps": float("nan")}, r"layer_norm_eps must be in \[0, 1\), got nan"),
        ({"hidden_dropout_prob": 1}, r"hidden_dropout_prob must be in \[0, 1\), got 1"),
        ({"num_attention_heads": 7}, "7 heads do not divide 768"),
    ],
    ids=str,
)
def test_what_is_no_shape_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig.read(changes)
