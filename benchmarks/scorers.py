"""DIN's attention unit (arXiv 1706.06978) as libraries spell it, by names as `din-conv2d-dice-80x40`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, WIDTH = 5000, 32


class Dice(nn.Module):
    """A gate by batch statistics, of the running ones in evaluation mode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.norm.running_mean, self.norm.running_var = torch.randn(width) / 8, torch.rand(width) + 0.5
        self.alpha = nn.Parameter(torch.rand(width) / 2)

    def forward(self, x: Tensor) -> Tensor:
        turned = x.ndim == 3
        gate = torch.sigmoid(self.norm(x.transpose(1, 2)).transpose(1, 2) if turned else self.norm(x))
        return self.alpha * (1 - gate) * x + gate * x


LAYERS: Final[dict[str, Callable[[int, int], nn.Module]]] = {
    "linear": nn.Linear,
    "rows": nn.Linear,
    "batchnorm": nn.Linear,
    "layernorm": nn.Linear,
    "conv1d": lambda a, b: nn.Conv1d(a, b, 1),
    "conv2d": lambda a, b: nn.Conv2d(a, b, 1),
}
ACTIVATIONS: Final[dict[str, Callable[[int], nn.Module]]] = {
    "sigmoid": lambda _: nn.Sigmoid(),
    "relu": lambda _: nn.ReLU(),
    "prelu": lambda _: nn.PReLU(),
    "dice": Dice,
}


class Din(nn.Module):
    """The unit weighs each event by `[k, q, q - k, q · k]`; a small top MLP reads what is pooled."""

    def __init__(self, unit: str, activation: str, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.unit, sizes, layer = unit, (4 * WIDTH, *hidden), LAYERS[unit]
        layers: list[nn.Module] = [nn.LayerNorm(sizes[0])] if unit == "layernorm" else []
        for a, b in pairwise(sizes):
            layers += [layer(a, b), *[nn.BatchNorm1d(b)] * (unit == "batchnorm"), ACTIVATIONS[activation](b)]
        self.item = nn.Embedding(ITEMS, WIDTH, padding_idx=0)
        self.score = nn.Sequential(*layers, layer(sizes[-1], 1))
        self.top = nn.Sequential(nn.Linear(3 * WIDTH, 80), nn.ReLU(), nn.Linear(80, 1))

    def weights(self, x: Tensor) -> Tensor:
        """Of `x [batch, events, 4 width]`, `[batch, events]`."""
        if self.unit == "conv1d":
            made = self.score(x.transpose(1, 2)).squeeze(1)
        elif self.unit == "conv2d":
            made = self.score(x.permute(0, 2, 1).unsqueeze(-1)).squeeze(-1).squeeze(1)
        elif self.unit in ("rows", "batchnorm"):
            made = self.score(x.reshape(-1, x.shape[-1])).reshape(x.shape[0], x.shape[1])
        else:
            made = self.score(x).squeeze(-1)
        weights: Tensor = made
        return weights

    def forward(self, history: Tensor, item: Tensor) -> Tensor:
        keys, query = self.item(history), self.item(item)
        q = query.unsqueeze(1).expand(-1, keys.shape[1], -1)
        weights = self.weights(torch.cat([keys, q, q - keys, q * keys], -1)).masked_fill(history == 0, 0.0)
        pooled = torch.bmm(weights.unsqueeze(1), keys).squeeze(1)
        return torch.sigmoid(self.top(torch.cat([pooled, query, pooled * query], -1))).squeeze(-1)


def scorer(name: str) -> GalleryModel:
    """The model of a name; ValueError where it is none."""
    _, unit, activation, hidden = name.split("-")
    sizes = tuple(map(int, hidden.split("x")))
    if unit not in LAYERS or activation not in ACTIVATIONS:
        raise ValueError(name)
    inputs = {
        "history": Input("int64", ("batch", "seq"), "user", ITEMS),
        "item": Input("int64", ("batch",), "target", ITEMS),
    }
    return GalleryModel(f"DIN with {unit}, {activation}", lambda: Din(unit, activation, sizes), inputs, history=100)
