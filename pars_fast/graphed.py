"""CUDA graphs of a scoring function, one a shape bucket: a batch is replayed by the smallest that holds it.

A graph has fixed shapes and fixed addresses. A batch is therefore padded to its bucket (ids with 0, offsets
by repeating the last one, which gives prompts without tokens) and copied to where the graphs look for it.
Graphs share one memory pool: they are replayed one after the other on one stream, so a temporary of one may
lie where another's lay. Scores are kept, so each graph's have their own place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# (input_ids (T,) int32, cu_seqlens (B + 1,) int32, max_seqlen) -> (B,) float32 scores, all on one CUDA device
Forward = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The largest batch of one graph."""

    num_tokens: int
    num_prompts: int

    def holds(self, num_tokens: int, num_prompts: int) -> bool:
        return num_tokens <= self.num_tokens and num_prompts <= self.num_prompts


def power_of_two_buckets(max_tokens: int, num_prompts: int, *, min_tokens: int = 16) -> list[Bucket]:
    """Buckets of `num_prompts` prompts and twice as many tokens each, the last of `max_tokens`. Padded tokens
    are at most as many as real ones, and padded prompts cost next to nothing."""
    buckets, num_tokens = [], min_tokens
    while num_tokens < max_tokens:
        buckets.append(Bucket(num_tokens, num_prompts))
        num_tokens *= 2
    return [*buckets, Bucket(max_tokens, num_prompts)]


def smallest_bucket(buckets: Sequence[Bucket], num_tokens: int, num_prompts: int) -> Bucket:
    """The one with the fewest tokens, then prompts, that holds the batch.

    Raises: ValueError: if none does: the caller has to split the batch.
    """
    holding = [bucket for bucket in buckets if bucket.holds(num_tokens, num_prompts)]
    if not holding:
        raise ValueError(
            f"no bucket holds {num_tokens} tokens and {num_prompts} prompts; the largest are {max(buckets)}"
        )
    return min(holding)


def pad_to_bucket(
    input_ids: Tensor, cu_seqlens: Tensor, bucket: Bucket, padded_ids: Tensor, padded_offsets: Tensor
) -> None:
    """Write a batch that the bucket holds to (num_tokens,) ids and (num_prompts + 1,) offsets, in place."""
    padded_ids[: len(input_ids)] = input_ids
    padded_ids[len(input_ids) : bucket.num_tokens] = 0
    padded_offsets[: len(cu_seqlens)] = cu_seqlens
    padded_offsets[len(cu_seqlens) : bucket.num_prompts + 1] = cu_seqlens[-1]


class GraphedScorer:
    """Scores packed batches by replaying graphs, with neither launches nor allocations in between.

    Everything runs on the stream given, from one thread at a time; graphs of other streams and threads can be
    captured meanwhile, and other threads may draw random numbers (torch 2.13 keeps the generator's state of
    each capture apart; an older one makes them fail for as long as a capture takes).

    Attributes:
        bytes_reserved: what PyTorch's allocator took from the device for buffers, the graphs' pool and what
            the first run of `forward` left allocated.
        bytes_on_device: by how much the device's free memory fell, so with loaded kernels and the driver's
            part of the graphs; right only if nothing else allocates there at the time.
    """

    def __init__(
        self, forward: Forward, buckets: Sequence[Bucket], *, max_seqlen: int, stream: torch.cuda.Stream
    ) -> None:
        """Capture one graph a bucket, the largest first.

        Args:
            forward: must not synchronise, and must bear prompts without tokens and ids past the last offset.
            buckets: at least one.
            max_seqlen: tokens of the longest prompt.
            stream: on the device of the weights that `forward` uses.
        Raises: ValueError: if there is no bucket, or one is not of at least one token and prompt.
        """
        if not buckets or min(min(bucket.num_tokens, bucket.num_prompts) for bucket in buckets) < 1:
            raise ValueError(f"buckets must hold at least one token and prompt each, got {list(buckets)}")
        self._stream, self._buckets = stream, sorted(buckets, reverse=True)
        self._max_prompts = max(bucket.num_prompts for bucket in buckets)
        device = stream.device
        torch.cuda.empty_cache()  # capture does so too, and would give back memory that is not counted here
        free_before, reserved_before = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # where weights and workspaces were filled
        with torch.cuda.stream(stream):
            # Offsets and ids in one buffer, so a batch is one copy; ids start at a multiple of 16 bytes.
            self._first_id = -(-(self._max_prompts + 1) // 4) * 4
            size = self._first_id + self._buckets[0].num_tokens
            self._staging = torch.zeros(size, dtype=torch.int32, pin_memory=True)
            self._batch = torch.zeros(size, dtype=torch.int32, device=device)
            self._copied = torch.cuda.Event()
            self._pool = torch.cuda.graph_pool_handle()
            self._graphs = {bucket: self._capture(forward, bucket, max_seqlen) for bucket in self._buckets}
        stream.synchronize()
        self.bytes_reserved: int = torch.cuda.memory_reserved(device) - reserved_before
        self.bytes_on_device: int = free_before - torch.cuda.mem_get_info(device)[0]

    def _views(self, buffer: Tensor, bucket: Bucket) -> tuple[Tensor, Tensor]:
        ids = buffer[self._first_id : self._first_id + bucket.num_tokens]
        return ids, buffer[: bucket.num_prompts + 1]

    def _capture(
        self, forward: Forward, bucket: Bucket, max_seqlen: int
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph, and the scores that each replay of it writes."""
        input_ids, cu_seqlens = self._views(self._batch, bucket)
        longest = min(max_seqlen, bucket.num_tokens)
        forward(input_ids, cu_seqlens, longest)  # compiles and loads what must not be loaded under capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            scores = forward(input_ids, cu_seqlens, longest)
        return graph, scores

    def score(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Score a batch, without waiting for it.

        Args:
            input_ids: (T,) int32 on the host; prompts lie end to end.
            cu_seqlens: (B + 1,) int32 on the host.
        Returns: (B,) float32 on the device, ready in the stream's order, overwritten by the next call.
        Raises: ValueError: if no bucket holds the batch, it has no prompt, or it is not int32 on the host.
        """
        for name, tensor in (("input_ids", input_ids), ("cu_seqlens", cu_seqlens)):
            if tensor.dtype != torch.int32 or tensor.device.type != "cpu":
                raise ValueError(f"{name} must be int32 on the host, got {tensor.dtype} on {tensor.device}")
        num_prompts = len(cu_seqlens) - 1
        if num_prompts < 1:
            raise ValueError("cu_seqlens describes no prompt: an empty batch cannot be scored")
        bucket = smallest_bucket(self._buckets, len(input_ids), num_prompts)
        self._copied.synchronize()  # the copy before this one may still read the staging buffer
        pad_to_bucket(input_ids, cu_seqlens, bucket, *self._views(self._staging, bucket))
        used = self._first_id + bucket.num_tokens
        with torch.cuda.stream(self._stream):
            self._batch[:used].copy_(self._staging[:used], non_blocking=True)
            self._copied.record()
            graph, scores = self._graphs[bucket]
            graph.replay()
        return scores[:num_prompts]
