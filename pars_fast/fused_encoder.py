"""The ranker's forward pass on a GPU: packed ids to scores in the project's kernels alone, 3 + 5 L launches.

Two more a layer above hidden size 512 (`linear_layer_norm`). Nothing waits for the GPU, so all of it can be
captured in a CUDA graph; a graph captured for more tokens or prompts than there are gets rows past
cu_seqlens[-1] with id 0, and empty prompts at the end of cu_seqlens.
"""

from torch import Tensor

from pars_fast.kernels.attention import attention
from pars_fast.kernels.embed_layer_norm import embed_layer_norm
from pars_fast.kernels.linear import linear
from pars_fast.kernels.linear_layer_norm import linear_layer_norm
from pars_fast.kernels.pool_score import pool_score
from pars_fast.kernels.publish_score import ScoreDestination
from pars_fast.packed_weights import PackedWeights


def score_packed(
    weights: PackedWeights,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    max_programs: int | None = None,
    destination: ScoreDestination | None = None,
) -> Tensor:
    """Score packed prompts; a larger score means a longer expected answer.

    Args:
        weights: on the device of the batch.
        input_ids: (T,) int32, prompts end to end; see `embed_layer_norm` for ids outside the vocabulary.
        cu_seqlens: (B + 1,) int32; prompt i owns input_ids[cu_seqlens[i]:cu_seqlens[i + 1]].
        max_seqlen: no prompt has more tokens; on the host's word.
        max_programs: at most so many SMs at a time for the encoder, to leave the rest to what runs beside it;
            None takes the GPU. Pooling is one short program a prompt in any case.
        destination: as `pool_score`'s: the scores go to their slots as well.
    Returns: (B,) fp32, no unit; NaN for an empty prompt.
    Raises: ValueError: if a shape, dtype, layout or device does not match, or the batch is empty.
    """
    w, eps = weights, weights.norm_eps
    hidden = embed_layer_norm(
        input_ids, cu_seqlens, w.word_embedding, w.position_embedding, w.token_type_embedding,
        w.embedding_norm_weight, w.embedding_norm_bias, eps=eps, max_programs=max_programs,
    )  # fmt: skip
    for i in range(w.num_layers):
        qkv = linear(hidden, w.qkv_weight[i], w.qkv_bias[i], activation="none", max_programs=max_programs)
        context = attention(
            qkv, cu_seqlens, num_heads=w.num_heads, max_seqlen=max_seqlen, max_programs=max_programs
        )
        hidden = linear_layer_norm(
            context, w.attention_out_weight[i], w.attention_out_bias[i], hidden,
            w.attention_norm_weight[i], w.attention_norm_bias[i], eps=eps, max_programs=max_programs,
        )  # fmt: skip
        inner = linear(hidden, w.up_weight[i], w.up_bias[i], activation="gelu", max_programs=max_programs)
        hidden = linear_layer_norm(
            inner, w.down_weight[i], w.down_bias[i], hidden,
            w.output_norm_weight[i], w.output_norm_bias[i], eps=eps, max_programs=max_programs,
        )  # fmt: skip
    return pool_score(
        hidden, w.head_weight, w.head_bias, cu_seqlens, pooling=w.pooling, destination=destination
    )
