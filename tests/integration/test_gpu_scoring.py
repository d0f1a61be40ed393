"""The device's order of scored requests; through Triton's interpreter where there is no GPU."""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pars_fast import Ranker
from pars_fast.calibration import TokenMap
from pars_fast.errors import KernelError
from pars_fast.graphed import GraphedScorer
from pars_fast.guards import OvertakingBudget
from pars_fast.host_index import HostIndex
from pars_fast.integration import gpu_scoring, gpu_trial
from pars_fast.integration.gpu_scoring import DeviceOrder, GpuScorer, make_gpu_scorer
from pars_fast.integration.runtime import Prompt
from pars_fast.integration.scoring import PromptScorer
from pars_fast.kernels.small_batch_score import MAX_PROMPTS
from pars_fast.policies import POLICIES, prompt_work
from pars_fast.priority_class import Entry
from pars_fast.slot_table import MAX_BATCH, SlotTable
from pars_fast.tokenization import PackedBatch, pack
from tests.host_cuda import use_host_cuda

IDENTITY = TokenMap((0.0, 2048.0), (0.0, 2048.0))
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")  # set_device wants an index
UNBOUNDED = OvertakingBudget(beta=1e9, floor_tokens=1e9)


@pytest.fixture
def table() -> SlotTable:
    return SlotTable(IDENTITY, capacity=64, device=DEVICE, max_order=64)


@pytest.fixture
def order(table: SlotTable) -> DeviceOrder:
    return DeviceOrder(table, k=64, min_waiting=1)


def add(
    table: SlotTable,
    order: DeviceOrder,
    scored: Sequence[tuple[int, float]],
    prompt_work: Sequence[float] = (),
) -> list[float]:
    """Requests whose scores are their expected tokens, by batches as large as may be."""
    tokens: list[float] = []
    for first in range(0, len(scored), MAX_BATCH):
        seqs, scores = map(list, zip(*scored[first : first + MAX_BATCH], strict=True))
        order.begin(seqs, prompt_work[first : first + MAX_BATCH])
        tokens += order.finish(seqs, table.publish(torch.tensor(scores, dtype=torch.float32, device=DEVICE)))
    return tokens


def test_order_is_by_key_then_arrival(table: SlotTable, order: DeviceOrder) -> None:
    assert add(table, order, [(0, 30.0), (1, 10.0), (2, 30.0), (3, 20.0)]) == [30.0, 10.0, 30.0, 20.0]
    assert order.first == [1, 3, 0, 2]


def test_finished_requests_leave_and_their_slots_serve_others(table: SlotTable, order: DeviceOrder) -> None:
    add(table, order, [(seq, float(seq)) for seq in range(64)])
    order.remove([0, 1, 999])
    add(table, order, [(64, 0.5), (65, 1000.0)])
    assert order.first[:3] == [64, 2, 3]
    assert order.first[-1] == 65


def test_a_full_table_gives_no_order_until_it_has_emptied(table: SlotTable, order: DeviceOrder) -> None:
    assert add(table, order, [(seq, 1.0) for seq in range(65)]) == [1.0] * 65  # scored all the same
    assert order.first == []
    order.remove(list(range(64)))
    add(table, order, [(70, 2.0)])
    assert order.first == [70]


def test_a_request_that_is_scored_again_keeps_its_slot(table: SlotTable, order: DeviceOrder) -> None:
    for tokens in (30.0, 20.0, 5.0):
        add(table, order, [(0, 10.0), (1, tokens)])
    assert order.first == [1, 0]
    order.remove([0, 1])
    assert len(table) == 0
    assert all(table.acquire() for _ in range(64))  # all slots are free again


def test_only_the_first_k_are_given() -> None:
    table = SlotTable(IDENTITY, capacity=64, device=DEVICE, max_order=64)
    order = DeviceOrder(table, k=2, min_waiting=1)
    add(table, order, [(0, 30.0), (1, 10.0), (2, 20.0)])
    assert order.first == [1, 2]


