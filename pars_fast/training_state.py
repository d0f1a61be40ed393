"""What an unfinished training run can be resumed from: one file, `OUT/state`.

It holds the weights, the optimiser's moments and where the run stands, and is replaced in one step: whenever
a run is killed, a whole state of it is there.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pars_fast.data import LabelledPrompts
from pars_fast.errors import ParsFastError

_WEIGHT = "weight"  # beside it the optimiser's own names of a parameter's moments
_ADVICE = "give another --out, or remove it"


@dataclass(slots=True)
class Progression:
    """Where a run stands; with the weights and the optimiser's moments it is all that a resume needs."""

    step: int = 0
    best_pair_accuracy: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)


class TrainingState:
    """The state in `out` of the run that has this fingerprint."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self._path, self._fingerprint = out / "state", fingerprint

    def save(self, model: nn.Module, optimizer: Any, progression: Progression) -> None:
        """Put this state in the place of the last one."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        tensors = {f"{_WEIGHT}|{name}": value.contiguous() for name, value in model.state_dict().items()}
        for parameter, moments in optimizer.state.items():
            tensors |= {f"{moment}|{names[parameter]}": value for moment, value in moments.items()}
        record = {"fingerprint": self._fingerprint, **asdict(progression)}
        fresh = self._path.with_name(self._path.name + ".part")
        save_file(tensors, fresh, metadata={"run": json.dumps(record)})
        fresh.replace(self._path)

    def load(self, model: nn.Module, optimizer: Any, device: torch.device) -> Progression:
        """Give the weights to `model`, the moments to `optimizer`; where there is no state, nothing.

        Returns: where the run stands.
        Raises: ParsFastError: if the state is of another run, damaged, or of an earlier version.
        """
        if not self._path.exists():
            return Progression()
        try:
            with safe_open(self._path, framework="pt") as file:
                record = json.loads(file.metadata()["run"])
            tensors = load_file(self._path, device=str(device))
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ParsFastError(
                f"{self._path} is damaged, or of an earlier version ({error}); {_ADVICE}"
            ) from error
        if record.pop("fingerprint", None) != self._fingerprint:
            raise ParsFastError(
                f"{self._path} is of a run with other starting weights, recipe or data; {_ADVICE}"
            )
        parameters, weights = dict(model.named_parameters()), {}
        for key, value in tensors.items():
            kind, name = key.split("|")
            if kind == _WEIGHT:
                weights[name] = value
            else:
                optimizer.state[parameters[name]][kind] = value
        model.load_state_dict(weights)
        return Progression(**record)

    def remove(self) -> None:
        """Once the run is done."""
        self._path.unlink(missing_ok=True)


def fingerprint(settings: Mapping[str, Any], start: nn.Module, *splits: LabelledPrompts) -> str:
    """A hash of all that a run depends on: its settings, starting weights and labelled prompts."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for weight in start.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    for split in splits:
        digest.update("\0".join(split.prompts).encode("utf-8", "surrogatepass"))
        digest.update(split.log_length.tobytes())
    return digest.hexdigest()
