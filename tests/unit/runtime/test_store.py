"""What the store tells: hits by where the state was, misses by why there was none."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, strategies as st

from stca import probe
from stca.runtime import Request, RequestBatch, Session
from stca.runtime.cache import EVICTED, EXPIRED, NEW, TOO_LARGE, Gone, StateCache
from stca.runtime.state import StateKey, UserState
from stca.runtime.store import StateStore


@pytest.fixture
def inputs(log_session):
    return probe.single(log_session.manifest.graphs["request"].inputs, 9, 4, np.random.default_rng(0))


def state(size):
    return UserState({"a": np.zeros(size, np.uint8)}, size)


def key(user, version=0, weights="w", format="f"):
    return StateKey(user, version, weights, format)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_state_in_a_file_does_not_replace_a_newer_one(tmp_path):
    store = StateStore.of(1 << 20, folder=tmp_path, folder_bytes=1 << 20)
    store.serve("w", "f")
    store.put(key("ann", 1), state(10), store.next_call())
    assert store.file.wait(10)
    newer = state(12)
    store.memory.put(key("ann", 2), newer)  # and it is not written yet
    found, came, _ = store.look_up(key("ann", 1))
    assert (found.tokens, came) == (10, "file")
    assert store.memory.get(key("ann", 2)) is newer
    store.memory.forget("ann")
    assert store.look_up(key("ann", 1))[1] == "file"
    assert store.look_up(key("ann", 1))[1] == "memory"
    store.close()


steps = st.lists(st.tuples(st.sampled_from(("call", "land", "forget", "evict")), st.integers(0, 5)), max_size=40)


@given(steps)
def test_a_state_never_takes_the_place_of_one_that_a_later_call_made(script):
    """Calls look for a state of their own version and bring one later, in any order."""
    store, coming, held = StateStore.of(1 << 20), [], {}
    for step, n in script:
        user = "ab"[n % 2]
        if step == "call":
            of = key(user, len(coming))
            coming.append((of, store.look_up(of)[2]))
        elif step == "land" and coming:
            of, call = coming[n % len(coming)]
            newer = held.get(of.user, (None, 0))[1] < call
            assert store.put(of, state(3), call) == newer
            if newer:
                held[of.user] = of, call
        elif step == "forget":
            store.forget(user)
            held.pop(user, None)
        elif step == "evict":
            store.memory.resize(0), store.memory.resize(1 << 20)
            held.clear()
        for user in "ab":
            found = store.memory.find(user)
            assert (None if found is None else (found.key, found.call)) == held.get(user)


def test_a_file_of_a_later_call_outlives_the_state_of_an_earlier_one(tmp_path):
    store = StateStore.of(1 << 20, folder=tmp_path, folder_bytes=1 << 20)
    store.serve("w", "f")
    earlier, later = store.next_call(), store.next_call()
    store.put(key("ann", 2), state(12), later)
    assert store.file.wait(10)
    store.memory.resize(0), store.memory.resize(1 << 20)
    assert store.put(key("ann", 1), state(10), earlier), "nothing is in its way in memory"
    assert store.file.wait(10)
    assert store.look_up(key("ann", 2))[1] == "file"
    assert store.look_up(key("ann", 2))[1] == "memory"
    assert not store.put(key("ann", 1), state(10), earlier)
    store.close()


def test_why_a_state_is_not_kept():
    clock = Clock()
    cache = StateCache(40, ttl_seconds=10, cost=lambda _, state: state.nbytes - 150, clock=clock)
    cache.serve("w", "f")
    assert cache.why_not(key("ann")) == "new_user"
    cache.put(key("ann", 1), state(20))
    assert cache.why_not(key("ann", 2)) == "version"
    assert cache.why_not(key("ann", 1, weights="x")) == "weights"
    cache.put(key("bob"), state(20))
    cache.put(key("cid"), state(20))
    assert cache.why_not(key("ann", 1)) == "evicted"
    assert not cache.put(key("dan"), state(50))
    assert cache.why_not(key("dan")) == "too_large"
    clock.now += 9
    cache.put(key("cid", 2), state(20))
    clock.now += 1
    assert cache.get(key("bob")) is None
    assert cache.why_not(key("bob")) == "expired"
    assert cache.get(key("cid", 2)) is not None, "it was put later"
    cache.serve("w", "f")
    assert cache.get(key("cid", 2)) is not None
    cache.serve("x", "f")
    assert cache.why_not(key("cid", 2, weights="x")) == "weights"
    assert not cache.put(key("eve"), state(1)), "of the weights before"
    for user in ("ann", "bob", "cid", "dan"):
        cache.forget(user)
        assert cache.why_not(key(user)) == "new_user", "who is forgotten was never here"


def test_a_state_that_was_made_before_expires_before():
    clock = Clock()
    cache = StateCache(10_000, ttl_seconds=10, clock=clock)
    cache.put(key("ann"), state(1))
    cache.put(key("bob"), state(1), age=7)
    clock.now += 3
    assert cache.get(key("bob")) is None
    assert cache.why_not(key("bob")) == EXPIRED
    assert cache.get(key("ann")) is not None
    cache.put(key("cid"), state(1), age=11)
    assert cache.find("cid") is None


def test_many_who_went_are_remembered_in_little_room():
    gone = Gone()
    for i in range(5000):
        gone.note(f"user {i}", (EVICTED, EXPIRED, TOO_LARGE)[i % 3])
    told = [gone.why(f"user {i}") for i in range(5000)]
    assert all(t in (NEW, (EVICTED, EXPIRED, TOO_LARGE)[i % 3]) for i, t in enumerate(told)), "never another reason"
    assert told.count(NEW) < 2000
    assert all(gone.why(f"other {i}") == NEW for i in range(5000))


def test_hits_and_misses_of_a_session_by_where_and_why(log_session, bundle_dir, tmp_path, inputs):
    session = log_session
    one = Request(inputs, "ann", 1)
    session.score(one), session.score(one), session.score(Request(inputs, "ann", 2))
    batch = probe.pack(session.manifest.graphs["request"].inputs, [inputs] * 3)
    session.score(RequestBatch(batch, ["bob", "bob", None], [1, 1, 1]))
    shutil.copytree(bundle_dir, tmp_path / "copy")
    session.swap(tmp_path / "copy")
    session.score(Request(inputs, "ann", 2))
    stats = session.stats()
    assert stats.hits_from == {"memory": 2, "joined": 1}
    assert stats.misses_for == {"new_user": 2, "version": 1}
    assert (stats.hits, stats.misses) == (3, 3)


def test_a_swap_and_a_budget_are_told_as_reasons(log_session, bundle_dir, other_weights, inputs):
    log_session.score(Request(inputs, "ann", 1))
    log_session.swap(other_weights)
    log_session.score(Request(inputs, "ann", 1))
    assert log_session.stats().misses_for == {"new_user": 1, "weights": 1}
    session = Session.load(bundle_dir, threads=1, max_users=1)
    for user in ("ann", "bob", "ann"):
        session.score(Request(inputs, user, 1))
    assert session.stats().misses_for == {"new_user": 2, "evicted": 1}
    session = Session.load(bundle_dir, threads=1, cache_bytes=10)
    for _ in range(2):
        session.score(Request(inputs, "ann", 1))
    assert session.stats().misses_for == {"new_user": 1, "too_large": 1}


@pytest.mark.parametrize("field", ["user", "version", "weights", "format"])
def test_each_part_of_a_key_counts(field):
    store = StateStore.of(10_000)
    store.put(key("ann"), state(3), store.next_call())
    assert store.look_up(key("ann"))[0] is not None
    assert store.look_up(key("ann")._replace(**{field: "other"}))[0] is None
