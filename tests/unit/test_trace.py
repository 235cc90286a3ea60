"""Traces: written, read, cut short, refused; and recorded by a session without anyone's name."""

from __future__ import annotations

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.errors import one_line

from stca import probe
from stca.bundle import Bundle
from stca.errors import UsageError
from stca.manifest import Manifest
from stca.runtime import Recording, Request, Session
from stca.runtime.recording import Recorder, pseudonym
from stca.runtime.request import Door
from stca.trace import Trace, Traced, TraceWriter


def requests(count: int = 5) -> list[Traced]:
    rng = np.random.default_rng(0)
    return [
        Traced(
            {
                "events": rng.standard_normal((n, 3)).astype(np.float32),
                "item": rng.integers(0, 9, 4),
                "on": np.array([n > 1]),
            },
            rng.integers(0, 2, (4, 2)).astype(np.float32) if n % 2 else None,
            n if n else None,
            1.5e9 + n if n else None,
        )
        for n in range(count)
    ]


def same(a: Traced, b: Traced) -> bool:
    pairs = [(a.inputs[n], b.inputs[n]) for n in a.inputs] + ([(a.labels, b.labels)] if a.labels is not None else [])
    equal = all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)
    return equal and list(a.inputs) == list(b.inputs) and (a.user, a.at) == (b.user, b.at)


def written(folder: Path, **options: int) -> Path:
    with TraceWriter(folder, **options) as writer:
        assert all(map(writer.add, requests()))
    return folder


@pytest.mark.parametrize("shard_bytes", [1, 700, 1 << 20])
def test_what_was_written_is_read(tmp_path, shard_bytes):
    folder = written(tmp_path / "t", shard_bytes=shard_bytes)
    trace = Trace(folder)
    found = list(trace)
    assert len(found) == 5
    assert all(map(same, requests(), found))
    assert trace.lost == 0
    assert len(list(folder.iterdir())) == (
        5 if shard_bytes == 1 else 1 if shard_bytes > 700 else len(list(folder.iterdir()))
    )
    assert len(list(trace)) == 5  # again, from the start


def test_a_shard_is_a_safetensors_file(tmp_path):
    import safetensors.numpy

    file = next(written(tmp_path).iterdir())
    tensors = safetensors.numpy.load_file(file)
    assert np.array_equal(tensors["3/input/events"], requests()[3].inputs["events"])
    assert tensors["3/user"] == 3


def test_a_writer_goes_on_where_another_ended_and_two_never_meet(tmp_path):
    written(tmp_path)
    first, second = TraceWriter(tmp_path), TraceWriter(tmp_path)
    first.add(requests()[1])
    second.add(requests()[2])
    first.flush()
    second.flush()
    assert [r.user for r in Trace(tmp_path)] == [None, 1, 2, 3, 4, 1, 2]


def test_a_cut_file_loses_only_its_tail(tmp_path):
    file = next(written(tmp_path).iterdir())
    whole, lost = file.read_bytes(), []
    for size in range(len(whole) - 1, 0, -37):
        file.write_bytes(whole[:size])
        trace = Trace(tmp_path)
        found = list(trace)
        assert all(map(same, requests(), found))
        lost.append(5 - len(found))
        assert trace.lost == lost[-1] or not found  # a cut header does not say how many there were
    assert lost[0] == 1
    assert lost == sorted(lost)
    assert set(lost) == {1, 2, 3, 4, 5}


def test_a_trace_is_bounded(tmp_path):
    one = requests()[4]
    writer = TraceWriter(tmp_path, max_bytes=4000, shard_bytes=1000)
    kept = sum(writer.add(one) for _ in range(50))
    writer.flush()
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert 2 < kept < 50
    assert 2000 < size <= 4000
    assert writer.bytes == size
    assert not TraceWriter(tmp_path, max_bytes=size).add(one)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h["__metadata__"].update(format="other"), "does not say format"),
        (lambda h: h["__metadata__"].update(version="2"), "upgrade stca"),
        (lambda h: h.pop("__metadata__"), "does not say format"),
        (lambda h: h["0/input/item"].update(dtype="BF16"), "no shard of a trace"),
        (lambda h: h["0/input/item"].update(shape=[5]), "another size than its shape"),
        (lambda h: h["0/input/item"].update(shape=[-4]), "another size than its shape"),
        (lambda h: h.update({"x/y": h["0/input/item"]}), "no shard of a trace"),
        (lambda h: h.update({"0/input/item": 3}), "no shard of a trace"),
    ],
)
def test_what_is_no_shard_is_refused(tmp_path, change, said):
    file = next(written(tmp_path).iterdir())
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    with pytest.raises(UsageError, match=said) as e:
        list(Trace(tmp_path))
    assert one_line(e.value)


