"""The requests that every stage of a bundle is asked, as each stage takes them."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stca import probe
from stca.arrays import Array
from stca.checks.row_by_row import with_fewer_copies
from stca.checks.tolerance import judged
from stca.manifest import Manifest
from stca.runtime.request import Door, Request
from stca.specs import TOKENS

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


_NO_GAPS = (
    "a request whose user inputs hold the least integer in about half of their places, as padding often does: the "
    "model's own scores are not finite for it, in float64 too"
)


@dataclass(frozen=True)
class Asked:
    """Batches of requests: the last one with gaps, the one before it with large integers, where any have no limit.

    Attributes:
        sizes: of each batch, the history tokens and targets of its requests.
        batches: of each batch, its requests' inputs.
        feeds: of each batch, the request graph's inputs.
        wide: inputs of the integers that are large in the last batch but one.
    """

    sizes: Sequence[Sequence[tuple[int, int]]]
    batches: Sequence[Sequence[dict[str, Array]]]
    feeds: Sequence[dict[str, Array]]
    wide: tuple[str, ...] = ()

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
        wide = tuple(s.name for s in probe.unlimited(specs))
        sizes += sizes[-1:] if wide else []
        batches = [[probe.single(specs, n, m, rng) for n, m in batch] for batch in sizes]
        batches[-1] = [probe.padded(specs, request, rng) for request in batches[-1]]
        if wide:
            batches[-2] = [probe.wide(specs, request, rng) for request in batches[-2]]
        return cls(sizes, batches, [probe.pack(specs, batch) for batch in batches], wide)

    @property
    def targets(self) -> list[list[int]]:
        """Of each batch, its requests' numbers of targets."""
        return [[m for _, m in batch] for batch in self.sizes]

    def apart(self, manifest: Manifest) -> list[list[dict[str, Array]]]:
        """Of each batch of several, the request graph's inputs of each request alone."""
        specs = manifest.graphs["request"].inputs
        return [[probe.pack(specs, [r]) for r in batch] if len(batch) > 1 else [] for batch in self.batches]

    @property
    def optional(self) -> list[tuple[int, str]]:
        """The batches that a model need not have right scores for, and what to say where it has none."""
        if not self.wide:
            return [(-1, _NO_GAPS)]
        large = (
            "a request whose integers without a limit are large: the model's own scores are not right for it. Of "
            f"{', '.join(self.wide)} only values below {probe.MODEST:,} were tried; say what they may hold, as in "
            f"--ids {self.wide[0]}=24"
        )
        return [(-2, large), (-1, _NO_GAPS)]

    def beyond(self, i: int, own: Sequence[Array], reference: Sequence[Array], precision: str) -> bool:
        """Whether the model itself, not what was made of it, has no right scores for a batch of `optional`.

        Args:
            i: of the batch.
            own: the model's scores for each batch in its precision, and `reference` in float64.
            precision: of the model.
        """
        if not np.isfinite(reference[i]).all():
            return True
        return i != -1 and not judged([("", [own[i]])], "", [reference[i]], [self.targets[i]], precision)[0].passed

    def without(self, i: int) -> Asked:
        """All but the batch `i`."""
        sizes, batches, feeds = (without(of, i) for of in (self.sizes, self.batches, self.feeds))
        return dataclasses.replace(self, sizes=sizes, batches=batches, feeds=feeds)


def without(of: Sequence[Any], i: int) -> list[Any]:
    """What there is of each batch, but for that of the batch `i`."""
    return [one for at, one in enumerate(of) if at != i % len(of)]


def in_neighbours(manifest: Manifest, inputs: Mapping[str, Array], most: int) -> Request:
    """A request as one of a user with the first piece of its history, whose neighbours have the others.

    Args:
        manifest: of a bundle whose states are rows of tokens.
        inputs: of the request.
        most: neighbours; fewer where pieces would be shorter than the model takes.
    """
    specs = {s.name: s for s in manifest.graphs["request"].inputs}
    apart = [n for n in inputs if specs[n].shape[:1] == (TOKENS,)]
    tokens = len(inputs[apart[0]])
    if manifest.min_history:
        most = min(most, tokens // manifest.min_history - 1)
    ends = np.linspace(0, tokens, most + 2).astype(int)
    pieces = [
        {n: x[begin:end] if n in apart else x for n, x in inputs.items()} for begin, end in itertools.pairwise(ends)
    ]
    of_users = [n for n in inputs if n in apart or specs[n].scope == "user"]
    return Request(pieces[0], neighbours=[Request({n: piece[n] for n in of_users}) for piece in pieces[1:]])
