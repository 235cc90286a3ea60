"""Hits of every size of a cache, told from one sample, are those of caches of these sizes."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from stca.runtime.reuse import Reuse

PAGES = 12


def lru_hits(keys, size):
    kept, hits = OrderedDict(), 0
    for key in keys:
        hits += kept.pop(key, False)
        kept[key] = True
        if len(kept) > size:
            kept.popitem(last=False)
    return hits


def told(keys, page, followed=2048):
    reuse = Reuse(page, PAGES, followed)
    for key in keys:
        reuse.ask(np.array([key]), 1)
    return reuse.hits()


def zipf(count):
    rng = np.random.default_rng(0)
    return rng.choice(2000, count, p=(shares := 1 / np.arange(1, 2001)) / shares.sum()).tolist()


def test_without_sampling_the_hits_are_right():
    keys = zipf(3000)
    assert told(keys, 50).tolist() == [0, *(lru_hits(keys, 50 * n) for n in range(1, PAGES + 1))]


def test_a_sample_stands_for_all():
    keys = zipf(20_000)
    hits, right = told(keys, 100, followed=256), np.array([lru_hits(keys, 100 * n) for n in range(PAGES + 1)])
    assert np.abs(hits - right).max() < 0.1 * len(keys)
    assert (np.diff(hits) >= 0).all()


def test_hits_are_told_once_and_keys_remembered():
    reuse = Reuse(10, 3)
    reuse.ask(np.array([1]), 10)
    assert not reuse.hits().any()
    for _ in range(2):
        reuse.ask(np.array([1]), 10)
        assert reuse.hits().tolist() == [0, 1, 1, 1]


def test_larger_things_take_more_pages():
    reuse = Reuse(10, 8)
    for key, size in ((1, 20), (2, 35), (1, 20)):
        reuse.ask(np.array([key]), size)
    assert reuse.hits().tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_keys_together_are_keys_one_after_the_other():
    rng, together, alone = np.random.default_rng(3), Reuse(500, PAGES), Reuse(500, PAGES)
    for _ in range(40):
        keys, size = rng.permutation(700)[: rng.integers(1, 400)], int(rng.integers(1, 30))
        together.ask(keys, size)
        for key in keys:
            alone.ask(np.array([key]), size)
    hits = together.hits()
    assert hits[-1] > 1000
    assert hits.tolist() == alone.hits().tolist()


def test_more_new_keys_at_once_than_are_followed():
    reuse = Reuse(1000, PAGES, followed=64)
    for _ in range(4):
        reuse.ask(np.arange(3000), 1)
    hits = reuse.hits()
    assert hits[1] < 0.3 * hits[4]
    assert abs(hits[4] - 9000) < 2000
