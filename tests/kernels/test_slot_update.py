"""Slot upkeep against commands applied one at a time; equal, not close."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pars_fast.kernels.slot_update import BLOCK, FREE, slot_update, slot_update_reference

TILE = 16


def table_of(num_slots: int, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Every third slot never used, the others in their generation 1 to 3, keyed, some free."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (num_slots,), generator=generator)

    used = torch.arange(num_slots) % 3 != 0
    table = {
        "priority_rank": integers(0, 9).int(),
        "lane": integers(0, 2).int(),
        "key": torch.rand(num_slots, generator=generator),
        "seq": integers(0, 2**40),
        "occupied": (integers(0, 2) == 1) & used,
        "generation": integers(1, 4) * used,
        "median_key": torch.tensor([1.0]),
        "seq_base": torch.tensor([7]),
        "dirty": torch.zeros(-(-num_slots // TILE), dtype=torch.int32),
    }
    return {name: tensor.to(device) for name, tensor in table.items()}


def header_of(count: int, device: torch.device, *, seq_base: int = 7, median_key: float = 1.0) -> Tensor:
    bits = int(torch.tensor([median_key]).view(torch.int32))
    return torch.tensor([count, seq_base, bits, 0], device=device)


def assert_as_reference(header: Tensor, commands: Tensor, table: dict[str, Tensor]) -> None:
    expected = {name: column.cpu().clone() for name, column in table.items()}
    slot_update_reference(header.cpu(), commands.cpu(), **expected, tile_size=TILE)
    slot_update(header, commands, **table, tile_size=TILE)
    for name, column in table.items():
        torch.testing.assert_close(column.cpu(), expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_commands(data: st.DataObject, device: torch.device) -> None:
    num_slots = data.draw(st.integers(1, 60))
    slots = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True))
    fields = st.tuples(st.integers(0, 5), st.integers(FREE, 600), st.integers(0, 2**60))
    commands = [(slot, *data.draw(fields)) for slot in slots]
    table = table_of(num_slots, device, seed=data.draw(st.integers(0, 9)))
    rows = torch.tensor([*commands, (-1, 9, 9, 9)], device=device)  # the row past the count names no slot
    median_key = data.draw(st.floats(width=32))
    header = header_of(len(slots), device, seq_base=data.draw(st.integers(0, 2**60)), median_key=median_key)
    assert_as_reference(header, rows, table)


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 2])
def test_a_buffer_of_fixed_size_serves_any_number(count: int, device: torch.device) -> None:
    table = table_of(3 * BLOCK, device)
    slots = torch.randperm(3 * BLOCK, generator=torch.Generator().manual_seed(1))[: 2 * BLOCK + 2]
    commands = torch.stack([slots, slots % 5, slots % 7 - 1, slots * 2**33], dim=1).to(device)
    assert_as_reference(header_of(count, device, seq_base=-5), commands, table)


def one_slot(device: torch.device, command: list[int]) -> dict[str, Any]:
    """A request of rank 3, key 0.5 in slot 1, generation 5, after one command."""
    table = table_of(2, device)
    state = {"priority_rank": 3, "lane": 1, "key": 0.5, "seq": 40, "occupied": True, "generation": 5}
    for name, value in state.items():
        table[name][1] = value
    slot_update(header_of(1, device), torch.tensor([command], device=device), **table, tile_size=TILE)
    after: dict[str, Any] = {name: table[name][1].item() for name in state}
    assert (table["dirty"].tolist() == [0]) == (after == state)
    return {name: value for name, value in after.items() if value != state[name]}


def test_only_a_command_of_the_owner_or_the_next_one_counts(device: torch.device) -> None:
    assert one_slot(device, [1, 4, FREE, 0]) == {}  # a late free of the owner before
    assert one_slot(device, [1, 4, 2, 9]) == {}
    assert one_slot(device, [1, 5, FREE, 0]) == {"occupied": False}
    assert one_slot(device, [1, 5, 2 * 3 + 0, 40]) == {"lane": 0}  # preempted: the key stays
    changed = one_slot(device, [1, 6, 2 * 8 + 1, 41])
    assert math.isnan(changed.pop("key"))  # unscored
    assert changed == {"priority_rank": 8, "seq": 41, "generation": 6}


def test_an_owner_that_came_and_went_unseen_leaves_no_key_to_its_slot(device: torch.device) -> None:
    changed = one_slot(device, [1, 6, FREE, 0])
    assert math.isnan(changed.pop("key"))
    assert changed == {"occupied": False, "generation": 6}


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "header": ({"header": torch.zeros(3).long()}, r"header must be contiguous \(4,\) .*int64, got \(3,\)"),
    "header dtype": ({"header": torch.zeros(4).int()}, "header must be .*got .*torch.int32"),
    "commands": ({"commands": torch.zeros(3, 5).long()}, r"commands must be .*\(C, 4\) .*got \(3, 5\)"),
    "strided": ({"commands": torch.zeros(4, 6).long().T[:, :4]}, "commands must be contiguous"),
    "device": ({"commands": torch.zeros(3, 4, device="meta").long()}, "commands must lie on cpu like key"),
    "rank": ({"priority_rank": torch.zeros(20)}, r"priority_rank must be contiguous \(20,\) .*int32, got"),
    "lane": ({"lane": torch.zeros(19).int()}, r"lane must be contiguous \(20,\) .*got \(19,\)"),
    "key": ({"key": torch.zeros(20).half()}, "key must be .*torch.float32, got .*torch.float16"),
    "seq": ({"seq": torch.zeros(20).int()}, "seq must be .*torch.int64, got .*torch.int32"),
    "occupied": ({"occupied": torch.zeros(20).int()}, "occupied must be .*torch.bool, got .*torch.int32"),
    "generation": ({"generation": torch.zeros(20).int()}, "generation must be .*torch.int64"),
    "median": ({"median_key": torch.tensor(0.0)}, r"median_key must be contiguous \(1,\)"),
    "seq_base": ({"seq_base": torch.zeros(2).long()}, r"seq_base must be contiguous \(1,\)"),
    "dirty": ({"dirty": torch.zeros(1).int()}, r"dirty must be contiguous \(2,\) torch.int32, got \(1,\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong(case: str) -> None:
    change, message = ERRORS[case]
    cpu = torch.device("cpu")
    arguments: dict[str, Any] = {
        "header": header_of(0, cpu),
        "commands": torch.zeros(3, 4).long(),
        "tile_size": TILE,
        **table_of(20, cpu),
    }
    with pytest.raises(ValueError, match=message):
        slot_update(**(arguments | change))
