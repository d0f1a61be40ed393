"""`Ranker`: load a checkpoint, score prompts, save it again.

A checkpoint is a Hugging Face style directory: `config.json` (a BERT config with a `pars_fast` section),
`model.safetensors`, tokenizer files. Nothing in it is executed: no remote code, no pickle.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from pars_fast.bf16_products import Bf16Products, native_bf16
from pars_fast.calibration import TokenMap
from pars_fast.distribution import LengthDistribution
from pars_fast.encoder_config import EncoderConfig
from pars_fast.errors import CheckpointError, PromptError
from pars_fast.model import Pooling, ScoreModel
from pars_fast.packaged import checkpoint_directory
from pars_fast.packed_weights import ACTIVATION, PackedWeights
from pars_fast.tokenization import PackedBatch, batches, encode

Knots = TypeVar("Knots", TokenMap, LengthDistribution)
MAX_TOKENS = 128  # PARS's window
WINDOW = {"max_tokens": MAX_TOKENS, "tail_tokens": 0}  # of a checkpoint that says nothing else
GPU_BATCH_TOKENS, CPU_BATCH_TOKENS = 8192, 1024  # of a forward; on a CPU more would not fit its caches
SUPPORTED = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}


class Ranker:
    """A prompt-aware ranker: larger score = longer expected answer.

    Attributes:
        model: the network, in eval mode on `device`.
        tokenizer: WordPiece tokenizer, which does not truncate; `encode` does.
        max_tokens: prompt window in WordPiece tokens, [CLS] and [SEP] included.
        tail_tokens: how many of them come from the end of a prompt that does not fit.
        token_map: isotonic map from score to expected output tokens, None for an uncalibrated ranker.
        distribution: from scores to mu and sigma of log output tokens, None where it was not fitted.
    """

    def __init__(
        self,
        model: ScoreModel,
        config: EncoderConfig,
        tokenizer: Tokenizer,
        *,
        max_tokens: int = MAX_TOKENS,
        tail_tokens: int = 0,
        token_map: TokenMap | None = None,
        distribution: LengthDistribution | None = None,
    ) -> None:
        if not 3 <= max_tokens <= config.max_position_embeddings:
            raise CheckpointError(
                f"max_tokens must be in 3..{config.max_position_embeddings}, got {max_tokens}"
            )
        if not 0 <= tail_tokens <= max_tokens - 2:
            raise CheckpointError(f"tail_tokens must be in 0..{max_tokens - 2}, got {tail_tokens}")
        self.model = model.eval()
        self.config = config
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.tail_tokens = tail_tokens
        self.token_map = token_map
        self.distribution = distribution
        self._packed: PackedWeights | None = None
        self._rounded: Bf16Products | None = None
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @property
    def device(self) -> torch.device:
        return self.model.score_head.weight.device

    @property
    def uses_kernels(self) -> bool:
        """Whether scores come from the project's kernels: on a GPU, for models with BERT's own activation."""
        return self.device.type == "cuda" and self.config.hidden_act == ACTIVATION

    def packed_weights(self) -> PackedWeights:
        """The model's weights as the kernels read them: its own memory, packed when first asked for."""
        if self._packed is None or not self._packed.is_shared_with(self.model):
            with torch.inference_mode(False):  # the model must stay trainable
                self._packed = PackedWeights.sharing(self.model)
        return self._packed

    @classmethod
    def from_pretrained(
        cls, path: str | Path = "default", *, device: str | torch.device | None = None
    ) -> "Ranker":
        """Load a ranker directory, or one in the package: `default`, or `small`, its student for the CPU.

        Weights are copied to private memory, float32 on the CPU and float16 on a GPU. A CPU that multiplies
        bf16 natively scores with linear layers in bf16 (`bf16_products`).

        Args:
            path: a directory written by `save_pretrained` or `pars-fast train`, `default` or `small`.
            device: where to run; None takes the GPU where there is one.
        Raises: CheckpointError: if the directory is missing, damaged, of another architecture, or holds
            weights that are not finite.
        """
        directory = checkpoint_directory(path)
        settings = read_config(directory)
        section = settings.get("pars_fast")
        if not isinstance(section, dict) or section.get("pooling") not in get_args(Pooling):
            raise CheckpointError(
                f"{directory}: config.json has no pars_fast section with a pooling, so this is an encoder "
                "without a score head; make a ranker of it with `pars-fast train --init`"
            )
        window = {name: section.get(name, value) for name, value in WINDOW.items()}
        for name, value in window.items():
            if not isinstance(value, int):
                raise CheckpointError(f"{directory}: {name} must be a whole number, got {value!r}")
        token_map = _knots(directory, section, "token_map", TokenMap)
        distribution = _knots(directory, section, "distribution", LengthDistribution)
        model, config = _build(directory, settings, section["pooling"])
        _load_weights(directory, model)
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(
            model.to(target, torch.float16 if target.type == "cuda" else torch.float32),
            config,
            _read_tokenizer(directory, config),
            **window,
            token_map=token_map,
            distribution=distribution,
        )

    @classmethod
    def from_encoder(
        cls, path: str | Path, *, pooling: Pooling, max_tokens: int = MAX_TOKENS, tail_tokens: int = 0
    ) -> "Ranker":
        """A ranker with an untrained score head on a BERT-family encoder (directory), in float32 on the CPU.

        Raises: CheckpointError: as `from_pretrained`.
        """
        directory = Path(path)
        model, config = _build(directory, read_config(directory), pooling)
        _load_weights(directory, model, new_head=True)
        tokenizer = _read_tokenizer(directory, config)
        return cls(model, config, tokenizer, max_tokens=max_tokens, tail_tokens=tail_tokens)

    def keep_layers(self, count: int) -> None:
        """Drop all but the first `count` layers of the encoder, as a start for training a faster ranker.

        Raises: CheckpointError: if it has not that many.
        """
        if not 1 <= count <= self.config.num_hidden_layers:
            raise CheckpointError(f"layers must be in 1..{self.config.num_hidden_layers}, got {count}")
        self.model.encoder.layer = self.model.encoder.layer[:count]
        self.config.num_hidden_layers = count

    def score(self, prompts: Sequence[str], *, batch_tokens: int | None = None) -> Tensor:
        """Score prompts: (B,) float32 on the CPU, in the order given; larger = longer expected answer.

        Of a prompt longer than the window its head and tail are read. `batch_tokens` bounds the tokens of one
        forward; None takes what suits the device.

        Raises: PromptError: if there is no prompt, or one is empty or no text; names its position.
        """
        if isinstance(prompts, str):
            raise PromptError("prompts must be a list of strings, got one string; wrap it in a list")
        ids = self.encode(prompts)
        batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS)
        return torch.cat([self.score_ids(batch).cpu() for batch in batches(ids, batch_tokens)])

    def expected_tokens(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Expected output tokens of each prompt, (N,) float64: `score` through the token map.

        Raises: CheckpointError: if there is no map. PromptError: as `score`.
        """
        return self.required_token_map()(self.score(prompts).numpy())

    def required_token_map(self) -> TokenMap:
        """`token_map`. Raises: CheckpointError: if there is none."""
        if self.token_map is None:
            raise CheckpointError(
                "the ranker has no map from scores to tokens; train it with `pars-fast train`, which fits one"
            )
        return self.token_map

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """WordPiece ids of each prompt, as much as the window holds. Raises: PromptError: as `score`."""
        return encode(self.tokenizer, prompts, self.max_tokens, self.tail_tokens)

    @torch.inference_mode()
    def score_ids(self, batch: PackedBatch) -> Tensor:
        """Score a packed batch of WordPiece ids: (B,) float32 on the ranker's device.

        Raises: PromptError: if an id lies outside the vocabulary, or a prompt has no token or more than the
            encoder has positions (checked for batches in host memory; on a GPU a check would wait for it).
        """
        max_seqlen = self.config.max_position_embeddings
        if batch.input_ids.device.type == "cpu":
            max_seqlen = self._check(batch)
        batch = batch.to(self.device)
        if not self.uses_kernels:
            return self._scoring_model()(batch.input_ids, batch.cu_seqlens)
        from pars_fast.fused_encoder import score_packed  # Triton is not there on every platform

        return score_packed(self.packed_weights(), batch.input_ids, batch.cu_seqlens, max_seqlen=max_seqlen)

    def _scoring_model(self) -> ScoreModel:
        """Outside the kernels: on a CPU that has bf16, a copy that multiplies in it."""
        if self.device.type != "cpu" or not native_bf16():
            return self.model
        if self._rounded is None or not self._rounded.is_of(self.model):
            self._rounded = Bf16Products(self.model)
        return self._rounded.model

    def _check(self, batch: PackedBatch) -> int:
        """The longest prompt's tokens. Raises: PromptError: as `score_ids`."""
        bounds, positions = batch.cu_seqlens, self.config.max_position_embeddings
        lengths = bounds.diff()
        if not len(lengths) or bounds[0] != 0 or bounds[-1] != len(batch.input_ids) or lengths.min() < 1:
            raise PromptError(
                f"cu_seqlens must rise from 0 to {len(batch.input_ids)}, the number of ids, without a repeat"
            )
        if (longest := int(lengths.max())) > positions:
            raise PromptError(f"a prompt has {longest} tokens, the encoder takes at most {positions}")
        low, high = batch.input_ids.aminmax()
        if low < 0 or high >= self.config.vocab_size:
            raise PromptError(
                f"token ids must be in 0..{self.config.vocab_size - 1}, got {int(low)}..{int(high)}"
            )
        return longest

    def save_pretrained(self, path: str | Path) -> None:
        """Write the directory that `from_pretrained` reads; weights as float16.

        Raises: OSError: if the directory cannot be written.
        """
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        section: dict[str, Any] = {
            "pooling": self.model.pooling,
            "max_tokens": self.max_tokens,
            "tail_tokens": self.tail_tokens,
        }
        if self.token_map is not None:
            section["token_map"] = asdict(self.token_map)
        if self.distribution is not None:
            section["distribution"] = asdict(self.distribution)
        settings = {
            **asdict(self.config),
            "architectures": ["BertModel"],
            "model_type": "bert",
            "dtype": "float16",
            "pars_fast": section,
        }
        (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        weights = {name: value.half().contiguous() for name, value in self.model.state_dict().items()}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        self.tokenizer.save(str(directory / "tokenizer.json"))
        tokenizer_config = {"tokenizer_class": "BertTokenizerFast", "model_max_length": self.max_tokens}
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def is_ranker(directory: Path) -> bool:
    """Whether a model directory holds a ranker, and not just an encoder.

    Raises: CheckpointError: if it has no readable config.json.
    """
    return "pars_fast" in read_config(directory)


def read_config(directory: Path) -> dict[str, Any]:
    """The content of a model directory's config.json. Raises: CheckpointError: if it cannot be read."""
    try:
        settings = json.loads((directory / "config.json").read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory}: no config.json there; give a directory written by `pars-fast train` or a "
            "BERT-family model directory"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}/config.json: cannot be read ({error})") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{directory}/config.json: expected a JSON object")
    return settings


