"""Rows that grow in place: what is written and what is copied, counted, and that no older window sees a change."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from stca import probe
from stca.runtime import Request, Session
from stca.runtime.changing import extend
from stca.runtime.engine import OnnxRuntimeEngine
from stca.runtime.room import Room

HISTORY = ("history_item", "history_action", "history_category", "history_time", "history_gap")


def rows(begin, end):
    """Rows numbered from `begin` to `end`, of two tensors."""
    x = np.arange(begin, end, dtype=np.float32)
    return {"a": np.stack([x, -x], axis=1), "b": x.astype(np.int32)}


def same(tensors, begin, end):
    return all(np.array_equal(tensors[n], x) for n, x in rows(begin, end).items())


@settings(max_examples=50)
@given(st.integers(0, 200), st.lists(st.integers(0, 30), max_size=12))
def test_windows_that_were_shown_never_change(first, steps):
    room, end, shown = Room(rows(0, first), 0), first, [(0, first, rows(0, first))]
    for n in steps:
        if not room.take(end, n):
            assert end + n > first + 64, "there is room for 64 rows at least"
            break
        window = min(end + n, 50)
        shown.append((end + n - window, end + n, room.write(end, rows(end, end + n), window)))
        end += n
    for begin, last, tensors in shown:
        assert same(tensors, begin, last)


def test_room_is_given_to_one_alone():
    """Of many who append to one state at once, one writes in place; nobody writes twice at a place."""
    for _ in range(20):
        room, gate = Room(rows(0, 10), 0), threading.Barrier(8)

        def take(_, room=room, gate=gate):
            gate.wait()
            return room.take(10, 5)

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(take, range(8))) == 1
    assert not room.take(10, 0), "what follows row 10 is written"
    assert not room.take(15, 10**6)


# --- in a session -----------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(log_session):
    return probe.single(log_session.manifest.graphs["request"].inputs, 32, 4, np.random.default_rng(0))


def events(inputs, begin, end):
    return {n: np.take(inputs[n], range(begin, end), mode="wrap") for n in HISTORY}


def state_of(session, user="u"):
    return session._store.find(user)[1]


def test_an_append_writes_the_new_rows_and_moves_the_others_rarely(log_session, inputs):
    session, per_token = log_session, sum(s.bytes_per_token for s in log_session.manifest.state)
    session.score(Request(inputs, "u", 0))
    written, moves, end = [], 0, 32
    for version in range(1, 61):
        before = state_of(session)
        assert session.append("u", events(inputs, end, end + 2), version, after=version - 1)
        moves += state_of(session).room is not before.room
        written.append(session.stats().appended_bytes - sum(written))
        end += 2
    assert sorted(set(written)) == [2 * per_token, 32 * per_token], "the new rows; when room is made, the window's"
    assert moves == written.count(32 * per_token) == 2
    assert session.stats().appends == 60
    window = {**inputs, **events(inputs, end - 32, end)}
    got = session.score(Request(inputs, "u", 60))
    np.testing.assert_allclose(got, session.score(Request(window)), rtol=0, atol=2e-6)


def test_a_hit_copies_no_state(log_session, inputs, monkeypatch):
    """The scorer is given the kept memory itself, of a state as it was encoded and of one that grew."""
    session, run, fed = log_session, OnnxRuntimeEngine.run, []

    def watched(engine, feeds):
        fed.append(feeds)
        return run(engine, feeds)

    session.score(Request(inputs, "u", 0))
    monkeypatch.setattr(OnnxRuntimeEngine, "run", watched)
    for version in (0, 1, 2):
        fed.clear()
        session.score(Request(inputs, "u", version))
        (feeds,) = fed
        for name, x in state_of(session).tensors.items():
            assert feeds[name].ctypes.data == x.ctypes.data, name
            assert feeds[name].flags.c_contiguous
        session.append("u", events(inputs, 0, 1), version + 1, after=version)


def test_an_older_state_is_whole_while_the_window_moves_on(log_session, inputs):
    session = log_session
    session.score(Request(inputs, "u", 0))
    session.append("u", events(inputs, 0, 3), 1)
    older = state_of(session)
    copies = {n: x.copy() for n, x in older.tensors.items()}
    for version in range(2, 90):
        session.append("u", events(inputs, version, version + 1), version)
    assert all(np.array_equal(older.tensors[n], x) for n, x in copies.items())


def test_two_appends_to_one_state_are_both_right(log_session, inputs):
    model = log_session._model
    history = {n: x for n, x in inputs.items() if n.startswith(("history_", "user_"))}
    (old,) = model.encode([model.door.admit({**history, **events(inputs, 0, 8)}, "user")])
    old, _ = extend(model, old, *model.encode([model.door.admit({**history, **events(inputs, 8, 10)}, "user")]))
    for begin in (10, 20):
        (new,) = model.encode([model.door.admit({**history, **events(inputs, begin, begin + 5)}, "user")])
        made, _ = extend(model, old, new)
        joined = {n: np.concatenate([events(inputs, 0, 10)[n], events(inputs, begin, begin + 5)[n]]) for n in HISTORY}
        (whole,) = model.encode([model.door.admit({**history, **joined}, "user")])
        for name, x in whole.tensors.items():
            np.testing.assert_allclose(made.tensors[name], x, rtol=0, atol=4e-6)


def test_what_is_counted_is_the_room_too(bundle_dir, inputs):
    """Never less than the memory that comes free as kept states go, after appends; and the budget holds."""
    session = Session.load(bundle_dir, threads=1, cache_bytes=200_000)
    tracemalloc.start()
    try:
        for user in range(40):
            session.score(Request(inputs, user, 0))
            for version in (1, 2):
                session.append(user, events(inputs, 0, 1), version)
            stats = session.stats()
            assert stats.bytes <= stats.budget
            assert stats.state_bytes < stats.room_bytes < stats.bytes
        gc.collect()  # empties CPython's lists of free objects
        kept = tracemalloc.get_traced_memory()[0]
        assert sum(session.forget(user) for user in range(40)) == stats.users
        gc.collect()
        real = kept - tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert stats.evictions > 10
    assert 0.9 * stats.bytes <= real <= stats.bytes
