"""The whole ranker in the project's kernels against PyTorch; in the interpreter where there is no GPU."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor

from pars_fast import Ranker
from pars_fast.demo.sample import load_sample
from pars_fast.fused_encoder import score_packed
from pars_fast.kernels import linear, linear_layer_norm
from pars_fast.model import Pooling, ScoreModel
from pars_fast.packaged import checkpoint_directory
from pars_fast.packed_weights import PackedWeights
from pars_fast.tokenization import PackedBatch, pack

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
IDS = [[2, 9, 30, 3], [2, 3], [2, *range(5, 60), 3], [7], [2, 40, 41, 42, 8, 9, 3]]


@pytest.fixture
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rankers score as on a GPU, in large tiles, since the interpreter's time goes by their number."""
    if not HAS_GPU:
        monkeypatch.setattr(Ranker, "uses_kernels", True)
        monkeypatch.setattr(linear, "FILLS_GPU", 1)
        monkeypatch.setattr(linear_layer_norm, "FILLS_GPU", 1)


@torch.no_grad()
def torch_scores(model: ScoreModel, batch: PackedBatch) -> Tensor:
    batch = batch.to(model.score_head.weight.device)
    return model(batch.input_ids, batch.cu_seqlens).cpu()


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def assert_as_good_as_torch(ranker: Ranker, batch: PackedBatch) -> None:
    """`ranker` is in 16 bits; the truth is PyTorch in fp32 on the same (rounded) weights."""
    expected = torch_scores(copy.deepcopy(ranker.model).float(), batch)
    by_torch = torch_scores(ranker.model, batch)
    scores = ranker.score_ids(batch).cpu()
    assert rms(scores - expected) <= 1.5 * rms(by_torch - expected)
    assert kendalltau(scores, expected).statistic >= 0.999


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_tiny_ranker_scores_as_in_torch(tiny_encoder: Path, pooling: Pooling) -> None:
    ranker = Ranker.from_encoder(tiny_encoder, pooling=pooling, max_tokens=64)
    ranker.model.to(DEVICE)
    batch = pack(IDS)
    expected = torch_scores(ranker.model, batch)
    torch.testing.assert_close(ranker.score_ids(batch).cpu(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not checkpoint_directory("default").exists(), reason="the default ranker is not there")
@pytest.mark.usefixtures("kernels_on_cpu")
def test_default_ranker_in_fp16_is_as_exact_as_torch_and_orders_the_same() -> None:
    """Eight prompts of few tokens: the interpreter takes a second for two or three tokens."""
    default = Ranker.from_pretrained(device=DEVICE)
    ranker = Ranker(default.model.half(), default.config, default.tokenizer, max_tokens=8)
    prompts = [sample.prompt for sample in load_sample()][:8]
    assert_as_good_as_torch(ranker, pack(ranker.encode(prompts)))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU: an hour in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_default_ranker_on_every_prompt_of_the_demo(dtype: torch.dtype) -> None:
    ranker = Ranker.from_pretrained(device=DEVICE)
    ranker.model.to(dtype)
    prompts = [sample.prompt for sample in load_sample()]
    batch = pack(ranker.encode(prompts))
    expected = torch_scores(copy.deepcopy(ranker.model).float(), batch)
    scores = ranker.score_ids(batch).cpu()
    assert rms(scores - expected) <= 1.5 * rms(torch_scores(ranker.model, batch) - expected)
    if dtype == torch.float16:  # what a GPU's ranker is loaded in; bf16 alone ties scores that are close
        assert kendalltau(scores, expected).statistic >= 0.999


def test_padding_of_a_bucket_changes_no_score(tiny_ranker: Ranker) -> None:
    """A graph captured for more tokens and prompts: rows of id 0 past the end, empty prompts at the end."""
    weights = PackedWeights.from_model(tiny_ranker.model.to(DEVICE))
    batch = pack(IDS).to(DEVICE)
    scores = score_packed(weights, batch.input_ids, batch.cu_seqlens, max_seqlen=57)
    ids = torch.cat([batch.input_ids, batch.input_ids.new_zeros(90)])
    cu_seqlens = torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:].expand(3)])
    padded = score_packed(weights, ids, cu_seqlens, max_seqlen=64)
    assert torch.equal(padded[: len(IDS)], scores)
    assert padded[len(IDS) :].isnan().all()


