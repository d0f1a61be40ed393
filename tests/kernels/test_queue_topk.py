"""Queue top-k against stable sorts: the order is total, so results must be equal, not close."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from pars_fast.kernels import queue_topk as module
from pars_fast.kernels.publish_score import ScoreDestination, publish_score
from pars_fast.kernels.queue_topk import (
    MAX_K,
    MAX_RANKS,
    MAX_SEQ_SPAN,
    TopkWorkspace,
    queue_topk,
    queue_topk_reference,
)
from pars_fast.kernels.slot_update import FREE, slot_update

SEQ_BASE = 10**12  # far past 32 bits: only the offset may be packed

# The floats an order gets wrong: both zeros, denormals, neighbours, the largest, and what counts as unscored.
KEYS = [0.0, -0.0, 1e-45, -1e-45, 1.0, 1.0000001, -1.0, 3.4028235e38, -3.4028235e38,
        float("nan"), float("inf"), float("-inf")]  # fmt: skip
Table = dict[str, Any]  # of tensors; Any, since they are given by ** beside other keywords
FIELDS = ("priority_rank", "lane", "key", "seq", "occupied", "median_key", "seq_base")


def random_queue(num_slots: int, device: torch.device, occupied: float = 0.7) -> Table:
    """Many equal ranks and keys, so every field decides somewhere; seqs reach both ends of their range."""
    generator = torch.Generator().manual_seed(0)

    def integers(high: int) -> Tensor:
        return torch.randint(0, high, (num_slots,), generator=generator)

    offsets = torch.randperm(num_slots, generator=generator)
    offsets[offsets % 2 == 1] += MAX_SEQ_SPAN - num_slots
    queue = {
        "priority_rank": (integers(3) * (MAX_RANKS - 1) // 2).int(),
        "lane": integers(2).int(),
        "key": torch.tensor(KEYS)[integers(len(KEYS))],
        "seq": SEQ_BASE + offsets,
        "occupied": torch.rand(num_slots, generator=generator) < occupied,
        "median_key": torch.tensor([1.0]),
        "seq_base": torch.tensor([SEQ_BASE]),
    }
    return {name: tensor.to(device) for name, tensor in queue.items()}


def assert_same_order(queue: Table, k: int) -> None:
    slots = queue_topk(**queue, k=k)
    assert slots.dtype == torch.int32
    assert slots.tolist() == queue_topk_reference(**queue, k=k).tolist()


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(("num_slots", "k"), [(1, 1), (1, 7), (37, 37), (300, 20), (1500, 1000), (2049, 1)])
def test_matches_stable_sorts(num_slots: int, k: int, device: torch.device) -> None:
    assert_same_order(random_queue(num_slots, device), k)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("num_slots", [16 * 8, 16 * 8 + 1, 16 * 8 * 3 + 3], ids=lambda n: f"{n}_slots")
def test_merges_any_number_of_lists(
    num_slots: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TILE", 16)  # one and two levels of merging without a huge table
    assert_same_order(random_queue(num_slots, device), k=16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: minutes in the interpreter")
@pytest.mark.parametrize("num_slots", [2**18, 2**20 + 5])
@pytest.mark.parametrize("k", [256, 1024])
def test_matches_stable_sorts_on_large_tables(num_slots: int, k: int) -> None:
    assert_same_order(random_queue(num_slots, torch.device("cuda")), k)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_small_queue(data: st.DataObject, device: torch.device) -> None:
    num_slots = data.draw(st.integers(1, 50))
    keys = st.sampled_from(KEYS) | st.floats(width=32)

    def column(values: st.SearchStrategy[Any], dtype: torch.dtype) -> Tensor:
        drawn = data.draw(st.lists(values, min_size=num_slots, max_size=num_slots))
        return torch.tensor(drawn, dtype=dtype, device=device)

    seqs = st.integers(0, MAX_SEQ_SPAN - 1)
    offsets = data.draw(st.lists(seqs, min_size=num_slots, max_size=num_slots, unique=True))
    queue = {
        "priority_rank": column(st.sampled_from([0, 1, MAX_RANKS - 1]), torch.int32),
        "lane": column(st.integers(0, 1), torch.int32),
        "key": column(keys, torch.float32),
        "seq": torch.tensor(offsets, device=device) + SEQ_BASE,
        "occupied": column(st.booleans(), data.draw(st.sampled_from([torch.bool, torch.int32]))),
        "median_key": torch.tensor([data.draw(keys)], dtype=torch.float32, device=device),
        "seq_base": torch.tensor([SEQ_BASE], device=device),
    }
    assert_same_order(queue, k=data.draw(st.integers(1, 64)))


def many_queues(count: int, generator: torch.Generator) -> tuple[Table, list[list[int]]]:
    """`count` queues of 1 to 7 requests, told apart by priority rank, each with two keys, in random slots of
    one table; and the slots of each queue in order, by Python's stable sort."""
    queues: list[list[int]] = []
    fields: list[tuple[int, int, float, bool]] = []  # rank, lane, key, occupied
    for rank in range(count):
        size, first, second = torch.randint(0, 1 << 20, (3,), generator=generator).tolist()
        keys = [KEYS[first % len(KEYS)], KEYS[second % len(KEYS)]]
        for draw in torch.randint(0, 16, (1 + size % 7,), generator=generator).tolist():
            fields.append((rank, draw & 1, keys[draw >> 1 & 1], draw != 15))
        queues.append([])
    slots = torch.randperm(len(fields), generator=generator).tolist()
    seqs = torch.randperm(len(fields), generator=generator).tolist()
    table = {name: [0.0] * len(fields) for name in ("priority_rank", "lane", "key", "seq", "occupied")}
    for slot, seq, (rank, lane, key, occupied) in zip(slots, seqs, fields, strict=True):
        for name, value in (("priority_rank", rank), ("lane", lane), ("key", key), ("seq", SEQ_BASE + seq),
                            ("occupied", occupied)):  # fmt: skip
            table[name][slot] = value
        if occupied:
            queues[rank].append(slot)
    keyed = [1.0 if not math.isfinite(key) else key + 0.0 for key in torch.tensor(table["key"]).tolist()]
    for queue in queues:
        queue.sort(key=lambda slot: table["seq"][slot])
        queue.sort(key=lambda slot: (table["lane"][slot], keyed[slot]))
    dtypes = {"priority_rank": torch.int32, "lane": torch.int32, "key": torch.float32, "seq": torch.int64,
              "occupied": torch.bool}  # fmt: skip
    tensors = {name: torch.tensor(table[name], dtype=dtype) for name, dtype in dtypes.items()}
    tensors |= {"median_key": torch.tensor([1.0]), "seq_base": torch.tensor([SEQ_BASE])}
    return tensors, queues


