"""What was saved is remembered until the load changes, and chance is no change."""

from __future__ import annotations

import numpy as np
import pytest

from stca.runtime.lately import Lately, best_split

PAGES = {"states": 8, "items": 8}


def part(states, items):
    """Each would have saved with every page so much more, up to so many pages."""
    return {
        name: each * np.minimum(np.arange(17.0), most)
        for name, (each, most) in {"states": states, "items": items}.items()
    }


def noise(rng):
    return 1 + 0.3 * rng.standard_normal()


@pytest.fixture
def lately():
    """After forty decisions in which items were worth nearly all."""
    made, rng = Lately(list(PAGES)), np.random.default_rng(0)
    for _ in range(40):
        made.add(part((noise(rng), 4), (2 * noise(rng), 12)), PAGES)
    return made


@pytest.mark.parametrize("hits", [2, 10, 50])
def test_chance_is_remembered_whole(hits):
    """Of hits that come by chance, nearly always: a rare state's takes 30 ms, one of many rows 0.6 ms."""
    likely = np.exp(-np.arange(64) / 20)
    likely /= likely.sum()
    kept = []
    for seed in range(6):
        rng, made, pages = np.random.default_rng(seed), Lately(["states", "items"]), {"states": 32, "items": 32}
        for _ in range(120):
            each = {"states": (0.03, hits), "items": (0.0006, 50 * hits)}
            curves = {n: s * np.append(0, rng.poisson(k * likely).cumsum()) for n, (s, k) in each.items()}
            saved = made.add(curves, pages)
        kept.append(saved["states"][-1] / (120 * 0.03 * hits))
    assert 0.8 < np.mean(kept) < 1.2, kept


def test_after_a_change_nothing_before_it_counts(lately):
    changed = part((2.0, 12), (1.0, 4))
    saved = lately.add(changed, PAGES)
    assert best_split(PAGES, saved) == {"states": 12, "items": 4}
    for name, curve in changed.items():
        np.testing.assert_array_equal(saved[name], curve)


def test_a_change_after_which_what_was_best_saves_nothing():
    made, rng = Lately(list(PAGES)), np.random.default_rng(0)
    for _ in range(40):
        made.add(part((0.0, 4), (noise(rng), 16)), PAGES)
    assert best_split(PAGES, made.add(part((1.0, 12), (0.0, 4)), PAGES))["states"] >= 12


def test_a_change_of_how_much_is_asked_for_is_none(lately):
    before = lately.add(part((1.0, 4), (2.0, 12)), PAGES)
    after = lately.add(part((10.0, 4), (20.0, 12)), PAGES)
    assert after["items"][-1] == pytest.approx(before["items"][-1] + 240)


def test_a_time_without_requests_tells_nothing(lately):
    before = lately.add(part((1.0, 4), (2.0, 12)), PAGES)
    for _ in range(500):
        after = lately.add(part((0.0, 4), (0.0, 12)), PAGES)
    np.testing.assert_array_equal(after["items"], before["items"])


def test_only_so_much_is_remembered():
    made = Lately(list(PAGES))
    for _ in range(300):
        saved = made.add(part((1.0, 16), (1.0, 16)), PAGES)
    assert saved["items"][1] == 256