def test_a_capped_grid_gives_the_same_scores(tiny_ranker: Ranker) -> None:
    weights = PackedWeights.from_model(tiny_ranker.model.to(DEVICE))
    batch = pack(IDS).to(DEVICE)
    whole, capped = (
        score_packed(weights, batch.input_ids, batch.cu_seqlens, max_seqlen=57, max_programs=limit)
        for limit in (None, 2)
    )
    assert torch.equal(whole, capped)


def test_an_empty_batch_is_refused(tiny_ranker: Ranker) -> None:
    weights = PackedWeights.from_model(tiny_ranker.model)
    empty = torch.zeros(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="an empty batch cannot be scored"):
        score_packed(weights, empty, torch.zeros(2, dtype=torch.int32), max_seqlen=1)


class TestRankerOnKernels:
    @pytest.fixture(autouse=True)
    def on_kernels(self, kernels_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object) -> Tensor:
            raise AssertionError("PyTorch's forward was called")

        monkeypatch.setattr(ScoreModel, "forward", refuse)

    def test_nothing_is_computed_by_torch(self, tiny_ranker: Ranker) -> None:
        tiny_ranker.model.to(DEVICE)
        assert tiny_ranker.score(["yes", "write a story"]).isfinite().all()

    def test_weights_are_packed_once(self, tiny_ranker: Ranker) -> None:
        tiny_ranker.model.to(DEVICE)
        tiny_ranker.score(["yes"])
        packed = tiny_ranker.packed_weights()
        tiny_ranker.score(["no"])
        assert tiny_ranker.packed_weights() is packed

    def test_nothing_is_held_twice(self, tiny_ranker: Ranker) -> None:
        tiny_ranker.model.to(DEVICE)
        tiny_ranker.score(["yes"])
        parameters = list(tiny_ranker.model.parameters())
        packed = tiny_ranker.packed_weights()
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
        unused_token_types = parameters[0].new_empty(1, packed.hidden_size)  # of the two, type 1
        assert sum(storages.values()) == packed.num_bytes() + unused_token_types.nbytes

    @pytest.mark.parametrize("change", ["in place", "moved", "fewer layers"])
    def test_changed_weights_are_seen(self, tiny_ranker: Ranker, change: str) -> None:
        tiny_ranker.model.to(DEVICE)
        before = tiny_ranker.score(["yes"])
        changes: dict[str, Callable[[], object]] = {
            "in place": lambda: [p.mul_(1.5) for p in tiny_ranker.model.parameters()],
            "moved": lambda: tiny_ranker.model.half(),
            "fewer layers": lambda: tiny_ranker.keep_layers(1),
        }
        with torch.no_grad():
            changes[change]()
        after = tiny_ranker.score(["yes"])
        assert after != before
        fresh = Ranker(
            copy.deepcopy(tiny_ranker.model), tiny_ranker.config, tiny_ranker.tokenizer, max_tokens=32
        )
        assert torch.equal(after, fresh.score(["yes"]))

    def test_the_packed_model_still_trains_and_saves(self, tiny_ranker: Ranker, tmp_path: Path) -> None:
        tiny_ranker.model.to(DEVICE)
        before = tiny_ranker.score(["yes"])
        tiny_ranker.save_pretrained(tmp_path / "ranker")
        loaded = Ranker.from_pretrained(tmp_path / "ranker", device=DEVICE)
        torch.testing.assert_close(loaded.score(["yes"]), before, atol=5e-3, rtol=1e-2)
        query = tiny_ranker.model.encoder.layer[1].get_submodule("attention.self.query")
        assert isinstance(query, torch.nn.Linear)
        query(torch.ones(1, 32, device=DEVICE)).sum().backward()
        assert query.weight.grad is not None


def test_another_activation_stays_in_torch(tiny_ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranker, "device", torch.device("cuda"))
    assert tiny_ranker.uses_kernels
    tiny_ranker.config.hidden_act = "relu"
    assert not tiny_ranker.uses_kernels
    with pytest.raises(ValueError, match="the kernels compute 'gelu', the model wants 'relu'"):
        PackedWeights.from_model(tiny_ranker.model)