def read_length_distribution(path: str | Path) -> LengthDistribution:
    """The distribution of a ranker's lengths by log expected tokens, without loading its weights.

    Raises: CheckpointError: if there is no ranker, or it has no distribution or no token map.
    """
    directory = checkpoint_directory(path)
    section = read_config(directory).get("pars_fast")
    section = section if isinstance(section, dict) else {}
    token_map = _knots(directory, section, "token_map", TokenMap)
    distribution = _knots(directory, section, "distribution", LengthDistribution)
    if token_map is None or distribution is None:
        raise CheckpointError(
            f"{directory}: no distribution of lengths there, which this policy orders by; fit one with "
            "`pars-fast calibrate`"
        )
    return distribution.by_tokens(token_map)


def _build(directory: Path, settings: dict[str, Any], pooling: Pooling) -> tuple[ScoreModel, EncoderConfig]:
    given = {**SUPPORTED, "model_type": None, **settings}
    for key, wanted in SUPPORTED.items():
        if given[key] != wanted:
            raise CheckpointError(
                f"{directory}: {key} is {given[key]!r}, not {wanted!r}; only BERT-family encoders "
                "(BERT, MiniLM, BGE) are supported"
            )
    try:
        config = EncoderConfig.read(settings)
        return ScoreModel(config, pooling), config
    except Exception as error:  # what torch raises of sizes beyond any memory shares no narrower base
        reason = f"no encoder can be built from it ({error})"
        raise CheckpointError(f"{directory}/config.json: {reason}") from error


