"""What every predictor of answer length offers, and how the simple ones are kept on disk.

A baseline's directory holds `config.json` and `model.safetensors`; nothing in it is executed.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from pars_fast.baselines.encoder import FrozenEncoder
from pars_fast.calibration import TokenMap
from pars_fast.errors import CheckpointError, PromptError


class Predictor(Protocol):
    """A `Ranker` or a `Baseline`: all that evaluation and a policy need of either."""

    token_map: TokenMap | None

    def score(self, prompts: Sequence[str]) -> Tensor:
        """(B,) float32 on the CPU, in the order given; larger = longer expected answer."""

    def save_pretrained(self, path: str | Path) -> None:
        """Write the directory that `pars_fast.baselines.load_predictor` reads."""


class Baseline(ABC):
    """A predictor that is not an encoder with a score head; one class a file.

    Attributes:
        name: in the registry, on the command line, and in config.json.
        encoder: the encoder it reads prompts with, None if it needs none.
        token_map: isotonic map from score to expected output tokens, None before calibration.
    """

    name: ClassVar[str]
    encoder: FrozenEncoder | None = None
    token_map: TokenMap | None = None

    def score(self, prompts: Sequence[str]) -> Tensor:
        """Score prompts: (B,) float32 on the CPU, in the order given; larger = longer expected answer.

        Raises: PromptError: if there is no prompt, or one string stands in place of a list.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise PromptError("prompts must be a list of strings, at least one")
        return self._score(prompts)

    @abstractmethod
    def _score(self, prompts: Sequence[str]) -> Tensor:
        """As `score`, of one prompt or more."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What was learnt, as `from_tensors` takes it."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], encoder: FrozenEncoder | None) -> Self:
        """The baseline that gave these tensors. Raises: KeyError: if one is missing."""

    def save_pretrained(self, path: str | Path) -> None:
        """Write the directory that `load` reads. Raises: OSError: if it cannot be written."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {"baseline": self.name}
        if self.encoder is not None:
            settings["encoder"] = self.encoder.name
        if self.token_map is not None:
            settings["token_map"] = {"scores": self.token_map.scores, "tokens": self.token_map.tokens}
        (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        save_file(tensors, directory / "model.safetensors")

    @classmethod
    def load(cls, directory: Path, settings: Mapping[str, Any]) -> Self:
        """Read what `save_pretrained` wrote; `settings` is the content of config.json.

        Raises: CheckpointError: if the directory is damaged, or its encoder cannot be had.
        """
        encoder = FrozenEncoder.of(settings["encoder"]) if "encoder" in settings else None
        knots = settings.get("token_map")
        try:
            tensors = load_safetensors((directory / "model.safetensors").read_bytes())
            baseline = cls.from_tensors(tensors, encoder)
            if knots is not None:
                baseline.token_map = TokenMap(tuple(knots["scores"]), tuple(knots["tokens"]))
        except (OSError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{directory}: damaged baseline {cls.name} ({error})") from error
        return baseline
