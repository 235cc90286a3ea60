"""Faults that were seen in a serving process, each with the right behaviour."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.errors import one_line

from stca import probe
from stca.bundle import Bundle, seal
from stca.errors import EngineError, HistoryNeededError, RequestError
from stca.runtime import OnnxRuntimeEngine, Request, RequestBatch, Session
from stca.runtime.cache import StateCache
from stca.runtime.deadline import Deadline
from stca.runtime.model import Model
from stca.runtime.state import StateKey, UserState


def ask(session, tokens=9, targets=4, seed=0):
    return probe.single(session.manifest.graphs["request"].inputs, tokens, targets, np.random.default_rng(seed))


def without_user(inputs):
    return {n: x for n, x in inputs.items() if not n.startswith(("history_", "user_"))}


def test_forget_wins_over_an_encoding_under_way(log_session, monkeypatch):
    session, inputs = log_session, ask(log_session)
    encode = Model.encode

    def forgotten_meanwhile(self, users, *more):
        states = list(encode(self, users, *more))
        assert session.forget("u")
        return states

    monkeypatch.setattr(Model, "encode", forgotten_meanwhile)
    session.score(Request(inputs, user="u", version=1))
    assert session.stats().users == 0


@pytest.fixture
def waiting(monkeypatch):
    """Released once for each call that begins to wait for another's encoding."""
    begun, wait = threading.Semaphore(0), Deadline.wait

    def told(self, *args):
        begun.release()
        wait(self, *args)

    monkeypatch.setattr(Deadline, "wait", told)
    return lambda calls: [begun.acquire(timeout=60) for _ in range(calls)]


def test_one_encoding_serves_all_who_ask_for_it_at_once(log_session, monkeypatch, waiting):
    session, inputs = log_session, ask(log_session)
    encode, runs = Model.encode, []

    def after_all_came(self, users, *rest):
        runs.append(len(users))
        waiting(7)
        return encode(self, users, *rest)

    monkeypatch.setattr(Model, "encode", after_all_came)
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda _: session.score(Request(inputs, user="new", version=1)), range(8)))
    assert sum(runs) == 1
    assert all(np.array_equal(s, scores[0]) for s in scores)
    assert (session.stats().hits, session.stats().misses) == (7, 1)


def test_a_failed_encoding_fails_alone(log_session, monkeypatch, waiting):
    session, inputs = log_session, ask(log_session)
    encode, begun = Model.encode, threading.Event()

    def fails_once(self, users, *rest):
        if not begun.is_set():
            begun.set()
            waiting(1)
            raise EngineError("out of memory")
        return encode(self, users, *rest)

    monkeypatch.setattr(Model, "encode", fails_once)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(session.score, Request(inputs, user="u", version=1))
        assert begun.wait(60)
        second = pool.submit(session.score, Request(inputs, user="u", version=1))
        with pytest.raises(EngineError):
            first.result()
        assert len(second.result()) == len(session.score(Request(inputs)))
    assert (session.stats().hits, session.stats().misses) == (0, 2)  # encodings that fail are encodings


def test_a_failed_encoding_counts_as_one(log_session, monkeypatch):
    session, inputs = log_session, ask(log_session)
    session.score(Request(inputs, user="kept", version=1))
    monkeypatch.setattr(Model, "encode", lambda *_: (_ for _ in ()).throw(EngineError("out of memory")))
    batch = probe.pack(session.manifest.graphs["request"].inputs, [inputs] * 3)
    with pytest.raises(EngineError):
        session.score(RequestBatch(batch, ["kept", "new", None], [1, 1, None]))
    assert (session.stats().hits, session.stats().misses) == (1, 2)


def test_what_is_encoded_while_the_session_is_closed_is_not_kept(log_session, monkeypatch):
    session, encode = log_session, Model.encode

    def closed_meanwhile(self, users, *rest):
        states = list(encode(self, users, *rest))
        session.close()
        return states

    monkeypatch.setattr(Model, "encode", closed_meanwhile)
    session.score(Request(ask(session), user="u", version=1))
    assert (session.stats().users, session.stats().bytes) == (0, 0)