@pytest.mark.parametrize(
    ("max_tile", "at_once", "launches"),
    [
        (MAX_K, 220, 3),
        (64, 40, 3),  # two to four tiles, a third of the queues ordered
        pytest.param(
            *(MAX_K, 220, 46),
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="a minute in the interpreter"),
            ],
        ),
    ],
    ids=["660_queues", "120_queues_merged", "10120_queues"],
)
def test_random_queues_with_ties_match_stable_sorts(
    max_tile: int, at_once: int, launches: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch orders many at once: their ranks keep them apart."""
    monkeypatch.setattr(module, "MAX_TILE", max_tile)
    generator = torch.Generator().manual_seed(0)
    for _ in range(launches):
        table, queues = many_queues(at_once, generator)
        slots = queue_topk(**{name: column.to(device) for name, column in table.items()}, k=max_tile).tolist()
        expected = [slot for queue in queues for slot in queue]
        assert slots == (expected + [-1] * max_tile)[:max_tile]


def command_rows(commands: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(commands or [[0, 0, FREE, 0]], device=device)


class IncrementalOrder(RuleBasedStateMachine):
    """Any arrivals, departures, scores, medians and bases, by the kernels that mark tiles: the kept lists
    give what new ones give, and what stable sorts give. Tiles of 16 slots, 3 levels of lists."""

    @initialize(k=st.sampled_from([1, 5, 16]))
    def start(self, k: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.k, self.num_slots = k, 16 * 5 - 3
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "MAX_TILE", 16)
            patch.setattr(module, "MAX_FAN", 4)
            self.workspace = TopkWorkspace(self.num_slots, k, self.device)
        self.table = random_queue(self.num_slots, self.device, occupied=0.5)
        self.generation = torch.ones(self.num_slots, dtype=torch.int64, device=self.device)
        self.next_seq = SEQ_BASE + MAX_SEQ_SPAN // 2
        self.seq_base, self.median = SEQ_BASE, 1.0

    @rule(
        slots=st.lists(st.integers(0, 76), unique=True, max_size=6),
        group=st.sampled_from([FREE, 0, 1, 2, 2 * MAX_RANKS - 1]),
        newer=st.integers(-1, 1),
    )
    def change(self, slots: list[int], group: int, newer: int) -> None:
        commands = []
        for slot in slots:
            self.next_seq += 1
            commands.append([slot, int(self.generation[slot]) + newer, group, self.next_seq])
        self.send(commands)

    @rule(median=st.sampled_from([*KEYS, 7.0]))
    def move_median(self, median: float) -> None:
        self.median = median
        self.send([])

    @rule(by=st.sampled_from([-1, 1, 3]))
    def move_seq_base(self, by: int) -> None:
        # The table's seqs leave room for one: offsets stay within the packed field.
        self.seq_base = min(SEQ_BASE, max(SEQ_BASE - 1, self.seq_base + by))
        self.send([])

    def send(self, commands: list[list[int]]) -> None:
        bits = int(torch.tensor([self.median]).view(torch.int32))
        header = torch.tensor([len(commands), self.seq_base, bits, 0], device=self.device)
        slot_update(header, command_rows(commands, self.device), **self.table, generation=self.generation,
                    dirty=self.workspace.dirty, tile_size=self.workspace.tile_size)  # fmt: skip

    @rule(
        slots=st.lists(st.integers(-1, 76), min_size=1, max_size=6, unique=True),
        scores=st.lists(st.sampled_from(KEYS), min_size=6, max_size=6),
        late=st.booleans(),
    )
    def publish(self, slots: list[int], scores: list[float], late: bool) -> None:
        at = torch.tensor(slots, device=self.device)
        knots = torch.tensor([0.0, 1.0], device=self.device)
        destination = ScoreDestination(
            slot=at, generation=self.generation[at] - int(late),
            prompt_work=torch.zeros(len(slots), dtype=torch.float64, device=self.device),
            key=self.table["key"], slot_generation=self.generation, dirty=self.workspace.dirty,
            tile_size=self.workspace.tile_size, map_scores=knots, map_tokens=knots,
            tokens=torch.zeros(len(slots), device=self.device),
        )  # fmt: skip
        publish_score(torch.tensor(scores[: len(slots)], device=self.device), destination)

    @invariant()
    def same_order(self) -> None:
        offsets = self.table["seq"] - self.seq_base
        assert bool((offsets < MAX_SEQ_SPAN).all())
        kept = queue_topk(**self.table, k=self.k, workspace=self.workspace).tolist()
        assert kept == queue_topk_reference(**self.table, k=self.k).tolist()
        assert not self.workspace.dirty.any()

    def teardown(self) -> None:
        kept = queue_topk(**self.table, k=self.k, workspace=self.workspace)
        assert kept.tolist() == queue_topk(**self.table, k=self.k).tolist()


TestIncrementalOrder = IncrementalOrder.TestCase
TestIncrementalOrder.settings = settings(max_examples=4, stateful_step_count=8, deadline=None)


def test_only_what_changed_is_built_anew(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TILE", 16)
    monkeypatch.setattr(module, "MAX_FAN", 4)
    table = random_queue(16 * 17, device)
    table["key"][:32] = 2.0  # two tiles without an unscored request
    workspace = TopkWorkspace(16 * 17, 16, device)

    def rebuilt() -> list[list[int]]:
        slots = queue_topk(**table, k=16, workspace=workspace)
        assert slots.tolist() == queue_topk_reference(**table, k=16).tolist()
        return [flags.nonzero()[:, 0].tolist() for flags in workspace.rebuilt]

    assert rebuilt() == [list(range(17)), list(range(5)), [0, 1], [0]]
    assert rebuilt() == [[], [], [], []]
    table["occupied"][16 * 6 + 3] ^= True
    workspace.dirty[6] = 1
    assert rebuilt() == [[6], [1], [0], [0]]
    unscored = (table["occupied"] & ~table["key"].isfinite()).view(17, 16).any(dim=1)
    assert 0 < int(unscored.sum()) < 17
    table["median_key"].fill_(0.5)
    assert rebuilt()[0] == unscored.nonzero()[:, 0].tolist()
    table["seq_base"] -= 1
    table["seq"].clamp_(max=SEQ_BASE + MAX_SEQ_SPAN - 2)
    assert rebuilt()[0] == list(range(17))


def test_a_workspace_serves_smaller_orders_and_allocates_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = random_queue(300, device)
    workspace = TopkWorkspace(300, 64, device)
    expected = queue_topk_reference(**table, k=64).tolist()
    for name in ("empty", "zeros", "ones", "full"):
        monkeypatch.setattr(torch, name, None)
    for k in (64, 3, 64, 1):
        slots = queue_topk(**table, k=k, workspace=workspace)
        assert slots.tolist() == expected[:k]
        assert slots.data_ptr() == workspace.slot.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a GPU only")
def test_a_captured_graph_serves_both_forms() -> None:
    table = random_queue(2**16, torch.device("cuda"))
    workspace = TopkWorkspace(2**16, 256, "cuda")
    queue_topk(**table, k=256, workspace=workspace)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        slots = queue_topk(**table, k=256, workspace=workspace)
    for slot in (5, 2**15, 2**16 - 1):
        table["occupied"][slot] ^= True
        workspace.dirty[slot // workspace.tile_size] = 1
        graph.replay()
        assert slots.tolist() == queue_topk_reference(**table, k=256).tolist()


def test_the_workspace_counts_launches_and_bytes() -> None:
    workspace = TopkWorkspace(2**12, 1024, "cpu")
    assert workspace.num_launches == 3  # 4 lists of 1024 are merged at once
    full = 4 * (21 * 1024 + 12 * 1024) + 4 * 24 + 8 * 1024 * (4 + 1) + 4 * 8 * 32 + 8 * 1024
    assert workspace.bytes_moved(4) == full
    assert workspace.bytes_moved(0) == 4 * 24 + 4 * 8 * 32 + 8 * 1024


def test_an_empty_queue_is_all_padding(device: torch.device) -> None:
    assert queue_topk(**random_queue(40, device, occupied=0.0), k=3).tolist() == [-1, -1, -1]


def test_ties_go_to_the_earlier_request(device: torch.device) -> None:
    queue = random_queue(200, device, occupied=1.0)
    queue["priority_rank"].zero_(), queue["lane"].zero_()
    queue["key"] = torch.tensor([0.0, -0.0], device=device).repeat(100)
    assert queue_topk(**queue, k=64).tolist() == queue["seq"].argsort()[:64].tolist()


def test_each_field_outranks_those_after_it(device: torch.device) -> None:
    """Slot 0 loses on one field and wins on all the later ones."""
    worse = {"priority_rank": 1, "lane": 1, "key": 2.0, "seq": 5}
    for position, name in enumerate(worse):
        queue: Table = {
            field: torch.tensor([value, value], device=device)
            for field, value in {"priority_rank": 0, "lane": 0, "key": 1.0, "seq": 3}.items()
        }
        queue["priority_rank"], queue["lane"] = queue["priority_rank"].int(), queue["lane"].int()
        for later in list(worse)[position:]:
            queue[later][int(later != name)] = worse[later]
        queue |= {"occupied": torch.ones(2, dtype=torch.bool, device=device),
                  "median_key": torch.zeros(1, device=device),
                  "seq_base": torch.zeros(1, dtype=torch.int64, device=device)}  # fmt: skip
        assert queue_topk(**queue, k=2).tolist() == [1, 0], name


def test_a_free_slot_may_hold_anything(device: torch.device) -> None:
    queue = random_queue(50, device)
    free = ~queue["occupied"]
    queue["priority_rank"][free], queue["lane"][free] = -(2**31), 2**31 - 1
    queue["seq"][free], queue["key"][free] = -(2**63), torch.nan
    assert_same_order(queue, k=50)


def test_fields_past_their_limit_saturate_and_stay_in_their_field(device: torch.device) -> None:
    queue = random_queue(4, device, occupied=1.0)
    queue["priority_rank"] = torch.tensor([2**31 - 1, MAX_RANKS - 1, -5, 0], dtype=torch.int32, device=device)
    queue["lane"] = torch.tensor([0, 1, 0, 7], dtype=torch.int32, device=device)
    queue["key"] = torch.zeros(4, device=device)
    queue["seq"] = torch.tensor([2**62, SEQ_BASE, SEQ_BASE - 9, SEQ_BASE], device=device)
    assert queue_topk(**queue, k=4).tolist() == [2, 3, 0, 1]


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "k zero": ({"k": 0}, "k must be 1 to 1024, got 0"),
    "k large": ({"k": 1025}, "k must be 1 to 1024, got 1025"),
    "no slots": ({"key": torch.zeros(0)}, r"at least one slot, got \(0,\)"),
    "rank": ({"priority_rank": torch.zeros(5)}, r"priority_rank must be contiguous \(5,\) torch.int32, got"),
    "lane": ({"lane": torch.zeros(4).int()}, r"lane must be contiguous \(5,\) .*got \(4,\)"),
    "key dtype": ({"key": torch.zeros(5).half()}, "key must be .*torch.float32, got .*torch.float16"),
    "seq": ({"seq": torch.zeros(5).int()}, "seq must be .*torch.int64, got .*torch.int32"),
    "occupied": ({"occupied": torch.zeros(5)}, "occupied must be .*torch.bool or torch.int32"),
    "median": ({"median_key": torch.tensor(0.0)}, r"median_key must be contiguous \(1,\)"),
    "seq_base": ({"seq_base": torch.zeros(2).long()}, r"seq_base must be contiguous \(1,\)"),
    "stride": ({"seq": torch.zeros(10).long()[::2]}, "seq must be contiguous"),
    "device": ({"lane": torch.zeros(5, device="meta").int()}, "lane must lie on cpu like key, got meta"),
    "other table": ({"workspace": TopkWorkspace(6, 2, "cpu")}, "workspace is for 6 slots .*not for 5 slots"),
    "large k": ({"workspace": TopkWorkspace(5, 16, "cpu"), "k": 17}, "k up to 16 on cpu, not for .* k = 17"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong(case: str) -> None:
    change, message = ERRORS[case]
    arguments: dict[str, Any] = random_queue(5, torch.device("cpu")) | {"k": 2}
    assert set(arguments) == {*FIELDS, "k"}
    with pytest.raises(ValueError, match=message):
        queue_topk(**(arguments | change))


def test_a_workspace_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_slots must be at least 1, got 0"):
        TopkWorkspace(0, 1, "cpu")
    with pytest.raises(ValueError, match="k must be 1 to 1024, got 1025"):
        TopkWorkspace(5, 1025, "cpu")
