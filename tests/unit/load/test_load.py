"""Traces as users' traffic is, latencies from the moment a request was due, and a run against each kind of answerer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.errors import one_line
from support.serving import running

from stca import commands, probe
from stca.bundle import Bundle
from stca.commands.load import _compared, histories, range_
from stca.errors import UsageError
from stca.load.clients import Answered, Behind, InProcess
from stca.load.inputs import Inputs
from stca.load.run import capacity, run
from stca.load.traffic import Arrival, Traffic, read_trace, recorded, write_trace
from stca.load.workloads import Crowd
from stca.runtime import Session
from stca.specs import TensorSpec
from stca.trace import Trace, Traced, TraceWriter


def requests(trace: list[Arrival]) -> list[Arrival]:
    return [a for a in trace if a.targets]


def test_traffic_is_as_it_was_asked_for():
    trace = Traffic(users=50, zipf=1.0, targets=(3, 7), history=(10, 40), events=2.0, seed=1).trace(200.0, 50.0)
    asked = requests(trace)
    assert [a.at for a in trace] == sorted(a.at for a in trace)
    assert len(asked) == pytest.approx(10_000, rel=0.05)
    gaps = np.diff([a.at for a in asked])
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as of a Poisson process
    counts = np.bincount([a.user for a in asked], minlength=50)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.3)
    assert {a.targets for a in asked} == {3, 4, 5, 6, 7}
    known: dict[int, int] = {}
    for a in trace:
        assert a.tokens - a.events == known.get(a.user, a.tokens)
        known[a.user] = a.tokens
    between = len(asked) - len(known)
    assert sum(a.events for a in trace) / between == pytest.approx(2.0, rel=0.05)
    assert Traffic(users=50, seed=1).trace(10, 10) == Traffic(users=50, seed=1).trace(10, 10)


def test_spikes_raise_the_rate_for_their_time():
    trace = requests(Traffic(users=1, spike=(10.0, 2.0, 3.0)).trace(100.0, 100.0))
    within = sum(a.at % 10 < 2 for a in trace)
    assert within == pytest.approx(100 * 0.2 * 300, rel=0.1)
    assert len(trace) - within == pytest.approx(100 * 0.8 * 100, rel=0.1)


@pytest.mark.parametrize(
    ("workload", "quarters"),
    [("steady", "mmmm"), ("trend", "f  o"), ("burst", "ofof")],  # of the first crowd, the other, or half and half
)
def test_traffic_moves_between_two_crowds(workload, quarters):
    first = Traffic(users=400, zipf=0.0, items=10, workload=workload, towards=Crowd(4, 0.0, 1000), seed=3)
    trace = requests(first.trace(1000.0, 8.0))
    for part, expected in enumerate(quarters):
        inside = [a for a in trace if 2 * part <= a.at < 2 * part + 2]
        few = np.mean([a.user < 4 for a in inside])
        items = {a.items for a in inside}
        assert {"f": few < 0.1, "o": few > 0.4, "m": 0.4 < few < 0.6, " ": True}[expected], (part, few)
        assert {"f": 10 in items, "o": 1000 in items, "m": items == {10, 1000}, " ": True}[expected], (part, items)
    if workload == "trend":
        assert [a.items for a in trace] == sorted(a.items for a in trace)


def test_targets_are_the_items_of_a_crowd(exported):
    inputs = Inputs(Bundle.load(exported("log", "projected")).manifest, 10, 0)
    counts = [len(np.unique(inputs.targets(2000, 0, items, 1.0)["target_item"])) for items in (3, 30)]
    assert counts == [3, 30]
    assert len(np.unique(inputs.targets(2000, 0)["target_item"])) > 30
    (capped,) = inputs.unmet(10**9)
    assert "fewer than" in capped
    assert inputs.unmet(3) == inputs.unmet(0) == []
    inputs._rest = [dataclasses.replace(s, limit=None) for s in inputs._rest]
    assert all("does not tell its ids" in line for line in inputs.unmet(3))
    assert inputs.unmet(3)


def test_histories_that_the_model_does_not_take_are_told(exported):
    manifest = Bundle.load(exported("log", "projected")).manifest
    window = manifest.max_history
    assert Inputs(manifest, 10, 0).unmet(0, (0, window)) == []
    (cut,) = Inputs(manifest, 10, 0).unmet(0, (0, window + 1))
    assert f"{window} events at most" in cut
    (more,) = Inputs(dataclasses.replace(manifest, min_history=2), 10, 0).unmet(0, (1, 5))
    assert "2 events at least" in more
    assert len(Inputs(manifest, 10, 0).user(0, 0)["history_item"]) == 0
    assert len(Inputs(dataclasses.replace(manifest, min_history=2), 1, 0).user(0, 0)["history_item"]) == 2


def test_a_model_of_a_fixed_length_tells_that_its_histories_have_it():
    inputs = (TensorSpec("hist", "int64", (1, 50), "user", 9), TensorSpec("item", "int64", ("N_t",), "target", 9))
    manifest = SimpleNamespace(
        graphs={"request": SimpleNamespace(inputs=inputs)},
        max_history=None,
        min_history=None,
        state=(),
        appendable=False,
        padding=None,
    )
    (told,) = Inputs(manifest, 10, 0).unmet(0, (100, 2000))
    assert "have 50 events" in told
    assert Inputs(manifest, 10, 0).unmet(0, (50, 50)) == []


def test_histories_may_be_empty_at_first():
    tokens = [a.tokens for a in Traffic(users=500, zipf=0.0, history=(0, 10), events=0.0).trace(1000.0, 2.0)]
    assert {min(tokens), max(tokens)} == {0, 10}
    assert range_("3,5") == (3, 5)
    assert histories("0,10") == (0, 10)
    with pytest.raises(argparse.ArgumentTypeError):
        range_("0,10")


def test_the_same_items_lead_in_every_request(exported):
    inputs = Inputs(Bundle.load(exported("log", "projected")).manifest, 10, 0)
    few, more = (inputs.targets(2000, number, 3, 1.0)["target_item"] for number in (0, 1))
    assert set(few) == set(more), "the same items lead in every request"
    assert np.unique(few, return_counts=True)[1].max() > 2000 / 3 * 1.3


HALF_NAMED = {"workload": "trend", "towards": Crowd(20, 1.0, 300)}  # items of one crowd alone


def test_a_trace_comes_back_from_its_file(tmp_path):
    file = str(tmp_path / "trace.jsonl")
    trace = Traffic(users=5).trace(20.0, 5.0)
    write_trace(file, trace)
    assert read_trace(file) == trace
    for text, word in (("{", "line"), ('{"at": 1}', "user"), ('{"at": 1, "user": -1}', "user"), ("", "no arrivals")):
        Path(file).write_text(text)
        with one_line(UsageError, file):
            read_trace(file)
        assert word
    for wrong in ({"history": (5, 2)}, {"users": 0}, {"zipf": -1.0}, {"workload": "flood"}, HALF_NAMED):
        with one_line(UsageError):
            Traffic(**wrong)  # type: ignore[arg-type]


class Stalls:
    """Answers at once, but the eleventh time after a pause in which it answers nobody."""

    appends = True

    def __init__(self, manifest: Any) -> None:
        self.manifest, self._asked, self._lock = manifest, 0, threading.Lock()

    def score(self, user: str, version: int, inputs: Mapping[str, Any], deadline_ms: float | None) -> Answered:
        with self._lock:
            self._asked += 1
            time.sleep(0.4 if self._asked == 11 else 0)
        return Answered("ok", True)

    def append(self, *_: object) -> str:
        return "appended"

    def store(self) -> dict[str, Any]:
        return {}


def test_requests_that_had_to_wait_count_from_when_they_were_due(bundle_dir):
    """100 requests over a second, all answered within no time but for a pause of 0.4 s: 40 of them waited."""
    manifest = Bundle.load(bundle_dir).manifest
    trace = [Arrival(i / 100, 0, 1, 5) for i in range(100)]
    found = run(Stalls(manifest), Inputs(manifest, 5, 0), trace, connections=1, deadline_ms=100.0)
    assert found.requests == 100
    assert found.latency_ms["p95"] > 250  # a client that measured from its own sending would see one slow request
    assert found.goodput_per_second < found.answered_per_second
    assert found.late_ms > 250


class Appends:
    """Keeps the version of one user, and takes its time to append the first time."""

    appends = True

    def __init__(self, manifest: Any) -> None:
        self.manifest, self.version, self.slow = manifest, 5, True
        self.asked: list[int] = []

    def score(self, user: str, version: int, inputs: Mapping[str, Any], deadline_ms: float | None) -> Answered:
        self.asked.append(version)
        known = version <= self.version or "history_item" in inputs
        return Answered("ok", True) if known else Answered("history_needed")

    def append(self, user: str, version: int, after: int, events: Mapping[str, Any]) -> str:
        if self.slow:
            self.slow = False
            time.sleep(0.2)
        kept, self.version = self.version == after, version
        return "appended" if kept else "no_state"

    def store(self) -> dict[str, Any]:
        return {}


def test_a_users_events_come_in_turn_and_requests_after_them(bundle_dir):
    """Requests and events fall into the time in which the first events are appended."""
    manifest = Bundle.load(bundle_dir).manifest
    client = Appends(manifest)
    trace = [Arrival(0.0, 0, 2, 5), Arrival(0.02, 0, 0, 6, 1), Arrival(0.04, 0, 2, 6), Arrival(0.06, 0, 0, 8, 2)]
    found = run(client, Inputs(manifest, 8, 0), [*trace, Arrival(0.08, 0, 2, 8)], connections=5)
    assert client.asked[0] == 5
    assert max(client.asked) == 8
    assert set(client.asked[1:]) <= {6, 8}, "two that waited for one append may be sent in any order"
    assert (found.resent, found.appended, found.not_appended, client.version) == (0, 2, 0, 8)


class Refuses(Appends):
    """Refuses to append the first time, once another user was answered."""

    def __init__(self, manifest: Any) -> None:
        super().__init__(manifest)
        self.other, self.in_time, self.appends_asked = threading.Event(), False, list[tuple[int, int]]()

    def score(self, user: str, version: int, inputs: Mapping[str, Any], deadline_ms: float | None) -> Answered:
        if user == "1":
            self.other.set()
            return Answered("ok", True)
        return super().score(user, version, inputs, deadline_ms)

    def append(self, user: str, version: int, after: int, events: Mapping[str, Any]) -> str:
        self.appends_asked.append((version, after))
        if self.slow:
            self.slow, self.in_time = False, self.other.wait(20)
            return "overloaded"
        return super().append(user, version, after, events)


def test_events_hold_up_no_other_user_and_go_with_the_next_where_they_are_refused(bundle_dir):
    """With two connections, one of them waits for an append, and two requests of that user wait for it, too."""
    manifest = Bundle.load(bundle_dir).manifest
    client = Refuses(manifest)
    waits = [Arrival(0.0, 0, 2, 5), Arrival(0.02, 0, 0, 6, 1), Arrival(0.04, 0, 2, 6), Arrival(0.04, 0, 2, 6)]
    trace = [*waits, Arrival(0.06, 1, 2, 5), Arrival(1.0, 0, 0, 8, 2)]
    found = run(client, Inputs(manifest, 8, 0), [*trace, Arrival(1.1, 0, 2, 8)], connections=2)
    assert client.in_time, "the other user's request waited"
    assert client.asked == [5, 5, 5, 8], "what the server has"
    assert client.appends_asked == [(6, 5), (8, 5)]
    assert found.events == {"overloaded": 1, "appended": 1}
    assert (found.codes, found.resent) == ({"ok": 5}, 0)


def test_against_a_session_every_request_is_scored(bundle_dir):
    session = Session.load(bundle_dir, threads=1)
    trace = Traffic(users=6, targets=(1, 4), history=(3, 20), events=1.0).trace(200.0, 1.0)
    inputs = Inputs(session.manifest, max(a.tokens for a in trace), 0)
    found = run(InProcess(session), inputs, trace, connections=2, offline=True)
    assert found.codes == {"ok": len(requests(trace))}
    assert found.hits + found.misses == found.requests
    assert found.hits > found.requests / 2
    assert {"50", "90"} <= found.percentiles_ms["all"].keys()
    assert "99.9" not in found.percentiles_ms["all"], "of a few hundred, none is the slowest of a thousand"
    long, rounded = found.timeline[0].at * 2, 0.001 / found.timeline[0].at
    offered = sum(part.offered_per_second for part in found.timeline) * long
    assert offered == pytest.approx(found.requests, rel=0.01 + rounded)
    assert found.appended > 0
    assert sum(found.events.values()) == len(trace) - found.requests
    assert found.store["misses"] == found.misses
    without = InProcess(Session.load(bundle_dir, threads=1, cache_bytes=0))
    assert run(without, inputs, trace, connections=1, offline=True).hits == 0


def test_against_a_server_as_against_a_session(bundle_dir):
    with running(bundle_dir) as server:
        url, admin = (f"http://127.0.0.1:{server.ports[p]}" for p in ("http", "admin"))
        client = Behind(url, admin)
        trace = Traffic(users=4, targets=(1, 4), history=(3, 20), events=1.0).trace(100.0, 1.0)
        inputs = Inputs(client.manifest, max(a.tokens for a in trace), 0)
        found = run(client, inputs, trace, connections=3, offline=True)
        assert found.codes == {"ok": len(requests(trace))}
        assert found.appended > 0
        assert server.served.session.stats().misses == found.misses
        without = run(Behind(url), inputs, trace, connections=3, offline=True)
        assert without.events == {"with_request": len(trace) - found.requests}
        for wrong in (url, "http://127.0.0.1:1", f"http://127.0.0.1:{server.ports['grpc']}"):
            with one_line(UsageError, "--admin", wrong, "8002"):
                Behind(url, wrong)
        for wrong in (admin, f"http://127.0.0.1:{server.ports['grpc']}"):
            with one_line(UsageError, wrong, "stca serve", "--http-port"):
                Behind(wrong)
        assert capacity(client, inputs, trace, 2, 0.1) > 0
        with one_line(UsageError, "other"):
            Behind(f"{url}/v2/models/other")
    with one_line(UsageError):
        Behind(url)
    for wrong in ("ftp://a", "http://", "http://a:b", "http://[", "https://a"):
        with one_line(UsageError):
            Behind(wrong)


def test_the_command_reports(bundle_dir, tmp_path, capsys):
    record = tmp_path / "trace.jsonl"
    options = ["--seconds", "0.5", "--history", "3,20", "--targets", "1,4", "--users", "5"]
    command = ["load", str(bundle_dir), *options, "--rate", "60", "--deadline-ms", "500"]
    assert commands.main([*command, "--compare", "--json", "--record", str(record)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["load"]["requests"] == told["without_store"]["requests"] == len(requests(read_trace(str(record))))
    assert commands.main(["load", str(bundle_dir), "--trace", str(record), "--scenario", "offline"]) == 0
    shown = capsys.readouterr()
    assert "offline scenario" in shown.out
    every = read_trace(str(record))
    wanted = (
        f"{len(every)} arrivals: {len(requests(every))} requests, {len(every) - len(requests(every))} of new events"
    )
    assert wanted in shown.err
    first = ["load", str(bundle_dir), "--trace", str(record), "--deadline-ms", "500", "--seconds"]
    assert commands.main([*first, "0.2"]) == 0
    asked = sum(a.at < 0.2 for a in requests(every))
    shown = capsys.readouterr()
    assert f"server scenario, {asked} requests" in shown.out
    assert "goodput (in 500 ms)" in shown.out
    assert commands.main([*first, "0.000001"]) == 2
    assert "raise --seconds" in capsys.readouterr().err
    assert "same traffic" in told["compared"] or "only" in told["compared"]
    assert commands.main(["load", str(bundle_dir), *options]) == 0
    capsys.readouterr()
    for argv, said in (
        (["http://127.0.0.1:1", "--compare"], "--compare"),
        (["http://127.0.0.1:1", "--threads", "2"], "stca serve"),
        (["localhost:8000"], "write http://localhost:8000"),
        ([str(bundle_dir), "--admin", "http://127.0.0.1:1"], "--admin"),
        ([str(tmp_path / "none")], "no such bundle"),
    ):
        assert commands.main(["load", *argv]) == 2
        assert said in capsys.readouterr().err


def test_the_command_splits_memory(bundle_dir, tmp_path, capsys):
    command = ["load", str(bundle_dir), "--seconds", "0.2", "--rate", "20", "--history", "3,20", "--cache-mib", "1"]
    file = tmp_path / "splits.jsonl"
    file.write_text('{"states": 128}\n')
    for split in ("adaptive", "0.3", str(file)):
        assert commands.main([*command, "--split", split, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["load"]["store"]["memory"] == {"states": 1 << 20}  # this bundle has no tables in files
    for split, said in (("1.5", "from 0 to 1"), ("nan", "from 0 to 1"), ("none.jsonl", "adaptive")):
        assert commands.main([*command, "--split", split]) == 2
        assert said in capsys.readouterr().err
    assert commands.main(["load", "http://127.0.0.1:1", "--split", "0.3"]) == 2
    assert "--split" in capsys.readouterr().err


def test_each_of_two_is_compared_at_a_share_of_its_own_capacity(bundle_dir, monkeypatch, capsys):
    capacities = iter((100.0, 40.0))
    monkeypatch.setattr("stca.load.run.capacity", lambda *_: next(capacities))
    sizes = ["--seconds", "1", "--history", "3,20", "--targets", "1,4", "--users", "5", "--of-capacity", "0.5"]
    assert commands.main(["load", str(bundle_dir), *sizes, "--compare", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["load"]["requests"] > 1.5 * told["without_store"]["requests"]
    assert "times the throughput, each at 0.5 of its capacity" in told["compared"]


def test_a_queue_is_no_saving(bundle_dir):
    inputs, trace = Inputs(Bundle.load(bundle_dir).manifest, 20, 0), [Arrival(0.0, 1, 3, 2, 1)]
    made = run(InProcess(Session.load(bundle_dir)), inputs, trace, connections=1)
    slow = dataclasses.replace(made, offered_per_second=100.0, answered_per_second=20.0)
    assert "not known; without a store only 20.0 of 100.0" in _compared(made, slow, "")
    fast = dataclasses.replace(made, offered_per_second=100.0, answered_per_second=99.0)
    assert "1.00 times shorter, same traffic" in _compared(made, fast, "")


def test_what_a_session_recorded_is_traffic(tmp_path, bundle_dir):
    specs = Bundle.load(bundle_dir).manifest.graphs["request"].inputs
    rng = np.random.default_rng(0)
    with TraceWriter(tmp_path) as writer:
        for at, user, tokens, targets in ((20.5, 900, 7, 3), (10.0, 800, 5, 2), (11.0, 900, 6, 4), (12.0, None, 1, 1)):
            writer.add(Traced(probe.single(specs, tokens, targets, rng), None, user, at))
    found = recorded(Trace(tmp_path), Bundle.load(bundle_dir).manifest)
    assert [(a.at, a.targets, a.tokens) for a in found] == [(0, 2, 5), (1, 4, 6), (2, 1, 1), (10.5, 3, 7)]
    users = [a.user for a in found]
    assert users[1] == users[3]
    assert len({*users}) == 3
    with TraceWriter(tmp_path) as writer:
        writer.add(Traced(probe.single(specs, 1, 1, rng)))
    with pytest.raises(UsageError, match="request 4 has no time"):
        recorded(Trace(tmp_path), Bundle.load(bundle_dir).manifest)
