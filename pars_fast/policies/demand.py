"""What an application will cost, predicted when its first request arrives.

Cost: KV cache tokens held, summed over steps, p * d + d^2 / 2 for a request of p prompt and d output tokens.
Source: Justitia (arXiv 2510.17015), which reads TF-IDF features of the prompt. EngineCore has no text and
traces have none either, so the features here are the first prompt's length and the application's type; each
type has a network of its own, which learns the fan-out of the type with its lengths.

The file that `pars-fast fairness demand` writes is JSON; nothing in it is executed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pars_fast.errors import DataError
from pars_fast.policies.applications import Application

ANY_TYPE = ""  # the network for types that were not trained on
HIDDEN = (8, 8)
_MAX_LOG_COST = math.log(1e18)  # what a damaged or far extrapolating network can say at most


def token_time(prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> NDArray[np.float64]:
    """KV token-time of requests, p * d + d^2 / 2, in tokens times steps; float64, shaped as the arguments."""
    prompts, outputs = np.asarray(prompt_tokens, np.float64), np.asarray(output_tokens, np.float64)
    return prompts * outputs + outputs * outputs / 2


class Demand(Protocol):
    """Predicts the cost > 0 of an application from its first request; must not raise."""

    def __call__(self, application: Application, prompt_tokens: int) -> float: ...


@dataclass(frozen=True, slots=True)
class ConstantDemand:
    """Every application is one request with an answer of `output_tokens`: what is there before training."""

    output_tokens: float = 256.0

    def __call__(self, application: Application, prompt_tokens: int) -> float:
        return prompt_tokens * self.output_tokens + self.output_tokens**2 / 2


@dataclass(frozen=True, slots=True)
class Network:
    """log cost from log prompt tokens: fully connected layers with ReLU between them.

    `weights` are (inputs, outputs) matrices; `centre` and `spread` are of the input; `scale` makes the mean
    of what is predicted right, where the network alone would give a kind of median.
    """

    weights: Sequence[Sequence[Sequence[float]]]
    biases: Sequence[Sequence[float]]
    centre: float
    spread: float
    scale: float

    def __call__(self, prompt_tokens: int) -> float:
        # Lists, not arrays: 88 weights take less time than numpy's first call.
        values = [(math.log(max(1, prompt_tokens)) - self.centre) / self.spread]
        last = len(self.weights) - 1
        for layer, (weights, biases) in enumerate(zip(self.weights, self.biases, strict=True)):
            sums = list(biases)
            for value, row in zip(values, weights, strict=True):
                if value:
                    sums = [total + value * weight for total, weight in zip(sums, row, strict=True)]
            values = sums if layer == last else [max(0.0, total) for total in sums]
        return self.scale * math.exp(min(values[0], _MAX_LOG_COST))


@dataclass(frozen=True, slots=True)
class MlpDemand:
    """A network for each type of application, and one for all other types."""

    networks: Mapping[str, Network]

    def __call__(self, application: Application, prompt_tokens: int) -> float:
        network = self.networks.get(application.type) or self.networks[ANY_TYPE]
        return max(1.0, network(prompt_tokens))

    def save(self, path: Path) -> None:
        """Write the file that `load_demand` reads. Raises: OSError: if it cannot be written."""
        content = {name: asdict(network) for name, network in self.networks.items()}
        path.write_text(json.dumps({"demand": content}) + "\n")


def load_demand(path: Path) -> MlpDemand:
    """Read what `MlpDemand.save` wrote, and try it once.

    Raises: DataError: if it is not such a file.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())["demand"]
        demand = MlpDemand({name: Network(**fields) for name, fields in content.items()})
        costs = [network(1) for network in demand.networks.values()]
        if ANY_TYPE not in content or not all(math.isfinite(cost) for cost in costs):
            raise ValueError("a network for other types is missing, or one gives no number")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{path}: not a file that `pars-fast fairness demand` wrote ({error!r})") from error
    return demand


def fit_demand(
    types: Sequence[str], first_prompt_tokens: ArrayLike, costs: ArrayLike, *, seed: int = 0
) -> MlpDemand:
    """Train on finished applications, one entry each; costs > 0. Needs scikit-learn.

    A type of fewer than 20 applications is left to the network for all types.
    """
    names, prompts = np.asarray(types), np.asarray(first_prompt_tokens, np.float64)
    targets = np.asarray(costs, np.float64)
    networks = {ANY_TYPE: _fit(prompts, targets, seed)}
    for name in sorted(set(types) - {ANY_TYPE}):
        of_type = names == name
        if of_type.sum() >= 20:
            networks[name] = _fit(prompts[of_type], targets[of_type], seed)
    return MlpDemand(networks)


def _fit(prompt_tokens: NDArray[np.float64], costs: NDArray[np.float64], seed: int) -> Network:
    from sklearn.neural_network import MLPRegressor

    features = np.log(np.maximum(1.0, prompt_tokens))
    centre, spread = float(features.mean()), float(features.std()) or 1.0
    inputs, targets = ((features - centre) / spread)[:, None], np.log(costs)
    middle, width = float(targets.mean()), float(targets.std()) or 1.0
    model = MLPRegressor(
        hidden_layer_sizes=HIDDEN, solver="lbfgs", alpha=1e-2, max_iter=500, random_state=seed
    )
    model.fit(inputs, (targets - middle) / width)
    *first, last = model.coefs_
    *first_bias, last_bias = model.intercepts_
    predicted = np.exp(model.predict(inputs) * width + middle)
    return Network(
        [matrix.tolist() for matrix in (*first, last * width)],
        [bias.tolist() for bias in (*first_bias, last_bias * width + middle)],
        centre,
        spread,
        scale=float(costs.mean() / predicted.mean()),
    )
