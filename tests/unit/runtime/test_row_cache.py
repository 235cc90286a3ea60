"""Rows from memory are the table's rows, whatever the number of pages; and what a page is worth is told rightly."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from stca.runtime.memory_pool import MarginalUtility
from stca.runtime.row_cache import RowCache
from stca.specs import TableSpec

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


@pytest.mark.parametrize("places", [125, 250, 300, 385])
def test_ids_one_after_the_other_have_places_of_their_own(source, places):
    """As nearly as may be: ids are often numbered as they come."""
    cache = cache_of(source, places, 1)
    cache.rows(np.arange(places // 2))
    cache.rows(np.arange(places // 2))
    assert cache.counts[0] > 0.7 * (places // 2)


def test_many_rows_at_once(source):
    """More than are looked up together, kept ones among them."""
    cache, ids = cache_of(source, 300, 2), np.random.default_rng(4).integers(0, ROWS, 5000)
    cache.rows(np.arange(0, ROWS, 2))
    np.testing.assert_array_equal(cache.rows(ids), TABLE[ids])
    assert len(source.read) < 3 * ROWS // 2
    assert cache.counts[0] > 1000


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
    np.testing.assert_array_equal(cache.saved(), [0, 0, 0, 3, 3])
    assert not cache.saved().any(), "told once, where nothing is remembered"


def test_many_pages_go_and_come_at_once(source):
    """Of each place the rows used last stay, on whatever page they were."""
    cache, rng = cache_of(source, 16, 64), np.random.default_rng(2)
    asked = [rng.integers(0, ROWS, 40) for _ in range(60)]
    for ids in asked:
        cache.rows(ids)
    for pages in (64, 9, 30, 1, 0, 5):
        cache.resize(pages)
        source.read.clear()
        np.testing.assert_array_equal(cache.rows(asked[-1][:1]), TABLE[asked[-1][:1]])
        assert bool(source.read) == (pages in (0, 5)), "the row used last went"
    assert cache.pages == 5


def test_hits_that_cost_more_than_reading_save_nothing():
    """Ten rows are read together in 13 seconds; each look-up by itself takes 3."""
    source = Source()

    def clock():
        source.now += 3
        return source.now

    cache = RowCache(source, SPEC, 64 * (4 * WIDTH + 16), 4, clock=clock)
    cache.resize(2)
    ids = np.arange(10)
    for some in (ids, *ids.reshape(10, 1)):
        cache.rows(some)
    saved = {"states": np.zeros(5), "items": cache.saved()}
    assert saved["items"][0] == 0
    assert (saved["items"][1:] < 0).all()
    assert MarginalUtility().wanted({"states": 2, "items": 2}, saved) == {"states": 4, "items": 0}


def test_a_call_for_few_rows_says_little_of_many():
    """A call takes ten seconds, and each row of it one: a hit saves the one."""

    class Slow(Source):
        def rows(self, ids):
            self.now += 10
            return super().rows(ids)

    source = Slow()
    cache = cache_of(source, 4096, 1)
    for first, count in ((0, 100), (100, 1), (200, 50), (300, 1), (0, 100)):
        cache.rows(np.arange(first, first + count))
    np.testing.assert_allclose(cache.saved(), [0, 100, 100, 100, 100])


@pytest.mark.parametrize("page_bytes", [0, 1, 4 * WIDTH + 15])
def test_pages_without_room_for_a_row_keep_none(source, page_bytes):
    cache = RowCache(source, SPEC, page_bytes, 4)
    cache.resize(4)
    for _ in range(2):
        np.testing.assert_array_equal(cache.rows(np.array([3, 3])), TABLE[[3, 3]])
    assert source.read == [3, 3, 3, 3]
    assert not cache.saved().any()


@pytest.mark.parametrize("allocates", ["zeros", "full", "concatenate"])
def test_without_memory_for_more_pages_the_cache_is_as_it_was(source, monkeypatch, allocates):
    def fails(*_, **__):
        raise MemoryError

    cache, ids = cache_of(source, 64, 1), np.arange(20)
    cache.rows(ids)
    with monkeypatch.context() as m:
        m.setattr(np, allocates, fails)
        try:
            cache.resize(3)
        except MemoryError:
            assert cache.pages == 1
    np.testing.assert_array_equal(cache.rows(ids), TABLE[ids])
    for pages in (4, 2, 0, 1):
        cache.resize(pages)
        np.testing.assert_array_equal(cache.rows(ids), TABLE[ids])


def test_pages_that_the_system_has_no_memory_for():
    """Some of the pages could be had, and are given back."""
    code = """
import resource
import numpy as np
from stca.manifest import TableSpec
from stca.runtime.row_cache import RowCache

class Source:
    def rows(self, ids):
        return np.tile(ids[:, None], 4).astype(np.float32)

cache, ids = RowCache(Source(), TableSpec("items", "", "", "float32", 500, 4, 1), 4 << 20, 128), np.arange(500)
cache.resize(2)
assert np.array_equal(cache.rows(ids)[:, 0], ids)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (256 << 20), resource.RLIM_INFINITY))
try:
    cache.resize(128)
except MemoryError:
    pass
else:
    raise SystemExit("there was memory")
assert cache.pages == 2 and cache._rows.shape[0] == 2
assert np.array_equal(cache.rows(ids)[:, 0], ids)
assert cache.counts == (500, 500)
cache.resize(3)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_row_took_is_not_forgotten_while_none_is_read(source):
    """All of them are kept, for as many decisions as there are."""
    cache, ids = cache_of(source, 64, 1), np.arange(10)
    cache.rows(ids)
    for _ in range(10_000):
        cache.saved()
    cache.rows(ids)
    np.testing.assert_allclose(cache.saved()[1:], 10)
