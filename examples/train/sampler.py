"""How long a history to train on: sparse in training, dense at inference (length extrapolation, arXiv 2511.06077)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stca.errors import StcaError
from stca.examples.train.log import Inputs, Log

MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class LengthSampler:
    """`L = shortest + s · (longest - shortest)`, `s ~ Beta(alpha, beta)`, rounded to a multiple of 8.

    With `alpha, beta < 1` the distribution is U-shaped: most histories are near the shortest, which is cheap, or near
    the longest, which teaches the model what long ones look like.
    """

    shortest: int = 128
    longest: int = 2048
    alpha: float = 0.5
    beta: float = 0.5

    def __post_init__(self) -> None:
        for name in ("shortest", "longest"):
            if getattr(self, name) % MULTIPLE or getattr(self, name) < MULTIPLE:
                raise StcaError(
                    f"{name} history is {getattr(self, name)}; it must be a positive multiple of {MULTIPLE}"
                )
        if self.shortest > self.longest:
            raise StcaError(f"shortest history {self.shortest} is above the longest, {self.longest}; swap them")
        if not (0 < self.alpha < 1 and 0 < self.beta < 1):
            raise StcaError(f"Beta({self.alpha}, {self.beta}) is not U-shaped; both parameters must be between 0 and 1")

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths, int64."""
        s = rng.beta(self.alpha, self.beta, count)
        exact = self.shortest + s * (self.longest - self.shortest)
        return MULTIPLE * np.rint(exact / MULTIPLE).astype(np.int64)


def training_batches(
    log: Log,
    sampler: LengthSampler,
    rng: np.random.Generator,
    *,
    requests: int,
    targets: int,
    least_history: int,
    request_time: bool = False,
) -> Iterator[tuple[Inputs, NDArray[np.float32]]]:
    """Endless ragged batches of `requests` requests: the whole log in random order, again and again.

    Every request keeps its most recent suffix of a length of its own, drawn from `sampler`.

    Raises:
        StcaError: when no user has `least_history` events before an event to train on.
    """
    pool = log.training_requests(targets, least_history)
    if not pool:
        raise StcaError(f"no user has {least_history} events before one to train on; lower the shortest history")
    order: list[int] = []
    while True:
        while len(order) < requests:
            order += rng.permutation(len(pool)).tolist()
        chosen, order = order[:requests], order[requests:]
        lengths = sampler.draw(rng, requests).tolist()
        yield log.batch([pool[i] for i in chosen], lengths, request_time=request_time)