def test_nothing_is_ordered_where_the_host_would_not_go_by_it(
    table: SlotTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = DeviceOrder(table, k=64, min_waiting=3)
    with monkeypatch.context() as patch:
        patch.setattr(SlotTable, "order", None)
        assert add(table, order, [(0, 30.0), (1, 10.0)]) == [30.0, 10.0]
    assert order.first == []
    add(table, order, [(2, 20.0)])
    assert order.first == [1, 2, 0]
    order.remove([0])
    add(table, order, [(2, 20.0)])
    assert order.first == []


def whole(seq: int, ids: list[int]) -> Prompt:
    """A prompt of which nothing is cut."""
    return Prompt(seq, ids, len(ids))


def pack_nonempty(prompts: Sequence[Prompt]) -> tuple[PackedBatch, list[int]]:
    """An empty prompt is an error, as it is for the real scorer."""
    return pack([prompt.ids for prompt in prompts]), [len(prompt.ids) for prompt in prompts]


def lengths_as_scores(table: SlotTable) -> Callable[[PackedBatch], torch.Tensor]:
    """Scores as a ranker's kernels do; NaN for a prompt of 13 tokens."""

    def score(batch: PackedBatch) -> torch.Tensor:
        lengths = batch.cu_seqlens.diff().float().to(DEVICE)
        return table.publish(torch.where(lengths == 13, torch.nan, lengths))

    return score


def test_scorer_orders_what_it_scored(table: SlotTable, order: DeviceOrder) -> None:
    scorer = GpuScorer(pack_nonempty, lengths_as_scores(table), order, None, 0.0)
    scored = scorer([whole(seq, ids) for seq, ids in enumerate([[1, 2, 3], [], [1], [0] * 13, [1, 2]])])
    assert [each.seq for each in scored] == [0, 1, 2, 3, 4]
    tokens = [each.expected_tokens for each in scored]
    assert tokens == pytest.approx([3, math.nan, 1, math.nan, 2], nan_ok=True)
    assert [each.system_prompt for each in scored] == [3, 0, 1, 13, 2]
    assert scorer.order() == [2, 4, 0]
    scorer.forget([2])
    scorer([whole(5, [1] * 9)])
    assert scorer.order() == [4, 0, 5]


def test_scorer_takes_any_number_of_prompts() -> None:
    table = SlotTable(IDENTITY, capacity=2 * MAX_BATCH, device=DEVICE, max_order=256)
    every = DeviceOrder(table, k=256, min_waiting=1)
    scorer = GpuScorer(pack_nonempty, lengths_as_scores(table), every, None, 0.0)
    prompts = [whole(seq, [0] * (1 + seq % 12)) for seq in range(MAX_BATCH + 5)]
    assert len(scorer(prompts)) == MAX_BATCH + 5
    order = scorer.order()
    assert order == sorted(range(MAX_BATCH + 5), key=lambda seq: (1 + seq % 12, seq))


def test_scorer_weighs_prompts_as_the_policy_does(table: SlotTable, order: DeviceOrder) -> None:
    """By the length of the whole prompt, of which the ranker may have seen the head alone."""
    policy = POLICIES["pars_fast"]
    work = prompt_work(policy)
    assert work
    scorer = GpuScorer(pack_nonempty, lengths_as_scores(table), order, None, work)
    rng = np.random.default_rng(3)
    prompts = [Prompt(seq, [1] * int(rng.integers(1, 13)), int(rng.integers(13, 3000))) for seq in range(40)]
    assert [each.expected_tokens for each in scorer(prompts)] == [float(len(p.ids)) for p in prompts]
    key = {p.seq: policy().key(float(len(p.ids)), SimpleNamespace(num_prompt_tokens=p.num_tokens))
           for p in prompts}  # fmt: skip
    assert scorer.order() == sorted(key, key=lambda seq: (key[seq], seq))


@pytest.mark.parametrize("policy", ["pars", "pars_fast"])
@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
def test_host_index_admits_by_the_devices_order_as_by_its_own(
    table: SlotTable, order: DeviceOrder, policy: str, stale: bool
) -> None:
    rng = np.random.default_rng(7)
    keys = rng.integers(1, 20, size=40).astype(float)  # ties are many
    prompts = rng.integers(1, 2000, size=40).tolist()
    work = prompt_work(POLICIES[policy])
    assert work is not None
    admitted = []
    for use_device in (False, True):
        least = 1 if use_device else 1000
        index = HostIndex(POLICIES[policy](), UNBOUNDED, device_order_min_waiting=least)
        entries = [Entry(seq, 0, SimpleNamespace(num_prompt_tokens=prompts[seq])) for seq in range(40)]
        for entry, key in zip(entries, keys, strict=True):
            index.add(entry)
            if entry.seq % 5:  # every fifth has no score
                index.set_expected_tokens(entry, key)
        if use_device:
            scored = [seq for seq in range(40) if seq % 5]
            works = [work * prompts[seq] for seq in scored]
            add(table, order, [(seq, keys[seq]) for seq in scored], works)
            index.set_device_order(order.first)
        if stale:  # aborted after the order was computed
            for entry in entries[::7]:
                index.remove(entry)
        admitted.append([index.pop().seq for _ in range(len(index))])
    assert admitted[0] == admitted[1]


@pytest.fixture
def load_scorer(
    ranker_dir: Path, served_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], GpuScorer]:
    """The scorer of an engine's GPU, graphs and all; on the host where there is none. Orders however few."""
    monkeypatch.setattr(gpu_scoring, "DEVICE_ORDER_MIN_WAITING", 1)
    if DEVICE.type == "cpu":
        use_host_cuda(monkeypatch)
        monkeypatch.setattr(Ranker, "uses_kernels", True)
        monkeypatch.setattr(gpu_scoring, "SlotTable", partial(SlotTable, capacity=256))
        load = Ranker.from_pretrained

        def load_small(directory: Path, *, device: torch.device) -> Ranker:
            ranker = load(directory, device=device)
            ranker.max_tokens = 8
            return ranker

        monkeypatch.setattr(Ranker, "from_pretrained", load_small)  # few and small graphs
        monkeypatch.setattr(gpu_scoring, "MAX_BATCH", MAX_PROMPTS + 1)
    return partial(
        make_gpu_scorer, str(ranker_dir), str(served_model), None, device=DEVICE, prompt_work=0.0
    )


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # in padding
def test_graphs_score_and_order_as_the_ranker_does(
    load_scorer: Callable[[], GpuScorer],
    ranker_dir: Path,
    served_model: Path,
    make_prompts: Callable[[int], list[str]],
) -> None:
    from transformers import AutoTokenizer

    scorer = load_scorer()
    tokenizer = AutoTokenizer.from_pretrained(served_model)
    prompts = [whole(seq, tokenizer(text)["input_ids"]) for seq, text in enumerate(make_prompts(12))]
    scored = [each for batch in (prompts[:1], prompts[1:3], prompts[3:]) for each in scorer(batch)]
    with_torch = PromptScorer(Ranker.from_pretrained(ranker_dir, device="cpu"), str(served_model), None)
    expected = [each.expected_tokens for each in with_torch(prompts)]
    rounding = 1e-3 if DEVICE.type == "cpu" else 0.05  # fp16 on a GPU
    assert [each.expected_tokens for each in scored] == pytest.approx(expected, rel=rounding)
    assert scorer.order() == sorted(range(12), key=lambda seq: (scored[seq].expected_tokens, seq))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("wrong", ["score", "order"])
