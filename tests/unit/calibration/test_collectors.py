"""Collectors against a brute force in float64, on data that tempts them; in pieces of any order, bit for bit."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import get_args

import numpy as np
import pytest

from stca.calibration.collectors import Collector, Method
from stca.errors import StcaError

RNG = np.random.default_rng(0)
SHAPE = (400, 2, 16)
DATA = {
    "normal": RNG.standard_normal(SHAPE),
    "outlier": np.where(RNG.random(SHAPE) < 1e-3, 1e4, 1.0) * RNG.standard_normal(SHAPE),
    "one outlier": np.concatenate([RNG.standard_normal((399, 2, 16)), np.full((1, 2, 16), 1e6)]),
    "constant": np.full(SHAPE, -3.7),
    "one-sided": RNG.exponential(1.0, SHAPE),
    "denormal": RNG.standard_normal(SHAPE) * 1e-40,
    "mostly zero": np.where(RNG.random(SHAPE) < 0.05, RNG.standard_normal(SHAPE), 0.0),
    "huge": RNG.standard_normal(SHAPE) * 1e37,
    "heavy tail": RNG.standard_cauchy(SHAPE),
    "by channel": RNG.standard_normal(SHAPE) * np.logspace(-3, 3, 16),
}
BY = {"tensor": (0, 1, 2), "head": (0, 2), "channel": (0,)}
GROUPS = {"tensor": (1, 1), "head": (2, 1), "channel": (2, 16)}


@pytest.fixture(params=DATA)
def data(request):
    return DATA[request.param].astype(np.float32)


def collected(x, granularity):
    made = Collector(granularity)
    made.add(x)
    return made


def groups(x, granularity):
    """The magnitudes of each group, float64, a row each."""
    a = np.abs(x.astype(np.float64))
    return {
        "tensor": a.reshape(1, -1),
        "head": a.transpose(1, 0, 2).reshape(2, -1),
        "channel": a.reshape(len(a), -1).T,
    }[granularity]


@pytest.mark.parametrize("granularity", BY)
def test_absmax_is_exact(data, granularity):
    found = collected(data, granularity).ranges("absmax")
    assert found.shape == GROUPS[granularity]
    assert np.array_equal(found.reshape(-1), groups(data, granularity).max(axis=1))


@pytest.mark.parametrize("granularity", BY)
def test_percentile_is_the_bin_of_the_order_statistic(data, granularity):
    found = collected(data, granularity).ranges("percentile").reshape(-1)
    for value, magnitudes in zip(found, groups(data, granularity), strict=True):
        ordered = np.sort(magnitudes)
        true = ordered[int(np.ceil(0.9999 * len(ordered))) - 1]
        assert true <= value <= max(true * (1 + 2**-5), true + 2**-131)  # below 2^-126 bins are even


def squared_error(magnitudes, end, levels):
    step = end / levels
    return float(((np.minimum(np.rint(magnitudes / step), levels) * step - magnitudes) ** 2).mean())


@pytest.mark.parametrize("levels", [127, 7])
def test_mse_is_near_the_best_threshold_of_all(data, levels):
    (end,) = collected(data, "tensor").ranges("mse", levels).reshape(-1).astype(np.float64)
    (magnitudes,) = groups(data, "tensor")
    best = min(squared_error(magnitudes, magnitudes.max() * f, levels) for f in np.geomspace(1e-4, 1, 400))
    # A few outliers are met by some thresholds by chance; and below 2^-126 bins are as wide as 2^-131.
    assert squared_error(magnitudes, end, levels) <= 1.3 * best + 2.0**-262


def divergence(magnitudes, end, levels=128):
    """The same divergence from the values themselves: 2048 equal bins up to the largest."""
    counts, edges = np.histogram(magnitudes, 2048, (0.0, magnitudes.max()))
    size = max(levels, int(np.searchsorted(edges, end * (1 - 1e-9))))
    true, inner = counts[:size].astype(float), counts[:size]
    true[-1] += counts[size:].sum()
    level = np.arange(size) * levels // size
    mass, width = np.bincount(level, inner, levels), np.bincount(level, inner > 0, levels)
    q = np.where(inner > 0, (mass / np.maximum(width, 1))[level], 0.0)
    p, q = true / true.sum(), q / q.sum()
    both = (p > 0) & (q > 0)
    return float((p[both] * np.log(p[both] / q[both])).sum() + p[(p > 0) & (q == 0)].sum() * np.log(1e12))


@pytest.mark.parametrize("name", ["normal", "outlier", "one-sided", "mostly zero", "huge", "by channel"])
def test_entropy_is_near_the_least_divergence(name):
    x = DATA[name].astype(np.float32)
    (end,) = collected(x, "tensor").ranges("entropy").reshape(-1).astype(np.float64)
    (magnitudes,) = groups(x, "tensor")
    tried = [divergence(magnitudes, magnitudes.max() * n / 2048) for n in range(129, 2049, 16)]
    assert divergence(magnitudes, end) <= min(tried) + 0.25 * (max(tried) - min(tried)) + 0.01


def test_methods_cut_an_outlier_off_and_keep_what_has_none():
    outlier = collected(DATA["one outlier"].astype(np.float32), "tensor")
    for method in ("percentile", "mse", "entropy"):
        one = collected(DATA["constant"].astype(np.float32), "tensor").ranges(method)
        assert one == pytest.approx(3.7, rel=0.04), method
    assert outlier.ranges("absmax") == 1e6
    assert collected(DATA["heavy tail"].astype(np.float32), "tensor").ranges("percentile") < 1e5


@pytest.mark.parametrize("granularity", [*BY, "token"])
def test_pieces_in_any_order_give_the_same_bits(data, granularity):
    pieces = [data[:7], data[7:7], data[7:150], data[150:]]
    wanted = collected(data, granularity)
    for order in itertools.permutations(range(4)):
        made = collected(pieces[order[0]], granularity)
        for place in order[1:]:
            made.add(pieces[place])
        assert made.found is not None
        assert wanted.found is not None
        assert np.array_equal(made.found.counts, wanted.found.counts)
        assert made.found.largest.tobytes() == wanted.found.largest.tobytes()
    assert made.ranges("mse").tobytes() == wanted.ranges("mse").tobytes()


def test_tokens_are_collected_by_their_largest_magnitude():
    x = DATA["normal"].astype(np.float32)
    one = collected(x, "token")
    assert one.found is not None
    assert one.found.counts.sum() == 800
    assert one.ranges().reshape(-1) == np.abs(x).max()
    by_head = np.abs(x).max(axis=2)
    assert one.ranges("mse", 7) <= by_head.max()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    x = DATA["normal"].astype(np.float32).copy()
    x[3, 1, 2] = bad
    with pytest.raises(StcaError, match="NaN or infinite"):
        collected(x, "tensor")


def test_nothing_seen_zeros_alone_and_other_shapes():
    empty = collected(np.zeros((0, 2, 16), np.float32), "head")
    with pytest.raises(StcaError, match="no value was seen"):
        empty.ranges()
    for method in get_args(Method):
        assert np.array_equal(collected(np.zeros(SHAPE, np.float32), "head").ranges(method), np.zeros((2, 1)))
    with pytest.raises(StcaError, match="groups of shape"):
        collected(np.zeros(SHAPE, np.float32), "head").add(np.zeros((4, 3, 16), np.float32))
    with pytest.raises(StcaError, match="row per token"):
        collected(np.zeros(4, np.float32), "tensor")


def test_a_million_tokens_take_no_more_memory_than_some():
    made = Collector("channel")
    piece = DATA["normal"].astype(np.float32)
    made.add(piece)
    tracemalloc.start()
    for _ in range(100):
        made.add(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20
    assert made.found is not None
    assert made.found.counts.sum() == 101 * piece.size
