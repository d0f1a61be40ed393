"""The ranker as onnxruntime runs it best: exported, fused by its own optimiser, and quantised to int8.

Export of transformers' BertModel with eager attention, which `onnxruntime.transformers.optimizer` fuses into
one EmbedLayerNormalization, and an Attention, two SkipLayerNormalizations and a BiasGelu a layer. Int8:
dynamic quantisation, weights by channel; 7 bits, since AVX2 sums pairs of products in 16 bits and would
saturate.
"""

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from pars_fast.ranker import Ranker


class PaddedRanker(nn.Module):
    """The ranker's weights in transformers' model, on a padded batch."""

    def __init__(self, ranker: Ranker, attention: str = "sdpa") -> None:
        super().__init__()
        config = BertConfig(**asdict(ranker.config))
        config._attn_implementation = attention
        self.encoder = BertModel(config, add_pooling_layer=False).eval()
        weights = ranker.model.state_dict()
        self.encoder.load_state_dict({name: weights[name] for name in self.encoder.state_dict()})
        self.score_head = ranker.model.score_head
        self.encoder.to(ranker.device, self.score_head.weight.dtype)
        self.pooling = ranker.model.pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S) ids and mask -> (B,) scores."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            return self.score_head(hidden[:, 0])[:, 0]
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return self.score_head((hidden * mask).sum(dim=1) / mask.sum(dim=1))[:, 0]


def export_onnx(ranker: Ranker, folder: Path) -> tuple[Path, Path]:
    """Write `fp32.onnx` and `int8.onnx` into `folder`; their paths. Needs onnx and onnxruntime."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    exported, fp32, int8 = (folder / f"{name}.onnx" for name in ("exported", "fp32", "int8"))
    ids = torch.ones((2, 9), dtype=torch.long)
    names = ["input_ids", "attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is the old one
        torch.onnx.export(
            PaddedRanker(ranker, "eager"),
            (ids, ids),
            str(exported),
            dynamo=False,
            input_names=names,
            output_names=["scores"],
            dynamic_axes={name: {0: "batch", 1: "length"} for name in names} | {"scores": {0: "batch"}},
            opset_version=17,
        )
    config = ranker.config
    fused = optimizer.optimize_model(
        str(exported),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=1,
    )
    fused.save_model_to_file(str(fp32))
    quantize_dynamic(
        fp32,
        int8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # fused ops hide it from shape inference
    )
    return fp32, int8


def load_session(model: bytes, threads: int) -> Any:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
