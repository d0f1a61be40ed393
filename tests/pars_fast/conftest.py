"""A tiny BERT-family encoder and length files, made here: no test of this folder needs a download."""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel

from pars_fast import Ranker

settings.register_profile("any speed", deadline=None)  # the machine may be busy
settings.load_profile("any speed")

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module", autouse=True)
def small_machine() -> Iterator[None]:
    """One thread, since more slow tiny models down (fifty times on a busy machine); training on the CPU,
    where the same seed gives the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `BertModel.save_pretrained` writes it: hidden 32, 2 layers, a letter a token."""
    directory = tmp_path_factory.mktemp("tiny_encoder")
    vocab = [
        *SPECIAL,
        *LETTERS,
        *(f"##{letter}" for letter in LETTERS),
        *".,:?",
        "write",
        "story",
        "yes",
        "no",
    ]
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():  # the usual 0.02 makes all prompts score nearly the same
            if parameter.ndim > 1:
                parameter.mul_(6)
    config.save_pretrained(directory)
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer(WordPiece({token: index for index, token in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocab.index("[CLS]")), ("[SEP]", vocab.index("[SEP]"))],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def tiny_ranker(tiny_encoder: Path) -> Ranker:
    """The tiny encoder with a score head drawn at random; window 32."""
    torch.manual_seed(1)
    return Ranker.from_encoder(tiny_encoder, pooling="mean", max_tokens=32)


@pytest.fixture
def checkpoint(tiny_ranker: Ranker, tmp_path: Path) -> Path:
    """`tiny_ranker`, saved; a test may damage it."""
    tiny_ranker.save_pretrained(tmp_path / "ranker")
    return tmp_path / "ranker"


@pytest.fixture(scope="session")
def edit_config() -> Callable[..., None]:
    """Change fields of a checkpoint's config.json; a field of the pars_fast section by its own name."""

    def edit(directory: Path, *, section: dict[str, Any] | None = None, **changes: Any) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text()) | changes
        config.setdefault("pars_fast", {}).update(section or {})
        path.write_text(json.dumps(config))

    return edit


@pytest.fixture
def write_lengths(tmp_path: Path) -> Callable[..., Path]:
    """Write a length file from (split, prompt, output_tokens) rows, gzipped if named .gz."""

    def write(rows: Iterable[tuple[str, str, dict[str, int]]], name: str = "lengths_toy.jsonl") -> Path:
        records = ({"split": s, "prompt": p, "output_tokens": lengths} for s, p, lengths in rows)
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return path

    return write
