"""Rows from memory are the table's rows, whatever the number of pages; and what a page is worth is told rightly."""

from __future__ import annotations

import numpy as np
import pytest

from stca.manifest import TableSpec
from stca.runtime.row_cache import RowCache

ROWS, WIDTH = 500, 4
TABLE = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
SPEC = TableSpec("items", "", "", "float32", ROWS, WIDTH, 1)


class Source:
    """A table that counts the rows that are read, each of which takes a second."""

    def __init__(self):
        self.read, self.now = [], 0.0

    def rows(self, ids):
        self.read += ids.tolist()
        self.now += len(ids)
        return TABLE[ids]


@pytest.fixture
def source():
    return Source()


def cache_of(source, places, pages):
    made = RowCache(source, SPEC, places * (4 * WIDTH + 16), 4, clock=lambda: source.now)
    made.resize(pages)
    return made


@pytest.mark.parametrize("pages", [0, 1, 3])
def test_rows_are_the_tables(source, pages):
    cache, rng = cache_of(source, 16, pages), np.random.default_rng(1)
    for turn in range(200):
        ids = rng.integers(0, ROWS if turn % 2 else 30, rng.integers(0, 40))
        np.testing.assert_array_equal(cache.rows(ids), TABLE[ids])
        if turn % 20 == 19:
            cache.resize(int(rng.integers(0, 5)))
    hits, misses = cache.counts
    assert misses == len(source.read)
    assert hits > 0


def test_a_row_is_read_once(source):
    cache = cache_of(source, 4096, 1)
    cache.rows(np.array([7, 7, 8]))
    cache.rows(np.array([8, 7]))
    assert source.read == [7, 8]
    assert cache.counts == (2, 2)


def test_the_row_used_last_stays_when_pages_go(source):
    cache = cache_of(source, 1, 3)
    for one in (1, 2, 3, 1):
        cache.rows(np.array([one]))
    cache.resize(1)
    cache.rows(np.array([1]))
    assert source.read == [1, 2, 3]


def test_what_pages_would_have_saved(source):
    """Ids in turn, each again after two others: three pages of one place each keep all of them."""
    cache = cache_of(source, 1, 1)
    for one in (1, 2, 3, 1, 2, 3):
        cache.rows(np.array([one]))
    np.testing.assert_array_equal(cache.saved(0.0), [0, 0, 0, 3, 3])
    assert not cache.saved(0.0).any(), "told once, where nothing is remembered"
