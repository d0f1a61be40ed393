"""A ranker's forward pass on a GPU, by the kernel that suits the batch, and its CUDA graphs.

Up to MAX_PROMPTS prompts go through one persistent launch, more of them layer by layer. That the one launch
wins there is by design (no launch latency, weights read ahead) and not measured yet.
"""

import torch
from torch import Tensor

from pars_fast.fused_encoder import score_packed
from pars_fast.graphed import GraphedScorer, power_of_two_buckets
from pars_fast.kernels.publish_score import ScoreDestination
from pars_fast.kernels.small_batch_score import MAX_PROMPTS, SmallBatchWorkspace, small_batch_score
from pars_fast.packed_weights import PackedWeights
from pars_fast.ranker import Ranker

MIN_BATCH_TOKENS = 256  # more than MAX_PROMPTS prompts are seldom fewer


class GpuForward:
    """`(input_ids, cu_seqlens, max_seqlen) -> scores` of one ranker, one call at a time.

    Args:
        weights: on the GPU.
        max_seqlen: tokens of the longest prompt.
        max_programs: at most so many SMs at a time, to leave the rest to what runs beside it; None: all.
        destination: the scores go to these slots as well, from the kernel that makes them.
    """

    def __init__(
        self,
        weights: PackedWeights,
        *,
        max_seqlen: int,
        max_programs: int | None = None,
        destination: ScoreDestination | None = None,
    ) -> None:
        self._weights, self._destination = weights, destination
        self._max_programs = max_programs
        if max_programs is not None and weights.device.type == "cuda":  # a barrier needs all of them at once
            sms = torch.cuda.get_device_properties(weights.device).multi_processor_count
            self._max_programs = min(max_programs, sms)
        self._workspace = SmallBatchWorkspace.allocate(weights, MAX_PROMPTS * max_seqlen)

    def __call__(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Score a packed batch, without waiting for it.

        Args:
            input_ids: (T,) int32 on the GPU; ids past the last offset are padding.
            cu_seqlens: (B + 1,) int32 on the GPU; prompts without tokens may stand at the end.
            max_seqlen: no prompt of the batch has more tokens.
        Returns: (B,) float32, no unit; NaN for a prompt without tokens.
        """
        if len(cu_seqlens) - 1 > MAX_PROMPTS or len(input_ids) > self._workspace.max_tokens:
            return score_packed(
                self._weights,
                input_ids,
                cu_seqlens,
                max_seqlen=max_seqlen,
                max_programs=self._max_programs,
                destination=self._destination,
            )
        return small_batch_score(
            self._weights,
            input_ids,
            cu_seqlens,
            max_seqlen=max_seqlen,
            workspace=self._workspace,
            num_programs=self._max_programs,
            destination=self._destination,
        )


@torch.no_grad()  # not inference_mode: its tensors cannot be written outside it, and batches are
def graphed_scorer(
    ranker: Ranker,
    *,
    max_prompts: int,
    stream: torch.cuda.Stream,
    max_programs: int | None = None,
    destination: ScoreDestination | None = None,
) -> GraphedScorer:
    """Capture a ranker's forward pass for all batches of up to `max_prompts` prompts.

    Args:
        ranker: on the stream's device, of a kind that the kernels compute (`Ranker.uses_kernels`).
        max_prompts: of a batch, each of the ranker's window.
        stream: where it is captured and replayed.
        max_programs, destination: as `GpuForward`. Capture writes to the destination, too.
    """
    window = ranker.max_tokens
    forward = GpuForward(
        ranker.packed_weights(), max_seqlen=window, max_programs=max_programs, destination=destination
    )
    buckets = power_of_two_buckets(MAX_PROMPTS * window, MAX_PROMPTS)
    if max_prompts > MAX_PROMPTS:
        buckets += power_of_two_buckets(max_prompts * window, max_prompts, min_tokens=MIN_BATCH_TOKENS)
    return GraphedScorer(forward, buckets, max_seqlen=window, stream=stream)
