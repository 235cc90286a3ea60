"""States in files: found after eviction and restart, forgotten everywhere, and whole or discarded, never wrong."""

from __future__ import annotations

import datetime
import itertools
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import uuid

import numpy as np
import pytest
from support.errors import one_line

from stca import probe
from stca.errors import HistoryNeededError, UsageError
from stca.runtime import Recording, Request, Session, record
from stca.runtime.file_tier import FileTier
from stca.runtime.record import Header, Names, Tensor

HISTORY = ("history_item", "history_action", "history_category", "history_time", "history_gap")


@pytest.fixture
def loaded(bundle_dir, tmp_path):
    """Loads sessions with room for one user in memory, one after the other with the same folder."""
    held = []

    def load(bundle=bundle_dir, **options):
        while held:
            held.pop().close()
        options = {"threads": 1, "max_users": 1, "state_folder": tmp_path / "states"} | options
        held.append(Session.load(bundle, **options))
        return held[0]

    yield load
    while held:
        held.pop().close()


@pytest.fixture
def asked(log_session):
    """Requests of users 0 … 5: with their history, and without."""
    specs = log_session.manifest.graphs["request"].inputs
    whole = [probe.single(specs, 9, 4, np.random.default_rng(i)) for i in range(6)]
    others = {s.name for s in specs if s.scope != "user"}
    return [
        (Request(x, f"user {i}", 1), Request({n: a for n, a in x.items() if n in others}, f"user {i}", 1))
        for i, x in enumerate(whole)
    ]


def fill(session, asked):
    scores = []
    for whole, _ in asked:
        scores.append(session.score(whole))
        assert session._store.file.wait(60), "else the next user takes the place in memory first"
    return scores


def files(tmp_path):
    return sorted((tmp_path / "states").glob("*.state"))


def test_who_left_memory_is_a_hit_with_a_price(loaded, asked):
    session = loaded()
    expected = fill(session, asked)
    for (_, rest), scores in zip(asked, expected, strict=True):
        assert np.array_equal(session.score(rest), scores), "bit for bit: the state is the one that was made"
    stats = session.stats()
    assert stats.users == 1
    assert stats.hits_from == {"file": 6}
    assert stats.file.users == stats.file.writes == 6
    assert stats.file.reads == 6
    assert 0 < stats.file.read_seconds < 60
    assert 0 < stats.file.bytes == sum(p.stat().st_size for p in session._store.file._folder.glob("*.state"))


def test_a_restart_finds_the_states_and_a_swap_discards_them(loaded, asked, tmp_path, other_weights):
    expected = fill(loaded(), asked)
    session = loaded()
    assert np.array_equal(session.score(asked[2][1]), expected[2])
    assert session.append("user 1", {n: asked[1][0].inputs[n][:2] for n in HISTORY}, 2, after=1), "from the file, too"
    assert session.append("user 1", {n: asked[1][0].inputs[n][:2] for n in HISTORY}, 2), "it is there already"
    session.swap(other_weights)
    assert files(tmp_path) == []
    with one_line(HistoryNeededError):
        session.score(asked[2][1])
    other = session.score(asked[2][0])
    assert session._store.file.wait(60)
    session = loaded()
    assert session.stats().file.discarded == 1, "written by a session of other weights"
    assert files(tmp_path) == []
    assert np.array_equal(session.score(asked[2][0]), expected[2])
    assert not np.array_equal(other, expected[2])


def test_forgotten_is_forgotten_in_every_tier(loaded, asked, tmp_path):
    session = loaded()
    fill(session, asked)
    assert session.forget("user 0")
    assert not session.forget("user 0")
    assert session.forget("user 5"), "in memory and in a file"
    assert len(files(tmp_path)) == 4
    session = loaded()
    for user in (0, 5):
        with one_line(HistoryNeededError):
            session.score(asked[user][1])


def test_what_is_forgotten_while_it_is_written_is_not_kept(loaded, asked, tmp_path, monkeypatch):
    write, reached, opened = record.write, threading.Event(), threading.Event()

    def slow(*arguments):
        size = write(*arguments)
        reached.set()
        assert opened.wait(60)
        return size

    monkeypatch.setattr(record, "write", slow)
    session = loaded()
    session.score(asked[0][0])
    assert reached.wait(60)
    session.forget("user 0")
    opened.set()
    session.score(asked[1][0])
    assert session._store.file.wait(60)
    assert len(files(tmp_path)) == 1
    with one_line(HistoryNeededError):
        session.score(asked[0][1])


def test_where_a_state_is(loaded, asked, tmp_path):
    session = loaded()
    fill(session, asked)
    assert [session.residence(f"user {i}", 1).tier for i in range(6)] == ["file"] * 5 + ["memory"]
    sizes = {p.stat().st_size for p in files(tmp_path)}
    found = session.residence("user 0")
    assert found.bytes in sizes
    assert session.residence("user 0", 2) is None
    assert session.residence("user 0") == found, "to ask moves nothing"
    assert [session.residence("user 0", of).version for of in (None, 1)] == [None, 1], "a file has its digest"