def _knots(directory: Path, section: dict[str, Any], name: str, kind: Callable[..., Knots]) -> Knots | None:
    """The score-to-token map or the distribution, as `asdict` wrote it."""
    if (knots := section.get(name)) is None:
        return None
    try:
        return kind(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in knots.items()}
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}/config.json: damaged {name} ({error})") from error


def _read_tokenizer(directory: Path, config: EncoderConfig) -> Tokenizer:
    try:
        if (directory / "vocab.txt").exists() and not (directory / "tokenizer.json").exists():
            from transformers import BertTokenizerFast  # takes seconds to import

            slow_files = BertTokenizerFast.from_pretrained(directory, local_files_only=True)
            tokenizer = slow_files.backend_tokenizer
        else:
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{directory}: the tokenizer files are missing or damaged ({error})") from error
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the encoder "
            f"{config.vocab_size}; they belong to different models"
        )
    return tokenizer


def _load_weights(directory: Path, model: ScoreModel, *, new_head: bool = False) -> None:
    path = directory / "model.safetensors"
    try:
        weights = load_safetensors(path.read_bytes())  # a copy: a file truncated later cannot hurt us
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory}: no model.safetensors there; other formats are not read"
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error})") from error
    weights = {name.removeprefix("bert."): value for name, value in weights.items()}
    wanted = model.state_dict()
    if new_head:
        weights |= {name: value for name, value in wanted.items() if name.startswith("score_head.")}
    for name, value in wanted.items():
        if name not in weights:
            raise CheckpointError(f"{path}: no tensor {name!r}; the weights are of another architecture")
        if weights[name].shape != value.shape:
            raise CheckpointError(
                f"{path}: {name!r} is {tuple(weights[name].shape)}, config.json says {tuple(value.shape)}"
            )
        if not weights[name].isfinite().all():
            raise CheckpointError(f"{path}: {name!r} holds NaN or infinity")
    model.load_state_dict({name: weights[name].to(value.dtype) for name, value in wanted.items()})
