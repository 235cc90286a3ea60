"""The cache against a model of it so plain that it cannot be wrong, and under threads."""

from __future__ import annotations

import datetime
import tracemalloc
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from stca.runtime.cache import StateCache
from stca.runtime.state import StateKey, UserState


def key(user, version=0, weights="w"):
    return StateKey(user, version, weights, "f")


def state(size, value=0):
    """Of `size` bytes."""
    return UserState({"a": np.full(size, value, np.uint8)}, size)


def test_bytes_are_those_of_all_tensors():
    tensors = {"a": np.zeros((3, 4), np.float32), "b": np.zeros(2, np.int32), "c": np.zeros((0, 5))}
    assert UserState(tensors, 3).nbytes == 3 * 4 * 4 + 2 * 4


def test_a_state_that_was_finished_is_as_old_as_it_was():
    now = [100.0]
    cache = StateCache(1 << 20, ttl_seconds=50, clock=lambda: now[0])
    first, second = state(1), state(2)
    cache.put(key("a"), first)
    now[0] = 120
    assert cache.put(key("a"), second, instead_of=first)
    kept, age = cache.fetch("a")
    assert (kept.key, kept.state, age) == (key("a"), second, 20)
    assert cache.put(key("a", 1), state(3), instead_of=second)
    assert cache.fetch("a")[1] == 0, "a longer history is a new one"


def test_a_state_that_was_finished_goes_when_it_would_have_gone():
    """Whoever was put after it has longer."""
    now = [100.0]
    cache = StateCache(1000 + 2 * 150, ttl_seconds=50, cost=lambda _, kept: kept.nbytes, clock=lambda: now[0])
    first = state(1)
    cache.put(key("a"), first)
    now[0] = 110
    cache.put(key("b"), state(1))
    now[0] = 120
    second = state(2)
    assert cache.put(key("a"), second, instead_of=first)
    now[0] = 155
    assert (cache.stats().users, cache.stats().expired) == (1, 1)
    assert cache.put(key("a"), state(1))
    now[0] = 165
    assert (cache.find("a") is not None, cache.find("b"), cache.stats().expired) == (True, None, 2)
    assert not cache.put(key("a"), state(2000), instead_of=cache.find("a").state), "it is larger than the budget"
    now[0] = 300
    assert (cache.stats().users, cache.stats().expired) == (0, 2), "and is not waited for"


users, sizes, versions = st.integers(0, 4), st.integers(0, 6), st.integers(0, 2)
steps = st.one_of(
    st.tuples(st.just("put"), users, versions, sizes),
    st.tuples(st.just("get"), users, versions),
    st.tuples(st.just("find"), users),
    st.tuples(st.just("forget"), users),
    st.tuples(st.just("swap")),
)


@settings(max_examples=200)
@given(st.integers(-1, 12), st.lists(steps, max_size=40))
def test_is_a_list_of_users_with_the_least_recent_first(budget, script):
    cache, held = StateCache(budget, cost=lambda _, state: state.nbytes), []  # of (user, version, size)
    evictions = refused = 0
    cache.serve("w", "f")
    for step, *arguments in script:
        if step == "put":
            user, version, size = arguments
            kept = cache.put(key(user, version), state(size, version))
            held = [h for h in held if h[0] != user]
            if size > budget:
                refused += 1
            else:
                while sum(h[2] for h in held) + size > budget:
                    held.pop(0)
                    evictions += 1
                held.append((user, version, size))
            assert kept == (size <= budget)
        elif step == "get":
            user, version = arguments
            found = cache.get(key(user, version))
            mine = [h for h in held if h[:2] == (user, version)]
            assert (found is None) == (not mine)
            if mine:
                assert found.tokens == mine[0][2]
                held = [h for h in held if h[0] != user] + mine
        elif step == "find":
            found = cache.find(arguments[0])
            assert (None if found is None else (found.key.user, found.key.version, found.state.tokens)) == next(
                (h for h in held if h[0] == arguments[0]), None
            )
        elif step == "forget":
            assert cache.forget(arguments[0]) == any(h[0] == arguments[0] for h in held)
            held = [h for h in held if h[0] != arguments[0]]
        else:
            cache.serve("other", "f")
            cache.serve("w", "f")
            held = []
        stats = cache.stats()
        assert (stats.evictions, stats.refused) == (evictions, refused)
        assert (stats.users, stats.bytes, stats.budget) == (len(held), sum(h[2] for h in held), budget)


def test_a_hit_makes_a_user_the_most_recent():
    cache = StateCache(12, cost=lambda _, state: state.nbytes)
    for user in ("ann", "bob"):
        assert cache.put(key(user), state(6))
    assert cache.get(key("ann")) is not None
    assert cache.put(key("cid"), state(6))
    assert [cache.find(user) is not None for user in ("ann", "bob", "cid")] == [True, False, True]


def test_another_version_other_weights_or_another_format_is_a_miss():
    cache = StateCache(10_000)
    cache.put(key("u", 1), state(5))
    for other in (key("u", 2), key("v", 1), key("u", 1, "x"), StateKey("u", 1, "w", "g"), key("u", None)):
        assert cache.get(other) is None
    assert cache.get(key("u", 1)).tokens == 5


def test_equal_keys_of_other_types_are_one_user():
    """As in a dict: 1, 1.0 and True are one key; 1 and "1" are two."""
    cache = StateCache(10_000)
    cache.put(key(1), state(5))
    assert cache.get(key("1")) is None
    assert cache.get(key(np.int64(1))).tokens == 5


def test_threads_leave_the_books_in_order():
    cache = StateCache(64)

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(300):
            user, size = int(rng.integers(6)), int(rng.integers(30))
            match int(rng.integers(4)):
                case 0:
                    cache.forget(user)
                case 1:
                    found = cache.get(key(user))
                    assert found is None or (found.tensors["a"] == found.tokens).all()
                case _:
                    cache.put(key(user), state(size, size))
            assert 0 <= cache.stats().bytes <= 64

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    for user in range(6):
        cache.forget(user)
    assert (cache.stats().users, cache.stats().bytes) == (0, 0)


KEYS = {
    "text": lambda i: f"user {i}",
    "long text": lambda i: f"{i}" * 2000,
    "bytes": lambda i: b"%d" % i * 50,
    "numbers": lambda i: i + 10**6,
    "large numbers": lambda i: i + 2**900,
    "tuples": lambda i: (f"tenant {i}", f"user {i}", i + 1000),
    "tuples in tuples": lambda i: ((f"{i}a", (f"{i}b", f"{i}c")), (f"{i}d", (f"{i}e", f"{i}f"))),
    "wide tuples": lambda i: tuple(f"{i} {j}" for j in range(50)),
    "UUIDs": lambda i: uuid.UUID(int=i),
    "dates": lambda i: datetime.datetime(2026, 1, 1) + datetime.timedelta(seconds=i),
}


@pytest.mark.parametrize("tensors", [1, 6])
@pytest.mark.parametrize("kind", KEYS)
def test_what_is_counted_is_what_it_takes(kind, tensors):
    """Whatever the keys are: never less than the memory taken, and no more than 1.5 times that.
    No two parts of a key are one object here: those that are, as one tenant's name, are counted with each key."""
    cache, make = StateCache(1 << 40), KEYS[kind]
    tracemalloc.start()
    try:
        for i in range(1000):
            made = {f"s{j}": np.zeros((i % 7, 4), np.float32) for j in range(tensors)}
            cache.put(StateKey(make(i), make(i + 7), "w", "f"), UserState(made, 0))
        real = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert real <= cache.stats().bytes <= 1.5 * real
