"""Who scores prompts on the CPU: texts in, (B,) fp32 scores out, with the same weights, window and pooling.

`hf_eager` is what `pip install transformers` gives: one batch padded to the longest prompt; `hf_bf16` is the
same in bf16, `torch_compile` the same compiled. onnxruntime gets its graph fused, and prompts of like length
together in batches of `ONNX_BATCH`, so that little is padded.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.onnx_export import PaddedRanker, export_onnx, load_session
from pars_fast.bench_results import all_threads
from pars_fast.ranker import Ranker

ONNX_BATCH = 8
Score = Callable[[Sequence[str]], Tensor]
Forward = Callable[[Tensor, Tensor], Tensor]  # (B, S) int64 ids and mask -> (B,) scores


def pad(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, both (B, S) int64, S the longest prompt; 0 is BERT's [PAD]."""
    length = max(map(len, ids))
    padded = torch.tensor([[*prompt, *[0] * (length - len(prompt))] for prompt in ids])
    lengths = torch.tensor([len(prompt) for prompt in ids])
    return padded, (torch.arange(length) < lengths[:, None]).long()


def padded_score(ranker: Ranker, forward: Forward) -> Score:
    """All prompts in one batch, padded to the longest."""

    def score(prompts: Sequence[str]) -> Tensor:
        return forward(*pad(ranker.encode(prompts)))

    return score


def length_sorted_score(ranker: Ranker, forward: Forward, batch: int) -> Score:
    """Batches of prompts of like length, each padded to its longest."""

    def score(prompts: Sequence[str]) -> Tensor:
        ids = ranker.encode(prompts)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        scores = torch.empty(len(ids))
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            scores[part] = forward(*pad([ids[i] for i in part]))
        return scores

    return score


def hf_eager(ranker: Ranker) -> Score:
    model = PaddedRanker(ranker).eval()
    return padded_score(ranker, torch.inference_mode()(model.forward))


def hf_bf16(ranker: Ranker) -> Score:
    model = deepcopy(PaddedRanker(ranker)).eval().to(torch.bfloat16)  # it shares the ranker's score head
    forward = torch.inference_mode()(model.forward)
    return padded_score(ranker, lambda ids, mask: forward(ids, mask).float())


def torch_compile(ranker: Ranker) -> Score:
    """Compiled once for all shapes: a CPU server meets a new one with nearly every batch."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    model = torch.compile(PaddedRanker(ranker).eval(), dynamic=True)
    return padded_score(ranker, torch.inference_mode()(model))


def onnxruntime_fp32(ranker: Ranker) -> Score:
    return _onnxruntime(ranker, 0)


def onnxruntime_int8(ranker: Ranker) -> Score:
    return _onnxruntime(ranker, 1)


def pars_fast(ranker: Ranker) -> Score:
    return ranker.score


PROVIDERS: dict[str, Callable[[Ranker], Score]] = {
    provider.__name__: provider
    for provider in (hf_eager, hf_bf16, torch_compile, onnxruntime_fp32, onnxruntime_int8, pars_fast)
}


@cache
def load_provider(name: str, ranker: Ranker) -> Score:
    """A provider of PROVIDERS, made once a process."""
    return PROVIDERS[name](ranker)


def _onnxruntime(ranker: Ranker, variant: int) -> Score:
    for module in ("onnx", "onnxruntime"):
        pytest.importorskip(module, reason="pip install 'pars-fast[bench]'")
    session = load_session(_exported(ranker)[variant], all_threads())

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        (scores,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        return torch.from_numpy(scores)

    return length_sorted_score(ranker, forward, ONNX_BATCH)


@cache
def _exported(ranker: Ranker) -> tuple[bytes, bytes]:
    """fp32 and int8, in memory: nothing stays on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        fp32, int8 = export_onnx(ranker, Path(folder))
        return fp32.read_bytes(), int8.read_bytes()