def test_a_folder_without_a_trace_and_one_that_cannot_be_written(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="trace"):
            Trace(folder)
    with TraceWriter(tmp_path / "ranker" / "1") as writer:
        writer.add(Traced({"x": np.ones(3)}))
    with pytest.raises(UsageError, match=r"traces lie in .*/ranker/1$"):
        Trace(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        TraceWriter(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot hold"):
        TraceWriter(tmp_path / "t").add(Traced({"x": np.array(["text"])}))


def ask(session: Session, user: str | None, seed: int, *, history: bool = True) -> None:
    specs = session.manifest.graphs["request"].inputs
    request = probe.single(specs, 6, 3, np.random.default_rng(seed))
    users = {s.name for s in specs if s.scope == "user"}
    session.score(Request({n: x for n, x in request.items() if history or n not in users}, user, user and 1))


def test_a_session_records_requests_that_bring_their_history(tmp_path, bundle_dir):
    key = bytes(32)
    with Session.load(bundle_dir, threads=1, record=Recording(tmp_path / "t", 1.0, key=key)) as session:
        ask(session, "ann of the hills", 0)
        ask(session, "ann of the hills", 0, history=False)  # a hit that has nothing to record
        ask(session, "ann of the hills", 0)  # a hit that brings its history
        ask(session, None, 1)
    found = list(Trace(tmp_path / "t"))
    assert [r.user for r in found] == [pseudonym("ann of the hills", key)] * 2 + [None]
    assert pseudonym("ann of the hills", bytes([1] * 32)) != found[0].user
    specs = Bundle.load(bundle_dir).manifest.graphs["request"].inputs
    sent = probe.single(specs, 6, 3, np.random.default_rng(0))
    assert found[0].inputs.keys() == sent.keys()
    assert all(np.array_equal(found[1].inputs[n], x) for n, x in sent.items())
    assert not any(b"ann of the hills" in f.read_bytes() for f in (tmp_path / "t").iterdir())
    assert not any(p.stat().st_mode & 0o077 for p in (tmp_path / "t", *(tmp_path / "t").iterdir())), "others may read"


def test_a_history_is_recorded_though_the_runtime_makes_its_mask(tmp_path):
    golden = Path(__file__).parent / "runtime_cpp" / "golden" / "padded_right" / "manifest.json"
    door = Door(Manifest.from_json(golden.read_text()))
    recorder = Recorder(Recording(tmp_path / "t", 1.0))
    recorder.offer(door, {"items": [3, 4], "vectors": np.ones((2, 2))}, {}, "ann")
    recorder.offer(door, {}, {}, "ann")
    recorder.close()
    (found,) = Trace(tmp_path / "t")
    assert found.inputs["mask"].tolist() == [[1, 1, 0, 0, 0]]
    assert found.inputs["count"].tolist() == [2]


def test_what_asks_for_no_scores_and_a_forked_child_record_nothing(tmp_path, bundle_dir):
    session = Session.load(bundle_dir, threads=1, record=Recording(tmp_path / "t", 1.0))
    none = probe.single(session.manifest.graphs["request"].inputs, 6, 0, np.random.default_rng(0))
    assert len(session.score(Request(none, "u", 1))) == 0
    ask(session, "u", 1)
    session.forked = True  # as in a child, whose parent has the same requests waiting
    session.close()
    session.forked = False
    session.close()
    assert len(list(Trace(tmp_path / "t"))) == 1


def test_recording_takes_a_share_and_ends_at_its_bound(tmp_path, bundle_dir):
    def count(**options: float) -> int:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with Session.load(bundle_dir, threads=1, record=Recording(folder, **options)) as session:
            for seed in range(60):
                ask(session, f"u{seed}", seed)
        return len(list(Trace(folder)))

    assert 5 < count(share=0.5) < 55
    assert 1 <= count(share=1.0, max_bytes=12_000) < 30


def test_recording_costs_no_request_its_scores(tmp_path, bundle_dir):
    with Session.load(bundle_dir, threads=1, record=Recording(tmp_path / "t", 1.0, max_bytes=8 << 10)) as session:
        (tmp_path / "t").rmdir()  # nothing can be written any more
        with ThreadPoolExecutor(4) as pool:  # which tells what was raised
            assert len(list(pool.map(lambda i: ask(session, f"{i % 4}", i % 4), range(20)))) == 20
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "options", [{"share": 0}, {"share": 1.5}, {"share": "all"}, {"max_bytes": -1}, {"key": b"short"}, {"key": "x" * 32}]
)
def test_options_out_of_range(tmp_path, options):
    with pytest.raises(UsageError, match="record: "):
        Recording(tmp_path, **options)
    with pytest.raises(UsageError, match="record: is"):
        Session.load(tmp_path, record=str(tmp_path))  # type: ignore[arg-type]


def test_the_demo_trace_has_labels_and_is_the_models(bundle_dir):
    from stca.examples.train.traced import demo_trace

    found = list(demo_trace(users=2, history=50, targets=8))
    assert [r.labels.shape for r in found] == [(8, 2)] * 2
    assert all(len(r.inputs["history_item"]) == 50 and len(r.inputs["target_item"]) == 8 for r in found)
    assert found[0].user != found[1].user
