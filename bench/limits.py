"""What an op cannot do without, in bytes and FLOPs: the numerator of every row's physical limit.

Lower bounds, not what any provider moves: weights are read once, activations of a fused encoder stay on
chip. The denominators, the machine's peaks, are measured in the same run (`bench_peaks.py`, `gpu_peaks.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pars_fast.encoder_config import EncoderConfig


@dataclass(frozen=True, slots=True)
class Work:
    bytes_moved: int
    flops: int


def score_work(config: EncoderConfig, lengths: Sequence[int], *, bytes_per_value: int) -> Work:
    """Scoring prompts of `lengths` tokens: BERT encoder, pooling, head.

    Per token and layer: 4 H^2 + 2 H I multiply-adds (query, key, value, output, up, down); per layer and
    prompt of S tokens 2 S^2 H of attention. Bytes: layers' weights once, an embedding row and an int32 id a
    token.
    """
    H, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    matrices = 4 * H * H + 2 * H * inner
    tokens = sum(lengths)
    multiply_adds = layers * (tokens * matrices + sum(2 * length * length * H for length in lengths))
    return Work(
        bytes_moved=layers * matrices * bytes_per_value + tokens * (H * bytes_per_value + 4),
        flops=2 * multiply_adds,
    )