def test_nothing_in_the_folder_names_a_user(loaded, asked, tmp_path):
    session = loaded()
    inputs = asked[0][0].inputs
    session.score(Request(inputs, "ann@example.org", "version of ann"))
    assert session._store.file.wait(60)
    (path,) = files(tmp_path)
    data = path.name.encode() + path.read_bytes()
    assert not any(word in data for word in (b"ann", b"example", b"version of"))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "states" / "key").stat().st_mode) == 0o600
    (tmp_path / "states" / "key").write_bytes(os.urandom(32))
    assert loaded().stats().file.users == 0, "of another key"


def damages(path):
    data = path.read_bytes()
    for cut in (0, 1, 40, len(data) // 2, len(data) - 1):
        yield data[:cut]
    yield data + b"x"
    for at in (0, 30, 60, 200, len(data) // 2, len(data) - 1):
        yield data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("reopened", [True, False])
def test_a_damaged_record_is_a_miss_and_goes(loaded, asked, tmp_path, reopened):
    session = loaded(max_users=None)
    (expected,) = fill(session, asked[:1])
    session.score(asked[1][0])
    (path,) = (p for p in files(tmp_path) if p.stem == session._store.file._names.of("user 0"))
    good = path.read_bytes()
    for number, data in enumerate([*damages(path)]):
        if reopened:
            session.close()
        path.write_bytes(data)
        session = loaded(max_users=None) if reopened else session
        if not reopened:
            session._store.memory.forget("user 0")
        with one_line(HistoryNeededError):
            session.score(asked[0][1])
        assert not path.exists(), number
        assert np.array_equal(session.score(asked[0][0]), expected)
        assert session._store.file.wait(60)
        assert path.exists()
    path.write_bytes(good)
    session._store.memory.forget("user 0")
    assert np.array_equal(session.score(asked[0][1]), expected)


def test_a_torn_record_is_told_as_the_reason(loaded, asked, tmp_path):
    session = loaded()
    fill(session, asked[:2])
    path = tmp_path / "states" / (session._store.file._names.of("user 0") + ".state")
    path.write_bytes(path.read_bytes()[:-1])
    session.score(asked[0][0])
    assert session.stats().misses_for == {"new_user": 2, "damaged": 1}


def test_killed_at_any_moment_what_is_left_is_right(bundle_dir, loaded, asked, tmp_path):
    """A process that writes states without end is killed; then every state that is found is the true one."""
    script = textwrap.dedent("""
        import sys, itertools, numpy as np
        from stca import probe
        from stca.runtime import Request, Session
        session = Session.load(sys.argv[1], threads=1, state_folder=sys.argv[2])
        specs = session.manifest.graphs["request"].inputs
        print("ready", flush=True)
        for i in itertools.count():
            inputs = probe.single(specs, 9, 4, np.random.default_rng(i % 6))
            session.score(Request(inputs, f"user {i % 6}", 1 if i < 6 else i // 6 % 3))
    """)
    found, expected = 0, None
    for seconds in (0.05, 0.2):
        child = subprocess.Popen(
            [sys.executable, "-c", script, bundle_dir, tmp_path / "states"], stdout=subprocess.PIPE, env=os.environ
        )
        assert child.stdout.readline() == b"ready\n"
        threading.Event().wait(seconds)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        session = loaded()
        assert not list((tmp_path / "states").glob("*.new"))
        expected = expected or [Session.load(bundle_dir, threads=1).score(whole) for whole, _ in asked]
        for (_, rest), scores in zip(asked, expected, strict=True):
            for version in (0, 1, 2):
                try:
                    got = session.score(Request(rest.inputs, rest.user, version))
                except HistoryNeededError:
                    continue
                found += 1
                assert np.array_equal(got, scores)
        session.close()
    assert found, "states outlive the process"


def test_a_folder_belongs_to_one_session(bundle_dir, loaded, tmp_path):
    session = loaded()
    with one_line(UsageError, "state_folder", "another session"):
        Session.load(bundle_dir, threads=1, state_folder=tmp_path / "states")
    session.close()
    loaded()


def test_a_folder_that_cannot_be_used_is_named(bundle_dir, tmp_path):
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        with one_line(UsageError, "state_folder", "file"):
            Session.load(bundle_dir, threads=1, state_folder=wrong)
    for name, value in (("state_folder", 5), ("state_folder", ""), ("state_folder_bytes", -1)):
        with one_line(UsageError, name):
            Session.load(bundle_dir, **{name: value})


def test_the_folders_budget_is_kept(loaded, asked, tmp_path):
    session = loaded()
    fill(session, asked[:1])
    size = session.stats().file.bytes + 20  # the text of a time is not always as long
    session = loaded(state_folder_bytes=2 * size)
    fill(session, asked)
    assert session.stats().file.users == len(files(tmp_path)) == 2
    assert session.stats().file.bytes == sum(p.stat().st_size for p in files(tmp_path)) <= 2 * size
    assert session.stats().file.evictions == 4
    session = loaded(state_folder_bytes=size)
    assert session.stats().file.users == len(files(tmp_path)) == 1
    session = loaded(state_folder_bytes=size // 2)
    fill(session, asked[:2])
    assert (session.stats().file.users, session.stats().file.skipped) == (0, 2)


def test_old_states_go_from_files_and_stay_old_in_memory(loaded, asked, tmp_path):
    session = loaded(ttl_seconds=1000)
    fill(session, asked[:2])
    now = session._store.file._clock
    session._store.file._clock = lambda: now() + 600
    session.score(asked[0][1])
    memory, clock = session._store.memory, session._store.memory._clock
    assert 599 < memory.fetch("user 0")[1] < 700
    memory._clock = lambda: clock() + 500
    assert memory.find("user 0") is None, "made 600 + 500 seconds ago, whenever it was read"
    session._store.file._clock = lambda: now() + 1001
    with one_line(HistoryNeededError):
        session.score(asked[1][1])
    assert session.stats().file.users == len(files(tmp_path)) == 0


def test_a_full_disk_fails_no_request(loaded, asked, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "write", full)
    session = loaded()
    fill(session, asked)
    assert (session.stats().file.failed, session.stats().file.users) == (6, 0)


def test_whatever_fails_one_write_the_next_is_written(loaded, asked, monkeypatch):
    write, failed = record.write, []

    def once(*arguments):
        if not failed:
            failed.append(1)
            raise MemoryError
        return write(*arguments)

    monkeypatch.setattr(record, "write", once)
    session = loaded()
    fill(session, asked)
    assert (session.stats().file.failed, session.stats().file.users) == (1, 5)


def test_a_file_that_stays_fails_no_request_but_is_not_said_to_be_forgotten(loaded, asked, tmp_path, monkeypatch):
    session = loaded(ttl_seconds=1000)
    fill(session, asked[:2])

    def readonly(*_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "unlink", readonly)
        now = session._store.file._clock
        session._store.file._clock = lambda: now() + 1001
        with one_line(HistoryNeededError):
            session.score(asked[0][1])
        with one_line(UsageError, "state_folder", "cannot be removed"):
            session.forget("user 1")
    assert session._store.memory.find("user 1") is None
    assert not session.forget("user 1")
    assert len(files(tmp_path)) == 1, "its file is gone; the other is looked at when a session starts"


def test_a_session_that_is_not_made_leaves_the_folder_to_the_next(loaded, tmp_path):
    (tmp_path / "file").touch()
    with one_line(UsageError, "trace"):
        loaded(record=Recording(tmp_path / "file"))
    loaded().close()


def test_a_checked_version_is_checked_after_a_restart(loaded, asked):
    fill(loaded(check_versions=True), asked[:1])
    session = loaded(check_versions=True)
    session.score(asked[0][0])
    assert session._store.memory.find("user 0")[1].history is not None


# --- records and names ------------------------------------------------------------------------------------------------


def test_tensors_of_any_kind_come_back(tmp_path):
    tensors = {
        "floats": np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)[1:3],
        "half": np.ones((3, 1), np.float16),
        "none": np.zeros((0, 5), np.int64),
        "one": np.array(7, np.int32),
        "bits": np.array([True, False]),
    }
    record.write(tmp_path / "x", Header("u", "v", "k", 12.5, 3, None), tensors)
    header, got = record.read(tmp_path / "x")
    assert (header.user, header.version, header.kind, header.born, header.tokens) == ("u", "v", "k", 12.5, 3)
    assert list(got) == list(tensors)
    for name, x in tensors.items():
        assert got[name].dtype == x.dtype
        assert np.array_equal(got[name], x)
        assert got[name].shape == x.shape


@pytest.mark.parametrize("wrong", [Tensor("x", "O", (1,)), Tensor("x", "f4", (-1, -1))], ids=str)
def test_a_tensor_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="no plain tensor"):
        _ = wrong.nbytes


def test_each_user_has_a_name_of_their_own_and_each_folder_others():
    utc, east = datetime.UTC, datetime.timezone(datetime.timedelta(hours=2))
    noon = datetime.datetime(2026, 1, 1, 12)
    users = ["1", b"1", 1, 11, -1, ("1",), ("1", "1"), ("11",), (("1",), "1"), None, "", (), uuid.UUID(int=1)]
    users += [noon, noon.replace(tzinfo=utc), noon.date(), "a\ud800", "user", ("user", 1), ("user", "1")]
    names, others = Names(b"a" * 32), Names(b"b" * 32)
    assert len({names.of(u) for u in users}) == len(users)
    assert all(names.of(u) != others.of(u) for u in users)
    assert names.of(noon.replace(tzinfo=utc)) == names.of(noon.replace(hour=14, tzinfo=east)), "equal keys"


def test_more_than_can_wait_is_skipped(tmp_path):
    """Nobody writes yet: the tier is not served."""
    tier = FileTier(tmp_path, 1 << 20, lambda _: None)
    for user in itertools.islice(itertools.count(), 1500):
        tier.offer(user)
    assert len(tier._waiting) == 1024
    assert tier.stats().skipped == 1500 - 1024
    tier.close()
