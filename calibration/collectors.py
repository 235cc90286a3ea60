"""Ranges of values, collected in one pass over pieces in any order, bit for bit the same.

What is kept of the values is how many there are of each magnitude, in bins that do not depend on them: a bin is the top
of a float32's bits, 32 to each power of two. So pieces are merged by adding integers, and a million tokens take no more
memory than one. Every method's answer follows from these counts and from the largest magnitude, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from stca.arrays import Array
from stca.errors import StcaError

Granularity = Literal["tensor", "head", "channel", "token"]
Method = Literal["absmax", "percentile", "entropy", "mse"]

# Bits of a float32 below those that make a bin: 18 leave the exponent and 5 bits of the fraction.
_DROPPED: Final = 18
_BINS: Final = 0x7F800000 >> _DROPPED
# Where each bin begins, and where the last one ends; the last is infinity, of which there are none.
_EDGES: Final = (np.arange(_BINS + 1, dtype=np.uint32) << _DROPPED).view(np.float32)
_TRIED: Final = 512  # thresholds that entropy and mse choose among, the bins below the largest magnitude
_PERCENTILE: Final = 99.99
_LINEAR: Final = 2048  # bins of the histogram that entropy looks at


@dataclass(frozen=True)
class Magnitudes:
    """How many values have which magnitude, for each group of them.

    Attributes:
        counts: `(groups, bins)` int64.
        largest: `(groups,)` float32, the largest magnitude; 0 where there is no value.
    """

    counts: Array
    largest: Array

    def merged(self, other: Magnitudes) -> Magnitudes:
        """Of the values of both."""
        return Magnitudes(self.counts + other.counts, np.maximum(self.largest, other.largest))


class Collector:
    """Collects the magnitudes of one tensor, which comes in pieces along its first axis.

    Args:
        granularity: what has a range of its own: the `tensor`; each `head` (all axes but the first and the last); each
            `channel` (all axes but the first); or each `token`, of which the tensor has as many as it likes: what is
            collected then is the largest magnitude of each head of a token.
    """

    def __init__(self, granularity: Granularity) -> None:
        self.granularity = granularity
        self.found: Magnitudes | None = None
        self._shape: tuple[int, ...] = ()

    def add(self, values: Array) -> None:
        """Count the values of `(tokens, …, channels)` float32, or less precise ones.

        Raises:
            StcaError: when one is NaN or infinite, or the shape is another than before.
        """
        x = np.abs(np.asarray(values, np.float32))
        if not np.isfinite(x).all():
            raise StcaError("holds NaN or infinite values; no range covers those, so mend the model or the trace")
        grouped, shape = self._grouped(x)
        if self.found is not None and shape != self._shape:
            raise StcaError(f"has groups of shape {list(shape)}, before {list(self._shape)}")
        self._shape = shape
        here = _magnitudes(grouped)
        self.found = here if self.found is None else self.found.merged(here)

    def ranges(self, method: Method = "absmax", levels: int = 127) -> Array:
        """The magnitude that each group's largest level stands for, float32, of a shape that multiplies the tensor.

        Args:
            method: `absmax`, nothing is cut; `percentile`, one value in 10 000 is; `mse`, the least mean squared error;
                `entropy`, the least divergence of the quantized values' distribution (as in TensorRT's calibrator).
            levels: positive levels of the quantized type.

        Raises:
            StcaError: when no value was seen.
        """
        if self.found is None or not self.found.counts.any():
            raise StcaError("no value was seen; record requests with histories")
        choose = _METHODS[method]
        pairs = zip(self.found.counts, self.found.largest, strict=True)
        made = [largest if largest == 0 else choose(counts, largest, levels) for counts, largest in pairs]
        return np.minimum(np.array(made, np.float32), self.found.largest).reshape(self._shape)

    def _grouped(self, x: Array) -> tuple[Array, tuple[int, ...]]:
        """The values as `(groups, values)`, and the groups' own shape with ones where a group goes on."""
        if x.ndim < 2:
            raise StcaError(f"has shape {list(x.shape)}; ranges are of tensors with a row per token")
        inner = x.shape[1:]
        heads = int(np.prod(inner[:-1]))
        if self.granularity == "token":
            return x.reshape(len(x), heads, inner[-1]).max(axis=-1, initial=0.0).reshape(1, -1), (1,) * len(inner)
        if self.granularity == "tensor":
            return x.reshape(1, -1), (1,) * len(inner)
        if self.granularity == "channel":
            return x.reshape(len(x), int(np.prod(inner))).T, inner
        return x.reshape(len(x), heads, inner[-1]).swapaxes(0, 1).reshape(heads, -1), (*inner[:-1], 1)


