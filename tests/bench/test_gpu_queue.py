"""The GPU queue bench without a GPU: what it compares is the same order, and it refuses to time it here."""

import pytest
import torch

from bench.gpu_queue import make_table, packed_urgency, slot_changes
from pars_fast.kernels.queue_topk import TopkWorkspace, queue_topk, queue_topk_reference

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would be timed")


def test_torch_providers_give_the_same_order() -> None:
    table = make_table(2000, "cpu")
    table["occupied"][::3] = False
    urgency = packed_urgency(**table)
    expected = queue_topk_reference(**table, k=1024).tolist()
    assert urgency.topk(1024).indices.tolist() == expected
    assert urgency.sort(descending=True).indices[:1024].tolist() == expected


@needs_no_gpu
def test_the_incremental_provider_rebuilds_as_many_tiles_as_it_says() -> None:
    table = make_table(4096, "cpu")
    workspace = TopkWorkspace(4096, 16, "cpu")
    queue_topk(**table, k=16, workspace=workspace)
    slot_changes(table, 3, workspace)()
    assert int((workspace.dirty != 0).sum()) == 3
    slots = queue_topk(**table, k=16, workspace=workspace)
    assert slots.tolist() == queue_topk_reference(**table, k=16).tolist()
