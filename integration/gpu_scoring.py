"""Scoring on the engine's GPU, with the order of the scored requests kept there too.

Runs in the ranker's thread on a stream of its own. A batch is one chain on the device: its requests and all
that has changed go up in one transfer, the ranker scores and leaves the scores in their slots as keys, and
where so many wait that the host goes by it, the first K_ORDER slots are ordered; the host waits once, for
tokens and order together. Finished requests keep their slots until the next batch: the host passes over them.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pars_fast.errors import KernelError
from pars_fast.gpu_forward import graphed_scorer
from pars_fast.graphed import GraphedScorer
from pars_fast.host_index import DEVICE_ORDER_MIN_WAITING
from pars_fast.integration.gpu_trial import ADVICE
from pars_fast.integration.runtime import Prompt, Scored
from pars_fast.integration.scoring import PromptScorer
from pars_fast.kernels.small_batch_score import MAX_PROMPTS
from pars_fast.packed_weights import ACTIVATION
from pars_fast.ranker import Ranker
from pars_fast.slot_table import K_ORDER, MAX_BATCH, SlotTable
from pars_fast.tokenization import PackedBatch, pack

PROBES = (1, MAX_PROMPTS, MAX_PROMPTS + 1)  # prompts of a self-test's batches: both paths of the ranker
PROBE_ERROR = 0.02  # of the largest score; fp16 itself costs the packaged rankers 0.0004 (PyTorch on a CPU)


class DeviceOrder:
    """Seqs of scored requests in order of their keys, on the device. One priority; see `HostIndex._hint`.

    `first` is the order as of the last batch, at most `k`; empty if the table cannot order all, or holds
    fewer than `min_waiting`, so that the host forgets an older one.
    """

    def __init__(self, table: SlotTable, k: int = K_ORDER, *, min_waiting: int) -> None:
        self.first: list[int] = []
        self._table, self._k, self._min_waiting = table, k, min_waiting
        self._slots: dict[int, tuple[int, int]] = {}  # seq -> slot, generation
        self._seqs = np.zeros(table.capacity, dtype=np.int64)  # of each slot
        self._overflowed = False
        on_gpu = table.device.type == "cuda"
        self._tokens = torch.empty(MAX_BATCH, dtype=torch.float32, pin_memory=on_gpu)
        self._first_slots = torch.empty(k, dtype=torch.int32, pin_memory=on_gpu)
        self._done = torch.cuda.Event(blocking=True) if on_gpu else None

    def begin(self, seqs: Sequence[int], prompt_work: Sequence[float] = ()) -> None:
        """Requests, at most MAX_BATCH, are about to be scored: send them to the device. Once one finds no
        slot, there is no order until all have left. `prompt_work` is as `SlotTable.upload` has it."""
        taken = []
        for seq in seqs:
            if seq in self._slots:  # scored anew
                continue
            if (slot := self._table.acquire()) is None:
                self._overflowed = True
                break
            self._slots[seq] = slot
            taken.append((*slot, seq))
        if taken:
            slots, generations, new = map(list, zip(*taken, strict=True))
            self._seqs[slots] = new
            self._table.insert(slots, generations, [0] * len(slots), new)
        self._table.upload([self._slots.get(seq, (-1, 0)) for seq in seqs], prompt_work)

    def finish(self, seqs: Sequence[int], expected_tokens: Tensor) -> list[float]:
        """Their scores are in their slots, `expected_tokens` (B,) float32 on the device: these on the host,
        NaN for one that has no key."""
        tokens = self._tokens[: len(seqs)]
        tokens.copy_(expected_tokens, non_blocking=True)
        slots = None
        if not self._overflowed and len(self._slots) >= self._min_waiting:
            slots = self._table.order(self._k)
        if slots is not None:
            self._first_slots.copy_(slots, non_blocking=True)
        if self._done is not None:  # waits in this thread: the scheduling thread sees only what is complete
            self._done.record()
            self._done.synchronize()
        expected = tokens.tolist()
        unscored = {seq for seq, value in zip(seqs, expected, strict=True) if math.isnan(value)}
        if slots is None:
            self.first = []
        else:
            first = self._first_slots.numpy()
            self.first = self._seqs[first[first >= 0]].tolist()
            if unscored:
                self.first = [seq for seq in self.first if seq not in unscored]
        self.remove(list(unscored))
        return expected

    def remove(self, seqs: Sequence[int]) -> None:
        """Drop requests, by the next batch; those that never had a slot are passed over."""
        slots = [self._slots.pop(seq)[0] for seq in seqs if seq in self._slots]
        self._table.free(slots)
        for slot in slots:
            self._table.release(slot)
        self._overflowed = self._overflowed and bool(self._slots)


class GpuScorer:
    """A `runtime.Scorer` that keeps the device's order up to date.

    Args:
        pack: token ids of prompts to the ranker's batch, and what stands for their system prompts; raises
            for a prompt that cannot be scored.
        score: batch to (B,) float32 expected tokens on the device, without waiting for them; leaves the
            scores in the slots of the order's table.
        stream: where all of it runs; None on a CPU.
        prompt_work: of a prompt token in a key, in output tokens; see `pars_fast.policies.prompt_work`.
    """

    def __init__(
        self,
        pack: Callable[[Sequence[Prompt]], tuple[PackedBatch, list[int]]],
        score: Callable[[PackedBatch], Tensor],
        order: DeviceOrder,
        stream: torch.cuda.Stream | None,
        prompt_work: float,
    ) -> None:
        self._pack, self._score, self._order = pack, score, order
        self._stream, self._prompt_work = stream, prompt_work

    def __call__(self, prompts: Sequence[Prompt]) -> list[Scored]:
        """Expected tokens; NaN for a prompt that cannot be scored, which harms no other."""
        batches = [prompts[first : first + MAX_BATCH] for first in range(0, len(prompts), MAX_BATCH)]
        with torch.cuda.stream(self._stream):
            return [scored for batch in batches for scored in self._score_batch(batch)]

    def order(self) -> Sequence[int]:
        return self._order.first

    def forget(self, seqs: Sequence[int]) -> None:
        self._order.remove(seqs)

    def _score_batch(self, prompts: Sequence[Prompt]) -> list[Scored]:
        seqs = [prompt.seq for prompt in prompts]
        try:
            batch, system_prompts = self._pack(prompts)
        except Exception:  # decoding and tokenising share no narrower base
            if len(prompts) == 1:
                return [Scored(seqs[0], math.nan)]
            return [scored for prompt in prompts for scored in self._score_batch([prompt])]
        self._order.begin(seqs, [self._prompt_work * prompt.num_tokens for prompt in prompts])
        expected = self._order.finish(seqs, self._score(batch))
        return [Scored(*answer) for answer in zip(seqs, expected, system_prompts, strict=True)]


def make_gpu_scorer(
    ranker: str,
    tokenizer: str,
    revision: str | None,
    *,
    device: torch.device,
    prompt_work: float,
    max_programs: int | None = None,
    chat_template: Path | None = None,
) -> GpuScorer:
    """A ranker that scores the engine's prompts on its GPU.

    `device` and `max_programs` are `load_kernels`'s, as is what is raised, `prompt_work` is `GpuScorer`'s;
    `tokenizer`, `revision` and `chat_template` are `PromptText`'s.
    """
    kernels = load_kernels(ranker, device=device, max_programs=max_programs)
    table, graphs = kernels.table, kernels.graphs
    with torch.cuda.stream(kernels.stream):
        order = DeviceOrder(table, min_waiting=DEVICE_ORDER_MIN_WAITING)
    scorer = PromptScorer(kernels.ranker, tokenizer, revision, chat_template)

    def score(batch: PackedBatch) -> Tensor:
        graphs.score(batch.input_ids, batch.cu_seqlens)
        return table.destination.tokens[: len(batch)]

    return GpuScorer(scorer.pack, score, order, kernels.stream, prompt_work)


class LoadedKernels(NamedTuple):
    """A ranker on a GPU, the table its graphs leave scores in, and the stream of all of it."""

    ranker: Ranker
    table: SlotTable
    graphs: GraphedScorer
    stream: torch.cuda.Stream


def load_kernels(ranker: str, *, device: torch.device, max_programs: int | None = None) -> LoadedKernels:
    """Load a ranker onto a GPU, which becomes this thread's current one, capture its graphs and test them.

    `max_programs`: at most so many SMs at a time, None for all.

    Raises: CheckpointError: as `Ranker.from_pretrained`, or if it has no map from scores to tokens.
        KernelError: if it has an activation that the kernels do not compute; as `self_test`.
    """
    torch.cuda.set_device(device)
    stream = torch.cuda.Stream(device)
    loaded = Ranker.from_pretrained(ranker, device=device)
    if not loaded.uses_kernels:
        raise KernelError(
            f"{ranker}: its activation is {loaded.config.hidden_act!r}, and the kernels compute "
            f"{ACTIVATION!r}{ADVICE}"
        )
    with torch.cuda.stream(stream):
        table = SlotTable(loaded.required_token_map(), device=device, max_order=K_ORDER)
    graphs = graphed_scorer(
        loaded,
        max_prompts=MAX_BATCH,
        stream=stream,
        max_programs=max_programs,
        destination=table.destination,
    )
    with torch.cuda.stream(stream):
        self_test(loaded, graphs, DeviceOrder(table, min_waiting=1), table.destination.tokens)
    return LoadedKernels(loaded, table, graphs, stream)


@torch.no_grad()
def self_test(ranker: Ranker, graphs: GraphedScorer, order: DeviceOrder, tokens: Tensor) -> None:
    """Score made-up prompts by the graphs, and again in PyTorch; sort their expected tokens on the host.

    So kernels that a GPU, driver or compiler makes something else of never order a queue. `tokens` is where
    the graphs leave expected tokens; `order` is as empty after it as before.

    Raises: KernelError: if scores or order are not the same.
    """
    generator = torch.Generator().manual_seed(0)
    for num_prompts in PROBES:
        lengths = torch.randint(1, ranker.max_tokens + 1, (num_prompts,), generator=generator).tolist()
        batch = pack([
            torch.randint(ranker.config.vocab_size, (length,), generator=generator).tolist()
            for length in lengths
        ])  # fmt: skip
        seqs = list(range(num_prompts))
        order.begin(seqs)
        scores = graphs.score(batch.input_ids, batch.cu_seqlens).float().cpu()
        expected_tokens = order.finish(seqs, tokens[:num_prompts])
        first = order.first
        order.remove(seqs)
        on_device = batch.to(ranker.device)
        expected = ranker.model(on_device.input_ids, on_device.cu_seqlens).float().cpu()
        error = float((scores - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if not error <= PROBE_ERROR:  # NaN, too
            raise KernelError(f"the kernels' scores are {error:.3g} off PyTorch's{ADVICE}")
        if first != sorted(seqs, key=lambda seq: (expected_tokens[seq], seq)):
            raise KernelError(f"the kernels' order is not that of the scores{ADVICE}")
