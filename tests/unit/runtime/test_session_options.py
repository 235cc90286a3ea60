"""What a session is loaded with, and what it tells of its work."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
from support.errors import one_line

from stca import probe
from stca.errors import BuildError, BundleError, HistoryNeededError, RequestError, UsageError
from stca.runtime import OnnxRuntimeOptions, Request, RequestBatch, Session

WRONG = [
    *(("threads", x) for x in ("x", 0, -5, 2.0, True, 10**9, [1], float("nan"))),
    *(("cache_bytes", x) for x in (None, -1, 1e9, float("nan"), "1", True, 1 << 70, 10**5000)),
    *(("max_users", x) for x in (-1, 1.5, "many", False)),
    *(("max_targets", x) for x in (None, 0, -1, "x")),
    *(("gpu", x) for x in (None, -1, True, "cuda:1", 1 << 40)),
    *(("ttl_seconds", x) for x in (0, -1.0, float("nan"), float("inf"), "60", True, [60], 10**400)),
    *(("truncate", x) for x in (None, 1, "yes")),
    ("check_finite", 0),
    ("check_versions", "x\ny"),
    ("native_code", 1),
    *(("engine", x) for x in (1, b"graphs", ["graphs"])),
    *(("precision", x) for x in (16, "fp16")),
    *(("onnxruntime", x) for x in ("CPUExecutionProvider", {}, 1)),
]


@pytest.mark.parametrize(
    ("name", "value"), WRONG, ids=lambda x: ascii(x)[:20] if not isinstance(x, int) else hex(x)[:20]
)
def test_a_wrong_option_is_named(bundle_dir, name, value):
    with one_line(UsageError, name):
        Session.load(bundle_dir, **{name: value})


class Odd(str):
    """Text that compares as nothing should."""

    def __eq__(self, other):
        raise ZeroDivisionError

    __hash__ = str.__hash__


class Nowhere:
    def __fspath__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state_folder", "x" * 10**6),
        ("state_folder", Nowhere()),
        ("state_folder", "a\0b"),
        ("state_folder", "\ud800"),
        ("trusted", 5),
        ("trusted", [[[]]]),
        ("trusted", ""),
        ("trusted", Nowhere()),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_path_that_is_none_is_named(bundle_dir, name, value):
    with one_line(UsageError, name):
        Session.load(bundle_dir, **{name: value})


@pytest.mark.parametrize("engine", [Odd("x"), "x" * 10**6], ids=["odd", "long"])
def test_an_engine_that_is_none(bundle_dir, engine):
    with one_line(BuildError, "there is no engine 'x", "graphs"):
        Session.load(bundle_dir, engine=engine)


@pytest.mark.parametrize(
    "path", [None, 5, 10**400, b"x", np.arange(3), Nowhere(), "x" * 10**6], ids=lambda x: type(x).__name__
)
def test_a_bundles_path_that_is_none(path):
    with one_line(BundleError, "a bundle's path"):
        Session.load(path)


def test_right_options_of_any_integer_type_are_taken(bundle_dir):
    session = Session.load(
        bundle_dir, threads=np.int32(1), cache_bytes=np.int64(0), max_users=np.uint8(3), ttl_seconds=np.float32(1)
    )
    assert session.stats().budget == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"providers": "CPUExecutionProvider"},
        {"providers": ()},
        {"providers": [1]},
        {"providers": [("CPUExecutionProvider",)]},
        {"config": {"a": 1}},
        {"config": "a"},
    ],
)
def test_wrong_options_of_onnxruntime_are_named(wrong):
    with one_line(UsageError, *wrong):
        OnnxRuntimeOptions(**wrong)


def test_onnxruntimes_own_options_reach_it(bundle_dir, asked):
    cpu = "CPUExecutionProvider"
    plain = Session.load(bundle_dir, threads=1).score(asked)
    for options in (
        OnnxRuntimeOptions(config={"session.intra_op.allow_spinning": "0"}),
        OnnxRuntimeOptions(providers=[(cpu, {"use_arena": "0"})]),
    ):
        session = Session.load(bundle_dir, threads=1, onnxruntime=options)
        assert np.allclose(session.score(asked), plain, rtol=1e-6)
        assert "options for ONNX Runtime" in session.engines["why"]
    with one_line(BuildError, "ONNX Runtime"):  # an entry that cannot be had: it got there
        Session.load(bundle_dir, onnxruntime=OnnxRuntimeOptions(config={"x" * 5000: "1"}))
    with one_line(BuildError, "NoSuchExecutionProvider"):
        Session.load(bundle_dir, onnxruntime=OnnxRuntimeOptions(["NoSuchExecutionProvider", cpu]))


@pytest.fixture
def specs(log_session):
    return log_session.manifest.graphs["request"].inputs


@pytest.fixture
def inputs(specs):
    return probe.single(specs, 4, 3, np.random.default_rng(0))


@pytest.fixture
def asked(inputs):
    return Request(inputs, "ann", 1)


def without_user(specs, inputs):
    return {n: x for n, x in inputs.items() if n not in {s.name for s in specs if s.scope == "user"}}


def test_an_answer_tells_hits_and_stages(log_session, specs, inputs, asked):
    first, second = log_session.answer(asked), log_session.answer(asked)
    assert (first.hits, second.hits) == ((False,), (True,))
    assert np.array_equal(first.scores, second.scores)
    for told in (first, second):
        assert list(told.seconds) == ["check", "encode", "score"]
        assert all(0 <= s < 60 for s in told.seconds.values())
    batch = probe.pack(specs, [inputs] * 4)
    answer = log_session.answer(RequestBatch(batch, ["ann", "bob", "bob", None], [1, 1, 1, None]))
    assert answer.hits == (True, False, True, False)
    assert (log_session.stats().hits, log_session.stats().misses) == (3, 2)


def test_a_history_that_is_asked_for_counts_as_no_miss(log_session, specs, inputs):
    """Counters count encodings: a request that is sent back to bring its history is none."""
    for _ in range(3):
        with pytest.raises(HistoryNeededError):
            log_session.score(Request(without_user(specs, inputs), "ann", 1))
    log_session.score(Request(inputs, "ann", 1))
    assert (log_session.stats().hits, log_session.stats().misses) == (0, 1)


def test_another_history_of_the_same_version_is_found_in_debugging(bundle_dir, specs, inputs):
    other = probe.single(specs, 4, 3, np.random.default_rng(1))
    loose, strict = (Session.load(bundle_dir, threads=1, check_versions=b) for b in (False, True))
    for session in (loose, strict):
        session.score(Request(inputs, "ann", 1))
        session.score(Request(inputs, "ann", 1))
        session.score(Request(without_user(specs, inputs), "ann", 1))
    loose.score(Request(other, "ann", 1))
    with one_line(RequestError, "ann", "version 1"):
        strict.score(Request(other, "ann", 1))
    events = [s.name for s in specs if s.scope == "user" and s.shape[0] == "N_h"]
    assert strict.append("ann", {n: other[n] for n in events}, 2)
    strict.score(Request(other, "ann", 2))  # nobody knows the digest of a history that was appended to


def test_more_targets_than_the_limit_are_refused_before_they_are_looked_at(bundle_dir, specs, inputs):
    session = Session.load(bundle_dir, threads=1, max_targets=5)
    targets = [s.name for s in specs if s.scope == "target" and s.shape[0] == "N_t"]
    for n in (6, 10**8, 10**13):
        many = {t: np.broadcast_to(np.int64(-1), (n,)) for t in targets}  # no id is -1
        with one_line(RequestError, targets[0]):
            session.score(Request({**inputs, **many}, "ann", 1))
    events = [s.name for s in specs if s.scope == "user" and s.shape[0] == "N_h"]
    with one_line(RequestError, "100000000 tokens", "limit"):
        session.score(Request({**inputs, **{n: np.broadcast_to(np.int64(-1), (10**8,)) for n in events}}))
    session.score(RequestBatch(probe.pack(specs, [inputs])))
    with one_line(RequestError, "6 targets", "5", "max_targets"):
        session.score(RequestBatch(probe.pack(specs, [inputs] * 2)))


def test_the_log_tells_of_bundles_and_counts_and_never_of_users(bundle_dir, other_weights, inputs, caplog):
    with caplog.at_level(logging.DEBUG, logger="stca.runtime"):
        session = Session.load(bundle_dir, threads=1, max_users=1)
        for user in ("secret-ann", "secret-bob"):
            session.score(Request(inputs, user, "secret-version"))
        session.swap(other_weights)
    told = [r.getMessage() for r in caplog.records]
    assert [r.levelname for r in caplog.records] == ["INFO", "DEBUG", "INFO"]
    assert told[0].startswith("loaded ")
    assert str(bundle_dir)[:40] in told[0]  # longer paths are cut
    assert session.engines["user_encoder"] in told[0]
    assert told[1] == "evicted 1 states; 1 are kept"
    assert told[2].startswith("swapped in ")
    assert session.manifest.weights[:12] in told[2]
    assert "secret" not in " ".join(told)


def test_options_are_one_list():
    """What `Session.load` takes and what is checked are the same."""
    import inspect

    from stca.runtime.options import Options

    taken = {n for n, p in inspect.signature(Session.load).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert taken == {f.name for f in dataclasses.fields(Options)}