def test_of_two_swaps_at_once_one_wins_whole(log_session, bundle_dir, other_weights, monkeypatch):
    """One's model with the other's kind of states would keep nothing for ever."""
    session, serve = log_session, StateCache.serve
    inside, other = threading.Event(), threading.Event()

    def slow(self, *kind):
        if not inside.is_set():
            inside.set()
            other.wait(1)  # with the mend, the other swap cannot be done before this one is
        serve(self, *kind)

    monkeypatch.setattr(StateCache, "serve", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(session.swap, other_weights)
        assert inside.wait(60)
        second = pool.submit(session.swap, bundle_dir)
        second.add_done_callback(lambda _: other.set())
        first.result(), second.result()
    session.score(Request(ask(session), user="u", version=1))
    assert session.stats().users == 1


@pytest.mark.parametrize("one", [1.0, (1.5, "a"), np.float64(2**53)], ids=str)
def test_a_float_is_nobody(log_session, one):
    """1.0 is nearly 1, and JSON and C++ know no such users: one rule for all."""
    inputs = ask(log_session)
    for user, version in ((one, 1), (1, one)):
        with one_line(RequestError, "use a string or an integer"):
            log_session.score(Request(inputs, user=user, version=version))
    assert log_session.stats().users == 0


def test_events_are_of_someone(log_session):
    with one_line(RequestError, "user", "None"):
        log_session.append(None, {}, 2)


@pytest.mark.parametrize(("what", "says"), [([1], "one by one"), ({"hist": [1]}, "write Request(inputs"), (3, "int")])
def test_what_is_no_request_says_what_is_one(log_session, what, says):
    with one_line(RequestError, "score takes a Request or a RequestBatch", says):
        log_session.score(what)


def test_a_version_is_somebodys(log_session):
    inputs = ask(log_session)
    with one_line(RequestError, "version: is 3 of no user", "leave it out"):
        log_session.score(Request(inputs, version=3))


def test_scores_that_are_not_finite_are_an_error(tmp_path, bundle_dir):
    shutil.copytree(bundle_dir, tmp_path / "B")
    model = onnx.load(tmp_path / "B" / "target_scorer.onnx")
    bias = next(t for t in model.graph.initializer if t.name == "task_out.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(bias.dims, np.nan, np.float32), bias.name))
    (tmp_path / "B" / "target_scorer.onnx").write_bytes(model.SerializeToString())
    seal(tmp_path / "B", Bundle.load(bundle_dir).manifest)
    session = Session.load(tmp_path / "B", threads=1)
    with one_line(EngineError, "'scores'", "not finite", "check_finite"):
        session.score(Request(ask(session)))
    assert np.isnan(Session.load(tmp_path / "B", threads=1, check_finite=False).score(Request(ask(session)))).all()


def test_no_targets_run_nothing(log_session, monkeypatch):
    session, inputs = log_session, ask(log_session, 4, 0)
    monkeypatch.setattr(OnnxRuntimeEngine, "run", None)
    assert session.score(Request(inputs, user="u", version=1)).shape[0] == 0
    assert session.stats().users == 0


def test_a_forked_child_is_told_and_ends(bundle_dir):
    script = (
        "import os, sys, warnings; warnings.simplefilter('ignore')\n"
        "from stca.runtime import Request, Session\n"
        "s = Session.load(sys.argv[1])\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try: s.score(Request({}))\n"
        "    except Exception as e: print(type(e).__name__, e, flush=True)\n"
        "    for call in (lambda: s.forget('u'), s.stats, lambda: s.swap(sys.argv[1])):\n"
        "        try: call()\n"
        "        except Exception as e: print(type(e).__name__, 'again', flush=True)\n"
        "    s._store.memory._lock.acquire()\n"  # as another thread of the parent may have held it
        "    s.close()\n"
        "    del s\n"
        "    sys.exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle_dir)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "EngineError this process was forked" in done.stdout, done.stderr
    assert done.stdout.count("EngineError again") == 3
    assert done.stdout.splitlines()[-1] == "7"


def test_a_closed_session(bundle_dir):
    with Session.load(bundle_dir, threads=1) as session:
        session.score(Request(ask(session), user="u", version=1))
    assert session.stats().users == 0
    with one_line(EngineError, "closed"):
        session.score(Request(ask(session)))


def test_at_most_so_many_users_for_so_long(bundle_dir, monkeypatch):
    session = Session.load(bundle_dir, threads=1, max_users=2, ttl_seconds=60.0)
    inputs = ask(session)
    for user in "abc":
        session.score(Request(inputs, user=user, version=1))
    assert (session.stats().users, session.stats().evictions) == (2, 1)
    monkeypatch.setattr(session._store.memory, "_clock", lambda: time.monotonic() + 61)
    with pytest.raises(HistoryNeededError) as error:
        session.score(Request(without_user(inputs), user="c", version=1))
    assert error.value.code == "history_needed"


def test_a_budget_is_of_real_bytes():
    """Sixty thousand users with empty histories once took a hundred times what was counted."""
    cache = StateCache(1 << 20)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for i in range(20_000):
            state = UserState({f"s{j}": np.zeros((0, 4), np.float32) for j in range(4)}, 0)
            cache.put(StateKey(f"user {i}", i, "w", "f"), state)
            del state
        real = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert cache.stats().bytes <= 1 << 20
    assert real <= 1.1 * (1 << 20)


REPLACED = {  # as `stca export` does it, and as Kubernetes does with a volume, whose files are links
    "directory": (
        "    shutil.copytree(source, root / 'next')\n"
        "    assert _exchange(root / 'next', root / 'B')\n"
        "    shutil.rmtree(root / 'next')\n"
    ),
    "volume": (
        "    place, old = root / 'B', os.readlink(root / 'B' / '..data')\n"
        "    new = '..1' if old == '..2' else '..2'\n"
        "    shutil.copytree(source, place / new)\n"
        "    os.symlink(new, place / '..data_tmp')\n"
        "    os.rename(place / '..data_tmp', place / '..data')\n"
        "    shutil.rmtree(place / old)\n"
    ),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_loading_while_the_bundle_is_replaced(bundle_dir, other_weights, tmp_path, kind):
    """What was checked is what is served: one bundle's encoder never meets the other's scorer."""
    if kind == "directory":
        shutil.copytree(bundle_dir, tmp_path / "B")
    else:
        shutil.copytree(bundle_dir, tmp_path / "B" / "..1")
        (tmp_path / "B" / "..data").symlink_to("..1")
        for file in bundle_dir.iterdir():
            (tmp_path / "B" / file.name).symlink_to(f"..data/{file.name}")
    expected = {}
    for source in (bundle_dir, other_weights):
        session = Session.load(source, threads=1)
        expected[session.manifest.weights] = session.score(Request(ask(session)))
    script = (
        "import itertools, shutil, sys, os\n"
        "from stca.folders import _exchange\nfrom pathlib import Path\n"
        "root = Path(sys.argv[1])\n"
        "for source in itertools.cycle(sys.argv[2:]):\n" + REPLACED[kind]
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(bundle_dir), str(other_weights)]
    with subprocess.Popen(command) as writer:
        try:
            for _ in range(8):
                session = Session.load(tmp_path / "B", threads=1)
                got = session.score(Request(ask(session)))
                assert np.array_equal(got, expected[session.manifest.weights])
            assert writer.poll() is None
        finally:
            writer.kill()


class OneRowMore:
    """An engine whose outputs have a row too many, or one too few."""

    name, inputs, outputs = "odd", (), ()

    def __init__(self, engine, rows):
        self.engine, self.rows = engine, rows

    def run(self, inputs):
        return {n: np.concatenate([x, x[-1:]]) if self.rows > 0 else x[:-1] for n, x in self.engine.run(inputs).items()}


@pytest.mark.parametrize("requests", [1, 2])
@pytest.mark.parametrize(("half", "rows", "said"), [("encoder", 1, "rows of"), ("scorer", -1, "scores for")])
def test_an_engine_with_other_rows_than_asked_is_told(log_session, half, rows, said, requests):
    """A row too many of one user would be the next one's."""
    session, model = log_session, log_session._model
    session._model = dataclasses.replace(model, **{half: OneRowMore(getattr(model, half), rows)})
    asked = [ask(session, 4, 2, i) for i in range(requests)]
    batch = probe.pack(session.manifest.graphs["request"].inputs, asked)
    with one_line(EngineError, said):
        session.score(Request(asked[0]) if requests == 1 else RequestBatch(batch))
    assert session.stats().users == 0
