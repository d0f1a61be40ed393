"""Which kernel a batch goes to, and that both score as PyTorch does; in the interpreter without a GPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pars_fast import Ranker, gpu_forward
from pars_fast.calibration import TokenMap
from pars_fast.gpu_forward import GpuForward, graphed_scorer
from pars_fast.slot_table import SlotTable
from pars_fast.tokenization import pack

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def ranker(tiny_encoder: Path) -> Ranker:
    torch.manual_seed(1)
    ranker = Ranker.from_encoder(tiny_encoder, pooling="mean", max_tokens=32)
    ranker.model.to(DEVICE)
    return ranker


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the two paths, in the order they were taken."""
    taken: list[str] = []
    for name in ("score_packed", "small_batch_score"):
        kernel = getattr(gpu_forward, name)

        def spy(*arguments: object, name: str = name, kernel: object = kernel, **options: object) -> Tensor:
            taken.append(name)
            assert callable(kernel)
            scores = kernel(*arguments, **options)
            assert isinstance(scores, Tensor)
            return scores

        monkeypatch.setattr(gpu_forward, name, spy)
    return taken


@pytest.mark.parametrize(
    ("lengths", "path"),
    [
        ([5], "small_batch_score"),
        ([1, 32, 7, 2, 9, 3, 4, 8], "small_batch_score"),
        ([1, 32, 7, 2, 9, 3, 4, 8, 6], "score_packed"),
    ],
    ids=["1 prompt", "8 prompts", "9 prompts"],
)
def test_a_batch_goes_to_its_kernel(
    ranker: Ranker, launched: list[str], lengths: list[int], path: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = pack([torch.randint(5, 50, (n,), generator=generator).tolist() for n in lengths]).to(DEVICE)
    forward = GpuForward(ranker.packed_weights(), max_seqlen=32, max_programs=1)
    scores = forward(batch.input_ids, batch.cu_seqlens, 32)
    assert launched == [path]
    with torch.no_grad():
        expected = ranker.model(batch.input_ids, batch.cu_seqlens)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of prompts that are padding
@pytest.mark.parametrize("lengths", [[5, 1, 20], [1, 32, 7, 2, 9, 3, 4, 8, 6]], ids=["one launch", "layers"])
def test_scores_go_to_their_slots_without_a_launch_of_their_own(ranker: Ranker, lengths: list[int]) -> None:
    """As the engine does it: into a slot table, in a batch padded to its bucket. Two prompts have no slot any
    more: one never had one, one lost it while it was scored."""
    generator = torch.Generator().manual_seed(0)
    batch = pack([torch.randint(5, 50, (n,), generator=generator).tolist() for n in lengths]).to(DEVICE)
    weights = ranker.packed_weights()
    scores = GpuForward(weights, max_seqlen=32, max_programs=1)(batch.input_ids, batch.cu_seqlens, 32)
    knots = TokenMap((float(scores.min()), float(scores.max())), (10.0, 900.0))
    padded = torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:].expand(2)])
    orders, tokens = [], []
    for fused in (False, True):
        table = SlotTable(knots, capacity=32, device=DEVICE, max_order=16)
        slots, generations = map(list, zip(*(table.acquire() or (-1, 0) for _ in lengths), strict=True))
        table.insert(slots, generations, [0] * len(slots), range(len(slots)))
        generations[1] += 1
        scoring = [(-1, 0), *zip(slots[1:], generations[1:], strict=True)]
        table.upload(scoring, [50.0] * len(scoring))
        if fused:
            forward = GpuForward(weights, max_seqlen=32, max_programs=1, destination=table.destination)
            forward(batch.input_ids, padded, 32)
            tokens.append(table.destination.tokens[: len(lengths)].tolist())
        else:
            tokens.append(table.publish(scores).tolist())
        table.set_median_key(1e6)  # of the two without a key
        first = table.order(len(lengths))
        assert first is not None
        orders.append(first.tolist())
    assert orders[0] == orders[1]
    assert orders[0][-2:] == slots[:2]
    assert tokens[0] == pytest.approx(tokens[1], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="graphs are captured on an NVIDIA GPU")
def test_graphs_score_as_the_ranker_does() -> None:
    ranker = Ranker.from_pretrained(device="cuda")
    scorer = graphed_scorer(ranker, max_prompts=64, stream=torch.cuda.Stream())
    generator = torch.Generator().manual_seed(0)
    for num_prompts in (1, 8, 9, 64):
        lengths = torch.randint(3, 129, (num_prompts,), generator=generator).tolist()
        batch = pack([torch.randint(999, 20000, (n,), generator=generator).tolist() for n in lengths])
        scores = scorer.score(batch.input_ids, batch.cu_seqlens)
        torch.cuda.synchronize()
        torch.testing.assert_close(scores, ranker.score_ids(batch), atol=2e-2, rtol=2e-2)
    assert scorer.bytes_on_device <= 200 << 20  # with 45 MB of weights within the budget of 256 MB
