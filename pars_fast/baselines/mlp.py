"""A small fully connected network on fixed features, as ALISE and ELIS use one."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pars_fast.losses import Loss, huber
from pars_fast.metrics import kendall_tau

EPOCHS = 40
PATIENCE = 6  # epochs without a better held-out tau
BATCH = 64
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-2
HELD_OUT = 0.1


def build_mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fit_mlp(
    features: NDArray[np.float32],
    targets: NDArray[np.float64],
    hidden: Sequence[int],
    seed: int,
    loss: Loss = huber,
) -> nn.Sequential:
    """Minimise a loss by AdamW; the epoch that orders a held-out tenth of the rows best is kept.

    Args:
        features: (n, H) float32.
        targets: (n,) in log tokens.
        hidden: widths between H and the one output.
    """
    torch.manual_seed(seed)
    x, y = torch.from_numpy(features), torch.from_numpy(targets.astype(np.float32))
    centre, spread = x.mean(dim=0), x.std(dim=0, correction=0) + 1e-6
    x = (x - centre) / spread
    order = torch.randperm(len(x))
    held, kept = order[: max(1, round(len(x) * HELD_OUT))], order[max(1, round(len(x) * HELD_OUT)) :]
    model = build_mlp([x.shape[1], *hidden, 1])
    last = model[-1]
    assert isinstance(last, nn.Linear)
    nn.init.constant_(last.bias, float(y.mean()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best, best_tau, waited = model.state_dict(), -2.0, 0
    for _ in range(EPOCHS):
        for rows in kept[torch.randperm(len(kept))].split(BATCH):
            optimizer.zero_grad()
            loss(model(x[rows])[:, 0], y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            tau = kendall_tau(model(x[held])[:, 0].numpy(), y[held].numpy())
        waited += 1
        if tau > best_tau:
            best = {name: value.clone() for name, value in model.state_dict().items()}
            best_tau, waited = tau, 0
        elif waited == PATIENCE:
            break
    model.load_state_dict(best)
    first = model[0]
    assert isinstance(first, nn.Linear)
    with torch.no_grad():  # the standardisation becomes part of the first layer
        first.weight.div_(spread)
        first.bias.sub_(first.weight @ centre)
    return model.requires_grad_(False)


def mlp_tensors(model: nn.Sequential) -> dict[str, Tensor]:
    return {f"mlp.{name}": value for name, value in model.state_dict().items()}


def mlp_from_tensors(tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """The network that gave these tensors; others are passed over."""
    state = {name.removeprefix("mlp."): value for name, value in tensors.items() if name.startswith("mlp.")}
    names = sorted((name for name in state if name.endswith("weight")), key=_position)
    weights = [state[name] for name in names]
    model = build_mlp([weights[0].shape[1], *(weight.shape[0] for weight in weights)])
    model.load_state_dict(state)
    return model.requires_grad_(False)


def _position(name: str) -> int:
    return int(name.split(".")[0])