def test_kernels_that_compute_something_else_are_refused(
    load_scorer: Callable[[], GpuScorer], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "score":
        score = GraphedScorer.score
        monkeypatch.setattr(GraphedScorer, "score", lambda *arguments: score(*arguments) + 0.5)
    else:
        order = SlotTable.order

        def reversed_order(table: SlotTable, k: int) -> torch.Tensor | None:
            slots = order(table, k)
            return None if slots is None else slots.flip(0)

        monkeypatch.setattr(SlotTable, "order", reversed_order)
    with pytest.raises(KernelError, match=f"the kernels' {wrong}.*; PARS_DEVICE=cpu ranks without them"):
        load_scorer()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_a_trial_passes_where_the_kernels_do(
    load_scorer: Callable[[], GpuScorer], ranker_dir: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    """The child's own code in this process, which without a GPU has the interpreter."""
    trial = ["--ranker", str(ranker_dir), "--device", str(DEVICE), "--timeout", "300", "--max-programs", "1"]
    assert gpu_trial.main(trial) == 0
    score = GraphedScorer.score
    monkeypatch.setattr(GraphedScorer, "score", lambda *arguments: score(*arguments) + 0.5)
    assert gpu_trial.main(trial) == 1
    assert "KernelError: the kernels' scores are " in capfd.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    trial[1] = str(tmp_path)
    assert gpu_trial.main(trial) == os.EX_DATAERR
    assert capfd.readouterr().err.startswith(str(tmp_path))
