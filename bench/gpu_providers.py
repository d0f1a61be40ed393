"""Who scores prompts on a GPU: a ranker and its prompts' ids, in; a call that gives the scores, out.

All in the ranker's dtype (fp16), from ids that are on the GPU to scores that stay there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from bench.cpu_providers import pad
from bench.onnx_export import PaddedRanker
from bench.timers import Call
from pars_fast.gpu_forward import GpuForward
from pars_fast.packed_weights import PackedWeights
from pars_fast.ranker import Ranker
from pars_fast.tokenization import PackedBatch, pack

Ids = Sequence[Sequence[int]]
BUCKETS = (16, 32, 64, 96, 128, 256, 512)  # tokens


def pars_fast(ranker: Ranker, ids: Ids, *, max_programs: int | None = None) -> Call:
    """As the runtime scores: one CUDA graph of the kernels that suit the batch."""
    batch, longest = pack(ids).to(ranker.device), max(map(len, ids))
    forward = GpuForward(ranker.packed_weights(), max_seqlen=longest, max_programs=max_programs)
    return capture(lambda: forward(batch.input_ids, batch.cu_seqlens, longest))


def hf_eager(ranker: Ranker, ids: Ids) -> Call:
    """One batch padded to its longest prompt, as `pip install transformers` gives it."""
    model = PaddedRanker(ranker).eval()
    padded, mask = (tensor.to(ranker.device) for tensor in pad(ids))
    return lambda: _without_grad(model, padded, mask)


def torch_compile_bucketed(ranker: Ranker, ids: Ids) -> Call:
    """`max-autotune`, which captures CUDA graphs, on prompts bucketed by length."""
    torch.compiler.reset()
    model = torch.compile(PaddedRanker(ranker).eval(), mode="max-autotune", dynamic=False)
    batches = [
        (padded.to(ranker.device), mask.to(ranker.device))
        for padded, mask in map(_pad_to_bucket, buckets(ids))
    ]

    def call() -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        # A graph's output is overwritten by its next replay; cloned, as a caller would have to.
        return [_without_grad(model, padded, mask).clone() for padded, mask in batches]

    for _ in range(3):  # compile, capture, replay
        call()
    return call


def cublas_varlen_sdpa(ranker: Ranker, ids: Ids) -> Call:
    """Unpadded: cuBLAS and PyTorch's FlashAttention of variable length, in one CUDA graph."""
    weights = PackedWeights.from_model(ranker.model)
    batch = pack(ids).to(ranker.device)
    longest = max(map(len, ids))
    positions = Positions.of(ids, ranker.device)
    return capture(lambda: varlen_scores(weights, batch, positions, longest))


PROVIDERS: dict[str, Callable[[Ranker, Ids], Call]] = {
    provider.__name__: provider
    for provider in (hf_eager, torch_compile_bucketed, cublas_varlen_sdpa, pars_fast)
}


def buckets(ids: Ids) -> list[list[Sequence[int]]]:
    """Prompts by the smallest of BUCKETS that holds them; empty buckets left out.

    Raises: ValueError: if a prompt is longer than the largest.
    """
    if max(map(len, ids)) > BUCKETS[-1]:
        raise ValueError(f"prompts must have at most {BUCKETS[-1]} tokens, got {max(map(len, ids))}")
    bounds = zip((0, *BUCKETS), BUCKETS, strict=False)
    filled = [[prompt for prompt in ids if low < len(prompt) <= high] for low, high in bounds]
    return [prompts for prompts in filled if prompts]


@dataclass(frozen=True, slots=True)
class Positions:
    """Where each of T packed tokens stands: `in_prompt` (T,), and `prompt` (T,), both int64."""

    in_prompt: Tensor
    prompt: Tensor

    @classmethod
    def of(cls, ids: Ids, device: torch.device) -> "Positions":
        in_prompt = torch.cat([torch.arange(len(prompt)) for prompt in ids])
        prompt = torch.cat([torch.full((len(prompt),), i) for i, prompt in enumerate(ids)])
        return cls(in_prompt.to(device), prompt.to(device))


def varlen_scores(
    weights: PackedWeights, batch: PackedBatch, positions: Positions, max_seqlen: int
) -> Tensor:
    """The ranker in PyTorch's own ops on a packed batch: (B,) scores. Nothing in it waits for the GPU."""
    H = weights.hidden_size

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (H,), weight, bias, weights.norm_eps)

    hidden = norm(
        weights.word_embedding[batch.input_ids]
        + weights.position_embedding[positions.in_prompt]
        + weights.token_type_embedding,
        weights.embedding_norm_weight,
        weights.embedding_norm_bias,
    )
    for i in range(weights.num_layers):
        qkv = F.linear(hidden, weights.qkv_weight[i], weights.qkv_bias[i])
        context = _varlen_attention(qkv, weights.num_heads, batch.cu_seqlens, max_seqlen)
        attended = F.linear(context, weights.attention_out_weight[i], weights.attention_out_bias[i])
        hidden = norm(hidden + attended, weights.attention_norm_weight[i], weights.attention_norm_bias[i])
        inner = F.gelu(F.linear(hidden, weights.up_weight[i], weights.up_bias[i]))
        down = F.linear(inner, weights.down_weight[i], weights.down_bias[i])
        hidden = norm(hidden + down, weights.output_norm_weight[i], weights.output_norm_bias[i])
    if weights.pooling == "cls":
        pooled = hidden[batch.cu_seqlens[:-1].long()]
    else:
        sums = torch.zeros(len(batch), H, device=hidden.device).index_add(0, positions.prompt, hidden.float())
        pooled = (sums / batch.cu_seqlens.diff()[:, None]).to(hidden.dtype)
    return pooled @ weights.head_weight + weights.head_bias


def capture(call: Callable[[], Tensor]) -> Call:
    """`call` as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _varlen_attention(qkv: Tensor, num_heads: int, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.view(len(qkv), 3, num_heads, -1).unbind(dim=1)
    context = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    assert isinstance(context, Tensor)  # nothing beside it was asked for
    return context.reshape(len(qkv), -1)


def _pad_to_bucket(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, ids))
    width = next(bucket for bucket in BUCKETS if bucket >= longest) - longest
    padded, mask = pad(ids)
    return F.pad(padded, (0, width)), F.pad(mask, (0, width))


@torch.inference_mode()
def _without_grad(model: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    return model(ids, mask)