def _magnitudes(x: Array) -> Magnitudes:
    """Of `(groups, values)`, which are not negative."""
    groups = len(x)
    bins = np.ascontiguousarray(x).view(np.uint32) >> _DROPPED
    flat = bins.astype(np.int64) + np.arange(groups, dtype=np.int64)[:, None] * _BINS
    counts = np.bincount(flat.reshape(-1), minlength=groups * _BINS).reshape(groups, _BINS)
    return Magnitudes(counts, x.max(axis=1, initial=0.0).astype(np.float32))


def _absmax(_: Array, largest: Array, __: int) -> Array:
    return largest


def _percentile(counts: Array, largest: Array, levels: int) -> Array:
    """The end of the bin in which that share of all values, zeros included, is reached."""
    reached = np.searchsorted(np.cumsum(counts), np.ceil(counts.sum() * _PERCENTILE / 100))
    return np.asarray(_EDGES[reached + 1])


def _candidates(counts: Array) -> Array:
    """Ends of the bins at and below the largest magnitude's, the largest first."""
    last = int(np.flatnonzero(counts)[-1])
    return np.arange(last + 1, max(0, last + 1 - _TRIED), -1)


def _mse(counts: Array, largest: Array, levels: int) -> Array:
    """The threshold with the least squared error, as if a bin's values lay in its middle, the last one's at its end.

    A value beyond the threshold is cut to it; one below is off as by rounding, a uniform error of a step, or by itself
    where that is less.
    """
    middles = (_EDGES[:-1].astype(np.float64) + _EDGES[1:]) / 2
    held = np.flatnonzero(counts)
    middles, weights = np.append(middles[held[:-1]], float(largest)), counts[held]
    ends = np.minimum(_EDGES[_candidates(counts)].astype(np.float64), float(largest))
    steps = ends / levels
    errors = [
        float(weights @ np.where(middles >= end, (middles - end) ** 2, np.minimum(middles**2, step**2 / 12)))
        for end, step in zip(ends, steps, strict=True)
    ]
    return np.asarray(ends[int(np.argmin(errors))], np.float32)


def _entropy(counts: Array, largest: Array, levels: int) -> Array:
    """The threshold whose quantized distribution diverges least from the distribution with its tail put on it."""
    # The bins' counts as a histogram of equal widths: a bin's values lie evenly in it.
    grid = np.linspace(0.0, float(largest), _LINEAR + 1)
    edges = np.minimum(_EDGES.astype(np.float64), float(largest))
    edges[-1] = float(largest)
    below = np.concatenate([[0], np.cumsum(counts)])
    keep = np.concatenate([np.diff(edges) > 0, [True]])
    histogram = np.diff(np.interp(grid, edges[keep], below[keep]))
    sizes = np.arange(levels + 1, _LINEAR + 1, max(1, (_LINEAR - levels) // _TRIED))[::-1]
    losses = [_divergence(histogram, int(size), levels + 1) for size in sizes]
    return np.asarray(grid[sizes[int(np.argmin(losses))]], np.float32)


def _divergence(histogram: Array, size: int, levels: int) -> float:
    """Kullback-Leibler divergence of the first `size` bins, spread over `levels`, from themselves with the tail."""
    inner = histogram[:size]
    true = inner.copy()
    true[-1] += histogram[size:].sum()
    level = np.arange(size) * levels // size
    some = inner > 0
    mass = np.bincount(level, inner, levels)
    width = np.bincount(level, some, levels)
    spread = np.where(some, (mass / np.maximum(width, 1))[level], 0.0)
    p, q = true / true.sum(), spread / max(spread.sum(), 1e-300)
    both = (p > 0) & (q > 0)
    missed = float(p[(p > 0) & (q == 0)].sum())
    return float((p[both] * np.log(p[both] / q[both])).sum() + missed * np.log(1e12))


_METHODS: Final[Mapping[Method, Callable[[Array, Array, int], Array]]] = {
    "absmax": _absmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
