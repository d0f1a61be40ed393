"""Small-batch score against float64 and against PyTorch in the same dtype, on sizes that fit no block.

In the interpreter the grid is one program: it runs programs one after the other, so a second one would never
arrive at the barrier that the first waits at. What many programs do at it only a GPU can show.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pars_fast.encoder_config import EncoderConfig
from pars_fast.kernels import small_batch_score as module
from pars_fast.kernels.small_batch_score import (
    MAX_PROMPTS,
    MAX_SEQLEN,
    SmallBatchWorkspace,
    launch_config,
    small_batch_score,
    small_batch_score_reference,
)
from pars_fast.model import Pooling, ScoreModel
from pars_fast.packed_weights import PackedWeights

VOCAB_SIZE = 53
DTYPES = [torch.float32, torch.float16]
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
FEW_ROWS = {"WIDE_M": 16, "WIDE_N": 16, "NARROW_M": 16, "NARROW_N": 32, "BLOCK_Q": 16, "BLOCK_S": 32}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_weights(
    hidden_size: int,
    num_heads: int,
    inner: int,
    num_layers: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    pooling: Pooling = "mean",
    max_positions: int = 130,
) -> tuple[ScoreModel, PackedWeights]:
    """Random weights that leave no term small: norms, biases and logits all matter to the score."""
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=VOCAB_SIZE, hidden_size=hidden_size, num_hidden_layers=num_layers, intermediate_size=inner,
        num_attention_heads=num_heads, max_position_embeddings=max_positions, layer_norm_eps=1e-12,
    )  # fmt: skip
    model = ScoreModel(config, pooling).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "LayerNorm.weight" in name:
            parameter.normal_(1.0, 0.3)
        elif parameter.dim() == 1 or "embeddings" in name:
            parameter.normal_(0.0, 0.5)
        else:
            parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)
    model.to(device, dtype)
    return model, PackedWeights.from_model(model)


def make_batch(lengths: list[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    input_ids = torch.randint(0, VOCAB_SIZE, (sum(lengths),), generator=generator, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return input_ids.to(device), cu_seqlens.to(device)


def nan_workspace(weights: PackedWeights, max_tokens: int) -> SmallBatchWorkspace:
    workspace = SmallBatchWorkspace.allocate(weights, max_tokens)
    for field in fields(workspace):
        if (tensor := getattr(workspace, field.name)).is_floating_point():
            tensor.fill_(torch.nan)
    return workspace


def score(weights: PackedWeights, lengths: list[int], device: torch.device, **kwargs: Any) -> Tensor:
    workspace = nan_workspace(weights, sum(lengths))
    scores = small_batch_score(
        weights, *make_batch(lengths, device), max_seqlen=max(lengths), workspace=workspace, **kwargs
    )
    assert workspace.counter.item() == 0  # ready for the next launch
    return scores


def assert_as_exact_as_pytorch(model: ScoreModel, weights: PackedWeights, lengths: list[int],
                               scores: Tensor) -> None:  # fmt: skip
    """Error against float64 at most 1.5 times PyTorch's in the same dtype, or a few roundings of a score."""
    batch = make_batch(lengths, weights.device)
    expected = small_batch_score_reference(weights, *batch)
    pytorch_error = (ScoreModel.forward(model, *batch).double() - expected).abs().max()
    floor = 4 * torch.finfo(weights.dtype).eps * expected.abs().max().clamp(min=1.0)
    assert scores.dtype == torch.float32
    assert (scores.double() - expected).abs().max() <= torch.maximum(1.5 * pytorch_error, floor)


SHAPES = [  # hidden size, heads, inner size, layers, lengths
    (64, 2, 128, 2, [1]),
    (64, 1, 100, 1, [3, 1, 17, 2, 5, 1, 9, 30]),  # 8 prompts, a head of 64, an inner size that fits no block
    (96, 3, 160, 2, [33, 7]),
    (40, 5, 72, 2, [2, 19]),  # heads of 8: less than a dot takes
    (64, 2, 128, 1, [128, 1]),
    (384, 12, 384, 1, [5]),
]


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(
    shape: tuple[int, int, int, int, list[int]], dtype: torch.dtype, device: torch.device
) -> None:
    hidden_size, num_heads, inner, num_layers, lengths = shape
    model, weights = make_weights(hidden_size, num_heads, inner, num_layers, dtype, device)
    assert_as_exact_as_pytorch(model, weights, lengths, score(weights, lengths, device))


