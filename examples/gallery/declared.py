"""How a model of the gallery says what goes into it; the modules themselves know nothing of `stca`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from stca.arrays import Array
from stca.export import RequestModel, TensorSpec


@dataclass(frozen=True)
class Input:
    """One input of a model.

    Attributes:
        dtype: of its values.
        shape: fixed sizes as integers, free ones by the model's own names. The first is the batch, but for models
            whose sizes are `N_h` and `N_t`: they take one user's request as it is.
        scope: whose value it is.
        limit: values are whole numbers below it; None for floats of any size and for booleans.
        least: values are at least this; a length that must not be 0 has 1.
    """

    dtype: Literal["int64", "int32", "float32", "bool"]
    shape: tuple[str | int, ...]
    scope: Literal["user", "request", "target"]
    limit: int | None = None
    least: int = 0

    def draw(self, rows: int, history: int, rng: np.random.Generator) -> Array:
        """Random values; the first size is `rows` where it is free or a batch, every other free one is `history`."""
        sizes = [n if isinstance(n, int) else rows if axis == 0 else history for axis, n in enumerate(self.shape)]
        if self.dtype == "float32" and self.limit is None:
            return rng.standard_normal(sizes).astype(self.dtype)
        return rng.integers(self.least, self.limit or 2, sizes).astype(self.dtype)


@dataclass(frozen=True)
class GalleryModel:
    """A recommender as its own community writes it, and what an export needs to know of it.

    Attributes:
        style: one line on what is typical of it.
        module: makes it, with random weights.
        inputs: by name, in the order of `forward`'s parameters.
        history: events of the history it is measured with.
        outputs: names of its outputs.
    """

    style: str
    module: Callable[[], nn.Module]
    inputs: Mapping[str, Input]
    history: int
    outputs: tuple[str, ...] = ("score",)

    def build(self) -> nn.Module:
        """The module in eval mode, with the same weights each time."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(7)
            return self.module().eval()

    def __call__(self) -> RequestModel:
        """What `stca export --model PACKAGE.FILE:MODEL` asks for."""
        limits = {
            n: None if i.dtype.startswith("float") else i.limit for n, i in self.inputs.items()
        }  # floats are no ids
        specs = (TensorSpec(n, i.dtype, i.shape, i.scope, limits[n]) for n, i in self.inputs.items())
        return RequestModel(self.build(), tuple(specs), self.outputs)

    @property
    def pointwise(self) -> bool:
        """Whether users and targets share their batch axis."""
        return not any(n in ("N_h", "N_t") for i in self.inputs.values() for n in i.shape)

    def request(self, history: int, targets: int, seed: int = 0) -> dict[str, Array]:
        """One user with `history` events, and `targets` targets: by scope, the first size is 1 or `targets`."""
        rng = np.random.default_rng(seed)
        rows = {"user": 1 if self.pointwise else history, "request": 1, "target": targets}
        return {name: i.draw(rows[i.scope], history, rng) for name, i in self.inputs.items()}

    def rows(self, request: Mapping[str, Array], first: int, count: int) -> dict[str, Array]:
        """The same request as the model was trained: `count` targets from `first`, each with a copy of its user."""
        return {
            name: x[first : first + count]
            if self.inputs[name].scope == "target"
            else np.repeat(x, count, axis=0)
            if self.pointwise
            else x
            for name, x in request.items()
        }
