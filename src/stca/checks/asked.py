"""The requests that every stage of a bundle is asked, as each stage takes them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stca import probe
from stca.arrays import Array
from stca.checks.row_by_row import with_fewer_copies
from stca.manifest import Manifest
from stca.runtime.request import Door

# (history tokens, targets); a list of several is one ragged batch.
PROBES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 16),),
    ((1, 16),),
    ((64, 1),),
    ((1000, 300),),
    ((5, 3), (0, 2), (40, 4)),
    ((300, 3), (700, 3)),
)
# And one without about half of its events: among random ids, hardly one is the id that says so.
WITH_GAPS: tuple[tuple[int, int], ...] = ((40, 5),)


@dataclass(frozen=True)
class Asked:
    """Batches of requests, the last one with gaps.

    Attributes:
        sizes: of each batch, the history tokens and targets of its requests.
        batches: of each batch, its requests' inputs.
        feeds: of each batch, the request graph's inputs.
    """

    sizes: Sequence[Sequence[tuple[int, int]]]
    batches: Sequence[Sequence[dict[str, Array]]]
    feeds: Sequence[dict[str, Array]]

    @classmethod
    def of(
        cls, manifest: Manifest, probes: Sequence[Sequence[tuple[int, int]]], seed: int, *, few_copies: bool
    ) -> Asked:
        """Random requests of the sizes `probes`, as far as the bundle takes them, and `WITH_GAPS`.

        Args:
            manifest: of the bundle.
            probes: sizes, as in `PROBES`.
            seed: of the values.
            few_copies: ask fewer targets of a long history, which is copied to each.
        """
        specs, rng = manifest.graphs["request"].inputs, np.random.default_rng(seed)
        ragged = Door(manifest).ragged
        sizes = [*(batch for batch in probes if ragged or len(batch) == 1), WITH_GAPS]
        if few_copies:
            sizes = [(request,) for batch in sizes for one in batch for request in with_fewer_copies(specs, *one)]
        shortest, longest = manifest.min_history or 0, manifest.max_history or sys.maxsize
        sizes = [tuple((min(max(n, shortest), longest), m) for n, m in batch) for batch in sizes]
        batches = [[probe.single(specs, n, m, rng) for n, m in batch] for batch in sizes]
        batches[-1] = [probe.padded(specs, request, rng) for request in batches[-1]]
        return cls(sizes, batches, [probe.pack(specs, batch) for batch in batches])

    @property
    def targets(self) -> list[list[int]]:
        """Of each batch, its requests' numbers of targets."""
        return [[m for _, m in batch] for batch in self.sizes]

    def apart(self, manifest: Manifest) -> list[list[dict[str, Array]]]:
        """Of each batch of several, the request graph's inputs of each request alone."""
        specs = manifest.graphs["request"].inputs
        return [[probe.pack(specs, [r]) for r in batch] if len(batch) > 1 else [] for batch in self.batches]

    def without_gaps(self) -> Asked:
        """All but the last batch."""
        return dataclasses.replace(self, sizes=self.sizes[:-1], batches=self.batches[:-1], feeds=self.feeds[:-1])
