"""A trace run against whoever answers: each request at its time, whatever became of those before it."""

from __future__ import annotations

import dataclasses
import functools
import math
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np

from stca.arrays import Array
from stca.errors import UsageError
from stca.load.clients import Answered, Client
from stca.load.inputs import Inputs
from stca.load.traffic import Arrival

# A run's timeline has so many equal parts.
_PARTS: Final = 30
_WITH_REQUEST: Final = "with_request"
# Of targets that are drawn before a run begins.
_BYTES_AHEAD: Final = 1 << 28
_PERCENTILES: Final = (50, 75, 90, 95, 99, 99.9)


@dataclass(frozen=True)
class Part:
    """What became of the requests that were due in a part of the run.

    Attributes:
        at: seconds from the run's beginning to the middle of the part.
        offered_per_second: those that were due. answered_per_second: those of them with scores, whenever they came.
        p50_ms, p95_ms: their latencies; None where there is none.
    """

    at: float
    offered_per_second: float
    answered_per_second: float
    p50_ms: float | None
    p95_ms: float | None


@dataclass(frozen=True)
class LoadReport:
    """What came of a trace.

    Attributes:
        scenario: `server`, requests at their times; or `offline`, all at once, as fast as they are answered.
        seconds: from the first arrival to the last answer.
        requests, offered_per_second: as the trace has them.
        answered_per_second: those with scores. goodput_per_second: those of them within the deadline.
        latency_ms: of those with scores, from the moment they were to be sent: p50, p95, p99, mean, max.
        codes: how often each code came; `ok` are scores.
        hits, misses: of those with scores. resent: requests sent again with their history.
        events: how often new events came, by what became of them: `appended`; `no_state` to append them to;
            `with_request`, as model or server take none by themselves, so that the next request brings them; or an
            error's code.
        appended, not_appended: the first of these, and the others that were sent.
        late_ms: how much later than at their time requests were sent, p99, as all connections were busy; part of the
            latency.
        left: arrivals left out for want of time.
        percentiles_ms: latencies of `all`, `hits` and `misses`, by percentile, as far as there are requests beyond it.
        timeline: the run in equal parts.
        store: what the state store counted, where it is in this process.
    """

    scenario: str
    seconds: float
    requests: int
    offered_per_second: float
    answered_per_second: float
    goodput_per_second: float
    deadline_ms: float | None
    latency_ms: dict[str, float]
    codes: dict[str, int]
    hits: int
    misses: int
    resent: int
    events: dict[str, int]
    appended: int
    not_appended: int
    late_ms: float
    percentiles_ms: dict[str, dict[str, float]]
    timeline: list[Part]
    left: int = 0
    store: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Tally:
    """What threads found out; each appends, which needs no lock.

    Attributes:
        began: when the run did.
        latencies: of each request, when it was due in the run, how long it took from then, and what came of it.
    """

    latencies: list[tuple[float, float, Answered]] = field(default_factory=list)
    began: float = 0.0
    late: list[float] = field(default_factory=list)
    resent: list[int] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)


# Sends what may be sent, since the time given, and returns what may be sent after it.
_Turn: TypeAlias = Callable[[float], "list[_Turn]"]


@dataclass
class _User:
    """What a client knows of a user, and what of theirs is under way or waits for its turn.

    Attributes:
        newest: version with all events that came. kept: the one that the server has; 0 for none.
        events: how many arrivals of events wait. requests: turns that wait.
        asked: requests under way. changes: whether events are.
    """

    newest: int = 0
    kept: int = 0
    events: int = 0
    requests: list[_Turn] = field(default_factory=list)
    asked: int = 0
    changes: bool = False


