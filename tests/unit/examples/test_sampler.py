from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from stca.errors import StcaError
from stca.examples.train.sampler import LengthSampler, training_batches
from stca.examples.train.world import World, WorldConfig, generate


def test_lengths_are_u_shaped_multiples_of_8_within_bounds() -> None:
    lengths = LengthSampler(shortest=64, longest=2048).draw(np.random.default_rng(0), 100_000)
    assert (lengths % 8 == 0).all()
    assert lengths.min() == 64
    assert lengths.max() == 2048
    # Beta(1/2, 1/2) is the arcsine distribution: F(s) = 2/π · asin(√s).
    for s in (0.05, 0.25, 0.5, 0.75, 0.95):
        expected = 2 / np.pi * np.arcsin(np.sqrt(s))
        assert (lengths <= 64 + s * 1984 + 4).mean() == pytest.approx(expected, abs=0.01)
    tenths = np.histogram(lengths, bins=10)[0]
    assert tenths[0] > 2 * tenths[5] < tenths[9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortest": 60}, "multiple of 8"),
        ({"shortest": 0}, "multiple of 8"),
        ({"shortest": 512, "longest": 256}, "above the longest"),
        ({"alpha": 1.0}, "U-shaped"),
        ({"beta": 0.0}, "U-shaped"),
    ],
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(StcaError, match=message):
        LengthSampler(**options)  # type: ignore[arg-type]


def test_batches_cover_the_log_once_per_round() -> None:
    log = generate(World(WorldConfig(topics=8, items=32, page=8)), users=6, history=64, targets=0, seed=1).log
    batches = training_batches(
        log, LengthSampler(shortest=8, longest=32), np.random.default_rng(0), requests=3, targets=8, least_history=32
    )
    labels = 0
    for inputs, y in islice(batches, 8):  # 6 users x 4 requests with 32 events before them
        lengths = np.diff(inputs["history_offsets"])
        assert len(lengths) == 3
        assert ((lengths >= 8) & (lengths <= 32) & (lengths % 8 == 0)).all()
        assert np.diff(inputs["target_offsets"]).tolist() == [8, 8, 8]
        labels += int(y.sum())
    in_log = sum(int(log.labels[r.cut : r.end].sum()) for r in log.training_requests(8, 32))
    assert labels == in_log


def test_no_user_with_enough_history() -> None:
    log = generate(World(WorldConfig(topics=8, items=32)), users=2, history=30, targets=0, seed=1).log
    with pytest.raises(StcaError, match="no user has 32 events"):
        next(training_batches(log, LengthSampler(), np.random.default_rng(0), requests=1, targets=8, least_history=32))