@pytest.mark.usefixtures("nan_filled_empty")
def test_cls_pooling(device: torch.device) -> None:
    model, weights = make_weights(64, 2, 128, device=device, pooling="cls")
    assert_as_exact_as_pytorch(model, weights, [4, 18, 1], score(weights, [4, 18, 1], device))


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("lengths", [[35, 4]], ids=str)
def test_small_tiles(lengths: list[int], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of rows, queries and keys a prompt: what a grid of many programs chooses."""
    monkeypatch.setattr(module, "launch_config", lambda *args: launch_config(*args) | FEW_ROWS)
    model, weights = make_weights(64, 2, 96, 2, torch.float16, device)
    assert_as_exact_as_pytorch(model, weights, lengths, score(weights, lengths, device))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=MAX_PROMPTS))
def test_matches_reference_on_any_batch(lengths: list[int], device: torch.device) -> None:
    model, weights = make_weights(32, 2, 48, device=device)
    assert_as_exact_as_pytorch(model, weights, lengths, score(weights, lengths, device))


def test_the_reference_is_the_model() -> None:
    model, weights = make_weights(96, 3, 160, 3)
    batch = make_batch([12, 1, 7])
    torch.testing.assert_close(
        small_batch_score_reference(weights, *batch), model.double()(*batch).double(), atol=1e-6, rtol=1e-6
    )


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's 0 / 0
def test_padding_of_a_bucket_changes_nothing(device: torch.device) -> None:
    _, weights = make_weights(64, 2, 96, 2, device=device)
    input_ids, cu_seqlens = make_batch([9, 20], device)
    workspace = nan_workspace(weights, 64)
    padded_ids = torch.cat([input_ids, input_ids.new_full((35,), 2**31 - 1)])
    padded_offsets = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(3)])
    padded = small_batch_score(weights, padded_ids, padded_offsets, max_seqlen=64, workspace=workspace)
    assert padded.isnan().tolist() == [False, False, True, True, True]
    assert workspace.x[29:].isnan().all()  # rows past the last prompt are not even computed
    expected = small_batch_score(weights, input_ids, cu_seqlens, max_seqlen=20, workspace=workspace)
    torch.testing.assert_close(padded[:2], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_workspace_serves_one_batch_after_another(device: torch.device) -> None:
    """Larger, smaller and partly empty batches in between leave nothing behind."""
    _, weights = make_weights(32, 2, 48, device=device)
    workspace = nan_workspace(weights, 60)

    def run(lengths: list[int]) -> Tensor:
        return small_batch_score(weights, *make_batch(lengths, device), max_seqlen=60, workspace=workspace)

    first = run([20, 3])
    for lengths in ([60], [1, 0, 2]):
        run(lengths)
    assert torch.equal(run([20, 3]), first)


def test_ids_out_of_range_count_as_the_nearest_in_range(device: torch.device) -> None:
    _, weights = make_weights(32, 2, 48, device=device)
    workspace = nan_workspace(weights, 4)
    offsets = torch.tensor([0, 4], dtype=torch.int32, device=device)
    wild, near = (
        small_batch_score(
            weights, torch.tensor(ids, dtype=torch.int32, device=device), offsets,
            max_seqlen=4, workspace=workspace,
        )
        for ids in ([-1, 3, 2**31 - 1, VOCAB_SIZE], [0, 3, VOCAB_SIZE - 1, VOCAB_SIZE - 1])
    )  # fmt: skip
    assert torch.equal(wild, near)


def test_large_batches_have_large_tiles_and_small_ones_many() -> None:
    sizes = (384, 1536, torch.bfloat16, 132)
    one, eight = launch_config(128, *sizes), launch_config(1024, *sizes)
    assert (eight["WIDE_M"], eight["WIDE_N"]) == (64, 64)
    assert one["WIDE_M"] * one["WIDE_N"] < 64 * 64
    assert -(-128 // one["NARROW_M"]) * -(-384 // one["NARROW_N"]) >= 88  # two thirds of the programs
    assert launch_config(1024, *sizes[:-1], 8)["NARROW_N"] == 64  # a capped grid


def test_workspace_counts_its_bytes() -> None:
    _, weights = make_weights(64, 2, 128, dtype=torch.float16)
    assert SmallBatchWorkspace.allocate(weights, 10).num_bytes() == 10 * (6 * 64 + 128) * 2 + 4
    for max_tokens in (0, MAX_PROMPTS * MAX_SEQLEN + 1):
        with pytest.raises(ValueError, match=f"max_tokens must be 1 to 4096, got {max_tokens}"):
            SmallBatchWorkspace.allocate(weights, max_tokens)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "ids dtype": ({"input_ids": torch.zeros(4)}, r"input_ids must be .*int32, got \(4,\) torch.float32"),
    "ids shape": ({"input_ids": torch.zeros(2, 2).int()}, r"input_ids must be one-dim.*got \(2, 2\)"),
    "ids stride": ({"input_ids": torch.zeros(8).int()[::2]}, "input_ids must be .*contiguous"),
    "offsets dtype": ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens must be .*got .* torch.int64"),
    "device": ({"input_ids": torch.zeros(4, device="meta").int()}, "input_ids must lie on cpu .*got meta"),
    "no token": ({"input_ids": torch.zeros(0).int()}, "an empty batch cannot be scored: 0 tokens, 1 prompts"),
    "no prompt": ({"cu_seqlens": torch.zeros(1).int()}, "empty batch .*: 4 tokens, 0 prompts"),
    "prompts": ({"cu_seqlens": torch.zeros(10).int()}, "a small batch is at most 8 prompts, got 9"),
    "max_seqlen": ({"max_seqlen": 0}, "max_seqlen must be 1 to 130, got 0"),
    "positions": ({"max_seqlen": 131}, "max_seqlen must be 1 to 130, got 131"),
    "room": ({"input_ids": torch.zeros(5).int()}, "workspace has room for 4 tokens, got 5"),
    "programs": ({"num_programs": 0}, "num_programs must be 1 to 1, got 0"),
    "interpreter": ({"num_programs": 2}, "num_programs must be 1 to 1, got 2"),
}


def valid_arguments() -> dict[str, Any]:
    _, weights = make_weights(32, 2, 48)
    return {
        "weights": weights, "input_ids": torch.zeros(4, dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "max_seqlen": 4,
        "workspace": SmallBatchWorkspace.allocate(weights, 4),
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="names the CPU's limits")
@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong(case: str) -> None:
    change, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        small_batch_score(**(valid_arguments() | change))


def test_weights_and_workspace_have_to_match() -> None:
    arguments = valid_arguments()
    other = SmallBatchWorkspace.allocate(make_weights(32, 2, 64)[1], 4)
    with pytest.raises(ValueError, match=r"of these weights: hidden size 32, inner size 48.*got 32, 64"):
        small_batch_score(**(arguments | {"workspace": other}))
    doubles = replace(arguments["weights"], word_embedding=arguments["weights"].word_embedding.double())
    with pytest.raises(ValueError, match="weights must be float16, bfloat16 or float32, got"):
        small_batch_score(**(arguments | {"weights": doubles}))


# What needs many programs, bf16 or a graph.
GPU_LENGTHS = [[1], [128], [17, 128, 5], [128, 1, 77, 128, 64, 3, 128, 100]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", GPU_LENGTHS, ids=str)
@pytest.mark.parametrize("num_programs", [1, 7, None])
@pytest.mark.parametrize("_", [pytest.param(None, marks=needs_gpu, id="gpu")])
def test_any_number_of_programs(
    dtype: torch.dtype, lengths: list[int], num_programs: int | None, _: None
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model, weights = make_weights(384, 12, 1536, 6, dtype, device)
    assert_as_exact_as_pytorch(
        model, weights, lengths, score(weights, lengths, device, num_programs=num_programs)
    )


@pytest.mark.parametrize("_", [pytest.param(None, marks=needs_gpu, id="gpu")])
def test_the_same_bits_a_thousand_times_launched_and_replayed(_: None) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    _model, weights = make_weights(384, 12, 1536, 6, torch.bfloat16, device)
    batch, workspace = make_batch([128, 33], device), nan_workspace(weights, 161)

    def launch() -> Tensor:
        return small_batch_score(weights, *batch, max_seqlen=128, workspace=workspace)

    first = launch()
    assert all(torch.equal(launch(), first) for _repeat in range(1000))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        replayed = launch()
    for _repeat in range(1000):
        replayed.fill_(torch.nan)
        graph.replay()
        assert torch.equal(replayed, first)