class _Users:
    """Asks as a client does that keeps histories itself: without them, as long as the server has the state.

    A user's events are sent once their requests under way are answered, all that came by then together; and requests
    once the events before them are appended: so nobody asks for what is not there yet, or no more. What waits for its
    turn keeps no connection from other users. Nothing that was refused is sent again: events that were go with the
    user's next ones, and requests until then ask for the version that the server has.
    """

    def __init__(
        self,
        client: Client,
        inputs: Inputs,
        deadline_ms: float | None,
        tally: _Tally,
        targets: dict[int, dict[str, Array]],
    ) -> None:
        self._client, self._inputs, self._deadline_ms, self._tally = client, inputs, deadline_ms, tally
        self._targets = targets  # that were drawn ahead, by the arrival's number
        self._appends = inputs.appendable and client.appends
        self._users: defaultdict[int, _User] = defaultdict(_User)
        self._open = 0  # arrivals that nothing came of yet
        self._changed = threading.Condition()

    def come(self, number: int, arrival: Arrival, due: float) -> list[_Turn]:
        """What may be sent now that this has come."""
        with self._changed:
            user = self._users[arrival.user]
            user.newest = max(user.newest, arrival.tokens)
            if not arrival.targets and not self._appends:
                self._tally.events += [_WITH_REQUEST] * self._inputs.has_history
                return []
            self._open += 1
            if arrival.targets:
                user.requests.append(functools.partial(self._request, user, number, arrival, due))
            else:
                user.events += 1
            return self._ready(arrival.user, user)

    def wait(self, most: int) -> None:
        """Wait until nothing came yet of so many arrivals at most, or something failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._open <= most or self._tally.errors)

    def failed(self, error: BaseException) -> None:
        """Nothing more will come of some arrival."""
        with self._changed:
            self._tally.errors.append(error)
            self._changed.notify_all()

    def _ready(self, name: int, user: _User) -> list[_Turn]:
        if user.changes or (user.events and user.asked):
            return []
        if user.events:
            user.changes = True
            return [functools.partial(self._event, name, user)]
        made, user.requests = user.requests, []
        user.asked += len(made)
        return made

    def _ended(self, name: int, user: _User, arrivals: int) -> list[_Turn]:
        self._open -= arrivals
        self._changed.notify_all()
        return self._ready(name, user)

    def _event(self, name: int, user: _User, _: float) -> list[_Turn]:
        with self._changed:
            came, user.events, newest, kept = user.events, 0, user.newest, user.kept
        code = _WITH_REQUEST
        if 0 < kept < newest:
            code = self._client.append(str(name), newest, kept, self._inputs.events(name, newest, newest - kept))
        self._tally.events += [code] * came
        with self._changed:
            user.kept = {"appended": newest, "no_state": 0}.get(code, kept)
            user.changes = False
            return self._ended(name, user, came)

    def _request(self, user: _User, number: int, arrival: Arrival, due: float, since: float) -> list[_Turn]:
        self._tally.late.append(time.monotonic() - since)
        rest = self._targets.pop(number, None)
        if rest is None:
            rest = self._inputs.targets(arrival.targets, number, arrival.items, arrival.items_zipf)
        with self._changed:
            kept = user.kept
            version = kept if kept and self._appends else user.newest
        found = Answered("history_needed")
        if version == kept:
            found = self._score(arrival, version, rest, due)
            if found.code == "history_needed":
                self._tally.resent.append(1)
        if found.code == "history_needed":
            found = self._score(arrival, version, {**self._inputs.user(arrival.user, version), **rest}, due)
        self._tally.latencies.append((due - self._tally.began, time.monotonic() - due, found))
        with self._changed:
            user.kept = version if found.code == "ok" else user.kept
            user.asked -= 1
            return self._ended(arrival.user, user, 1)

    def _score(self, arrival: Arrival, version: int, inputs: dict[str, Array], due: float) -> Answered:
        left = None if self._deadline_ms is None else max(0.0, self._deadline_ms - 1e3 * (time.monotonic() - due))
        return self._client.score(str(arrival.user), version, inputs, left)


def run(
    client: Client,
    inputs: Inputs,
    trace: Sequence[Arrival],
    *,
    connections: int,
    deadline_ms: float | None = None,
    offline: bool = False,
    seconds: float | None = None,
) -> LoadReport:
    """Send a trace's requests.

    Args:
        client: who answers.
        inputs: where values come from.
        trace: in the order of its times.
        connections: requests and appends under way at a time, at most; each waits in its thread.
        deadline_ms: from when a request is due; what is left of it is sent along, and goodput counts by it.
        offline: send each as soon as a connection is free, and do not wait for its time.
        seconds: leave out what is not begun by then; None for nothing.
    """
    tally = _Tally()
    users = _Users(client, inputs, deadline_ms, tally, {} if offline else _drawn_ahead(inputs, trace))
    tally.began = began = time.monotonic()
    end = math.inf if seconds is None else began + seconds
    left = _send(users, trace, tally, connections, offline, end)
    if tally.errors:
        raise tally.errors[0]
    took, scenario = time.monotonic() - began, "offline" if offline else "server"
    return dataclasses.replace(_report(tally, trace, took, deadline_ms, scenario), left=left, store=client.store())


def _drawn_ahead(inputs: Inputs, trace: Sequence[Arrival]) -> dict[int, dict[str, Array]]:
    """The targets of the first requests, by their numbers: drawing them takes as long as sending them, and would take
    the processors of whoever is measured.
    """
    made: dict[int, dict[str, Array]] = {}
    left = _BYTES_AHEAD
    for i, arrival in enumerate(trace):
        if arrival.targets and left > 0:
            made[i] = inputs.targets(arrival.targets, i, arrival.items, arrival.items_zipf)
            left -= sum(x.nbytes for x in made[i].values())
    return made


def _send(users: _Users, trace: Sequence[Arrival], tally: _Tally, connections: int, offline: bool, end: float) -> int:
    """Let each arrival come at its time, or offline as soon as a connection is free; how many are left at the end."""
    sent: queue.SimpleQueue[tuple[float, _Turn] | None] = queue.SimpleQueue()

    def take() -> None:
        while (item := sent.get()) is not None and not tally.errors:
            since, turn = item
            try:
                for after in turn(since):
                    sent.put((time.monotonic(), after))
            except BaseException as e:
                users.failed(e)

    threads = [threading.Thread(target=take, daemon=True) for _ in range(connections)]
    for thread in threads:
        thread.start()
    came = 0
    for number, arrival in enumerate(trace):
        if offline:
            users.wait(connections - 1)
        due = time.monotonic() if offline else tally.began + arrival.at
        time.sleep(max(0.0, due - time.monotonic()))
        if tally.errors or time.monotonic() >= end:
            break
        for turn in users.come(number, arrival, due):
            sent.put((due, turn))
        came += 1
    users.wait(0)
    for _ in threads:
        sent.put(None)
    for thread in threads:
        thread.join()
    return len(trace) - came


def _report(
    tally: _Tally, trace: Sequence[Arrival], seconds: float, deadline_ms: float | None, scenario: str
) -> LoadReport:
    scored = [(due, 1e3 * took, answered.hit) for due, took, answered in tally.latencies if answered.code == "ok"]
    ok = np.array([took for _, took, _ in scored])
    hits = sum(hit for *_, hit in scored)
    in_time = len(ok) if deadline_ms is None else int((ok <= deadline_ms).sum())
    told = {f"p{p}": float(np.percentile(ok, p)) for p in (50, 95, 99)} if ok.size else {}
    told |= {"mean": float(ok.mean()), "max": float(ok.max())} if ok.size else {}
    span = max((a.at for a in trace), default=0.0) or seconds
    asked = len(tally.latencies)
    return LoadReport(
        scenario=scenario,
        seconds=round(seconds, 3),
        requests=asked,
        offered_per_second=round(asked / (seconds if scenario == "offline" else span), 2),
        answered_per_second=round(len(ok) / seconds, 2),
        goodput_per_second=round(in_time / seconds, 2),
        deadline_ms=deadline_ms,
        latency_ms={n: round(x, 3) for n, x in told.items()},
        codes=dict(Counter(answered.code for *_, answered in tally.latencies)),
        hits=hits,
        misses=len(ok) - hits,
        resent=len(tally.resent),
        events=dict(Counter(tally.events)),
        appended=tally.events.count("appended"),
        not_appended=sum(of not in ("appended", _WITH_REQUEST) for of in tally.events),
        late_ms=round(float(np.percentile(tally.late, 99)) * 1e3, 3) if tally.late else 0.0,
        percentiles_ms={
            "all": _percentiles(ok),
            "hits": _percentiles(np.array([took for _, took, hit in scored if hit])),
            "misses": _percentiles(np.array([took for _, took, hit in scored if not hit])),
        },
        timeline=_timeline([due for due, *_ in tally.latencies], scored),
    )


def _percentiles(ms: Array) -> dict[str, float]:
    """Those with a request beyond them: of ten requests none is the slowest of a hundred."""
    told = [p for p in _PERCENTILES if len(ms) * (100 - p) >= 100]
    return {f"{p:g}": round(float(np.percentile(ms, p)), 3) for p in told}


def _timeline(due: Sequence[float], scored: Sequence[tuple[float, float, bool]]) -> list[Part]:
    """All requests by when they were due, and those with scores."""
    long = max(due, default=0.0) / _PARTS
    if not long:
        return []
    made = []
    for i in range(_PARTS):
        begin, end = i * long, math.inf if i == _PARTS - 1 else (i + 1) * long
        offered = sum(begin <= at < end for at in due)
        ms = [took for at, took, _ in scored if begin <= at < end]
        p50, p95 = (round(float(np.percentile(ms, p)), 3) if ms else None for p in (50, 95))
        made.append(Part(round(begin + long / 2, 3), round(offered / long, 2), round(len(ms) / long, 2), p50, p95))
    return made


def capacity(client: Client, inputs: Inputs, trace: Sequence[Arrival], connections: int, seconds: float) -> float:
    """Requests a second that are answered when as many are sent as are, by the time the first users have come back.

    Args:
        client, inputs, trace: as of `run`; a long trace, which is begun twice, the second time where the first ended.
        connections: requests under way at a time.
        seconds: how long is measured, after as long again that is not.

    Raises:
        UsageError: when none was answered.
    """
    first = run(client, inputs, trace, connections=connections, offline=True, seconds=seconds)
    rest = trace[len(trace) - first.left :]
    found = run(client, inputs, rest or trace, connections=connections, offline=True, seconds=seconds)
    if not found.answered_per_second:
        codes = ", ".join(found.codes) or "none"
        raise UsageError(f"no request was answered within {seconds:g} s (codes: {codes}); ask for less, or longer")
    return found.answered_per_second
