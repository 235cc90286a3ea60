"""Pages go to whom they are worth most; a split is what was moved, and what fails leaves it as it was."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from support.errors import one_line

from stca import probe
from stca.errors import UsageError
from stca.runtime import MarginalUtility, Recorded, Replayed, Request, Session, Static
from stca.runtime.cache import StateCache
from stca.runtime.memory_pool import STATES, MemoryPool, StatePages
from stca.runtime.state import StateKey, UserState
from stca.specs import TOKENS


class Part:
    """A consumer of pages that says what so many would have saved, and has memory for so many."""

    def __init__(self, saved=lambda pages: 0.0, most=1000):
        self.curve, self.most, self.pages = saved, most, 0

    def resize(self, pages):
        if pages > self.most:
            raise MemoryError
        self.pages = pages

    def saved(self):
        return np.array([float(self.curve(n)) for n in range(17)])


def pool_of(policy, states, **tables):
    pool = MemoryPool(16, states, policy)
    pool.serve(tables)
    return pool


def pages(pool):
    return pool.split[STATES], pool.split["items"]


def test_a_static_split_stays():
    pool = pool_of(Static(0.25), Part(lambda n: n), items=Part())
    pool.step()
    assert pages(pool) == (12, 4)


@pytest.mark.parametrize(
    ("states", "items", "split"),
    [
        (lambda n: 3 * min(n, 5), lambda n: min(n, 12), (5, 11)),
        (lambda n: 0, lambda n: n, (0, 16)),
        (lambda n: 30 * (n >= 10), lambda n: n, (10, 6)),  # nothing by themselves, much together
        (lambda n: 30 * (n >= 10), lambda n: 4 * n, (0, 16)),
        (lambda n: n**0.5, lambda n: n**0.5, (8, 8)),
    ],
)
def test_pages_go_where_they_save_most(states, items, split):
    states, items = Part(states), Part(items)
    pool = pool_of(MarginalUtility(), states, items=items)
    assert pages(pool) == split
    assert (states.pages, items.pages) == split


def test_nothing_moves_for_little():
    pool = pool_of(MarginalUtility(better=0.1), Part(lambda n: 100 + n), items=Part(lambda n: 0))
    assert (pages(pool), pool.moves) == ((8, 8), 0)


@pytest.mark.parametrize(
    "wanted",
    [
        {"states": 17, "items": 0},
        {"states": -1, "items": 2},
        {"states": 8},
        {"states": 8, "other": 8},
        {"states": 7.5, "items": 8.5},
        {"states": "8", "items": 8},
        None,
        8,
    ],
)
def test_a_split_that_is_none_is_refused(wanted):
    class Wrong:
        def wanted(self, *_):
            return wanted

    pool = pool_of(Wrong(), Part(), items=Part())
    assert (pages(pool), pool.refused) == ((8, 8), 1)


def test_whole_numbers_of_another_library_are_pages():
    class Numpys:
        def wanted(self, *_):
            return {"states": np.int64(4), "items": np.int64(12)}

    assert pages(pool_of(Numpys(), Part(), items=Part())) == (4, 12)


def test_a_policy_that_fails_leaves_the_split_and_goes_on_deciding(caplog):
    tried = threading.Semaphore(0)

    class Fails:
        def wanted(self, pages, saved):
            pages["states"] = 0  # its own copy
            tried.release()
            raise KeyError("no\nmodel")

    pool = pool_of(Fails(), Part(), items=Part())
    assert (pages(pool), pool.refused) == ((8, 8), 1)
    (said,) = (r.getMessage() for r in caplog.records)
    assert "a policy failed (KeyError: " in said
    assert "\n" not in said
    pool.start(0.001)
    for _ in range(4):  # the one before, and three of the thread
        assert tried.acquire(timeout=60)
    pool.close()


def test_without_memory_for_the_last_split_states_have_all():
    class Shrinks(Part):
        def resize(self, pages):
            self.most = 8 if self.most == 1000 else 0  # once at first, and never more than none again
            super().resize(pages)

    states, items = Part(lambda n: n), Shrinks()
    pool = pool_of(Static(0.25), states, items=items)
    assert (states.pages, items.pages) == pages(pool) == (16, 0)
    assert (pool.moves, pool.refused) == (0, 2)


def test_without_memory_the_last_split_stays():
    states, items = Part(), Part(lambda n: n, most=9)
    pool = pool_of(MarginalUtility(), states, items=items)
    assert (states.pages, items.pages) == pages(pool) == (8, 8)
    assert (pool.moves, pool.refused) == (0, 1)


def state_of(user):
    return StateKey(user, 0, "w", "f"), UserState({}, 0)


def test_what_pages_of_states_would_have_saved():
    """Three users in turn, a page each."""
    cache = StateCache(0, cost=lambda *_: 10)
    states = StatePages(cache, 10, 4, lambda: 2.0)
    states.resize(1)
    for user in "abcabc":
        if cache.get(state_of(user)[0]) is None:
            cache.put(*state_of(user))
    np.testing.assert_array_equal(states.saved(), [0, 0, 0, 6, 6])


def test_states_go_when_their_pages_do():
    cache = StateCache(100, cost=lambda *_: 10)
    for user in range(10):
        cache.put(*state_of(user))
    cache.resize(30)
    assert (cache.stats().users, cache.stats().budget) == (3, 30)
    assert cache.get(state_of(9)[0]) is not None


def test_a_session_shares_its_budget(bundle_dir):
    """A bundle without tables outside its graphs has all of it for states."""
    with Session.load(bundle_dir, threads=1, cache_bytes=1 << 20, split=MarginalUtility()) as session:
        assert session.memory() == {"states": 1 << 20}
        assert session.stats().budget == 1 << 20
    with one_line(UsageError, "split: is 0.5, expected a policy"):
        Session.load(bundle_dir, split=0.5)


def test_a_pool_decides_until_nobody_has_it():
    decided = threading.Event()

    class Tells(Static):
        def wanted(self, pages, saved):
            decided.set()
            return pages

    pool = pool_of(Tells(0.5), Part(), items=Part())
    decided.clear()
    before = set(threading.enumerate())
    pool.start(0.001)
    (thread,) = set(threading.enumerate()) - before
    assert decided.wait(60)
    del pool
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_users_who_come_once_save_nothing(bundle_dir):
    """However a state is come by, and whatever looks again while it is made, its user asked once."""
    policy = Static(0.5)
    with Session.load(bundle_dir, threads=1, split=policy) as session:
        inputs = probe.single(session.manifest.graphs["request"].inputs, 9, 4, np.random.default_rng(0))
        history = {s.name: inputs[s.name] for s in session.manifest.graphs["user_encoder"].inputs if s.name in inputs}
        for i in range(5):
            session.score(Request(inputs, f"scored {i}", 1))
            session.warm(f"warmed {i}", history, 1)
        memory = session._store.memory
        assert not memory.hits().any()
        session.score(Request(inputs, "warmed 0", 1))
        assert memory.hits()[-1] > 0


def test_an_append_that_looks_in_files_asks_for_nobody(bundle_dir, tmp_path):
    with Session.load(bundle_dir, threads=1, split=Static(0.5), state_folder=tmp_path / "states") as session:
        inputs = probe.single(session.manifest.graphs["request"].inputs, 2, 1, np.random.default_rng(0))
        tokens = [s for s in session.manifest.graphs["user_encoder"].inputs if s.shape[:1] == (TOKENS,)]
        events = {s.name: inputs[s.name] for s in tokens}
        for _ in range(3):
            assert not session.append("ann", events, version=2, after=1)
        assert not session._store.memory.hits().any()


def test_decisions_are_replayed_from_a_file(tmp_path):
    file, worth = tmp_path / "splits.jsonl", [(3.0, 1.0), (1.0, 2.0), (1.0, 2.0)]

    def splits(policy):
        states, items = Part(), Part()
        pool = pool_of(policy, states, items=items)
        found = [pages(pool)]
        for of_states, of_items in worth:
            states.curve, items.curve = (lambda n, w=w: w * n for w in (of_states, of_items))
            pool.step()
            found.append(pages(pool))
        return found

    decided = splits(Recorded(MarginalUtility(), file))
    assert len(set(decided)) > 1
    worth.reverse()  # whatever is asked for
    assert splits(Replayed(file)) == decided
    assert len(file.read_text().splitlines()) == 1 + len(worth)


def test_a_file_that_holds_no_splits(tmp_path):
    file = tmp_path / "splits.jsonl"
    with one_line(UsageError, "splits.jsonl", "No such file"):
        Replayed(file)
    file.write_text('{"states": 3}\n{"states": "all"}\n')
    with one_line(UsageError, "splits.jsonl", "line 2"):
        Replayed(file)


def test_a_file_that_cannot_be_written_to_leaves_the_split(tmp_path):
    pool = pool_of(Recorded(Static(0.25), tmp_path / "none" / "splits.jsonl"), Part(), items=Part())
    assert pages(pool) == (8, 8)
    assert pool.refused == 1
