"""Buckets and padding of captured graphs; capture itself where there is a GPU."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pars_fast.encoder_config import EncoderConfig
from pars_fast.graphed import (
    Bucket,
    GraphedScorer,
    pad_to_bucket,
    power_of_two_buckets,
    smallest_bucket,
)

BUCKETS = st.builds(Bucket, st.integers(1, 64), st.integers(1, 8))


def batch_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    input_ids = torch.arange(100, 100 + sum(lengths), dtype=torch.int32)
    return input_ids, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@given(buckets=st.lists(BUCKETS, min_size=1), num_tokens=st.integers(1, 64), num_prompts=st.integers(1, 8))
def test_the_smallest_bucket_that_holds_the_batch(
    buckets: list[Bucket], num_tokens: int, num_prompts: int
) -> None:
    holding = [b for b in buckets if b.num_tokens >= num_tokens and b.num_prompts >= num_prompts]
    if not holding:
        with pytest.raises(
            ValueError, match=f"no bucket holds {num_tokens} tokens and {num_prompts} prompts"
        ):
            smallest_bucket(buckets, num_tokens, num_prompts)
        return
    chosen = smallest_bucket(buckets, num_tokens, num_prompts)
    assert chosen in holding
    assert all((chosen.num_tokens, chosen.num_prompts) <= (b.num_tokens, b.num_prompts) for b in holding)


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [(1024, [16, 32, 64, 128, 256, 512, 1024]), (100, [16, 32, 64, 100]), (7, [7])],
)
def test_buckets_double_up_to_the_last(max_tokens: int, expected: list[int]) -> None:
    assert power_of_two_buckets(max_tokens, 8) == [Bucket(num_tokens, 8) for num_tokens in expected]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    room=st.tuples(st.integers(0, 20), st.integers(0, 5)),
)
def test_padding_adds_empty_prompts_and_leaves_nothing_of_the_last_batch(
    lengths: list[int], room: tuple[int, int]
) -> None:
    bucket = Bucket(sum(lengths) + room[0], len(lengths) + room[1])
    input_ids, cu_seqlens = batch_of(lengths)
    padded_ids = torch.full((bucket.num_tokens,), -7, dtype=torch.int32)
    padded_offsets = torch.full((bucket.num_prompts + 1,), -7, dtype=torch.int32)
    pad_to_bucket(input_ids, cu_seqlens, bucket, padded_ids, padded_offsets)
    assert padded_ids.tolist() == input_ids.tolist() + [0] * room[0]
    assert padded_offsets.diff().tolist() == lengths + [0] * room[1]


@pytest.mark.parametrize("buckets", [[], [Bucket(0, 8)], [Bucket(8, 8), Bucket(8, 0)]], ids=str)
def test_buckets_of_nothing_are_refused(buckets: list[Bucket]) -> None:
    no_stream: Any = None  # refused before anything is captured
    with pytest.raises(ValueError, match="buckets must hold at least one token and prompt each, got"):
        GraphedScorer(lambda *_: torch.zeros(1), buckets, max_seqlen=8, stream=no_stream)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on an NVIDIA GPU")


def minilm_scorer() -> tuple[GraphedScorer, Any]:
    from pars_fast.kernels.small_batch_score import SmallBatchWorkspace, small_batch_score
    from pars_fast.model import ScoreModel
    from pars_fast.packed_weights import PackedWeights

    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=500, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    weights = PackedWeights.from_model(ScoreModel(config, "mean").to("cuda", torch.bfloat16))
    workspace = SmallBatchWorkspace.allocate(weights, 1024)

    def forward(input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return small_batch_score(weights, input_ids, cu_seqlens, max_seqlen=max_seqlen, workspace=workspace)

    stream = torch.cuda.Stream()
    return GraphedScorer(forward, power_of_two_buckets(1024, 8), max_seqlen=128, stream=stream), forward


@pytest.mark.gpu
@gpu
def test_replays_give_what_the_launch_gives_and_allocate_nothing() -> None:
    scorer, forward = minilm_scorer()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        num_prompts = int(torch.randint(1, 9, (), generator=generator))
        input_ids, cu_seqlens = batch_of(torch.randint(1, 129, (num_prompts,), generator=generator).tolist())
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        scores = scorer.score(input_ids % 500, cu_seqlens)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        torch.cuda.synchronize()
        expected = forward((input_ids % 500).cuda(), cu_seqlens.cuda(), 128)
        torch.testing.assert_close(scores, expected, atol=2e-2, rtol=2e-2)  # other block sizes, bf16 rows


@pytest.mark.gpu
@gpu
def test_memory_is_within_the_default_rankers_budget() -> None:
    scorer, _ = minilm_scorer()
    assert 0 < scorer.bytes_reserved <= scorer.bytes_on_device <= 128 << 20


@pytest.mark.gpu
@gpu
def test_errors_of_a_batch() -> None:
    scorer, _ = minilm_scorer()
    input_ids, cu_seqlens = batch_of([4])
    with pytest.raises(ValueError, match=r"input_ids must be int32 on the host, got torch.int64"):
        scorer.score(input_ids.long(), cu_seqlens)
    with pytest.raises(ValueError, match="an empty batch cannot be scored"):
        scorer.score(input_ids, cu_seqlens[:1])
    with pytest.raises(ValueError, match="no bucket holds 1025 tokens"):
        scorer.score(*batch_of([1025]))
