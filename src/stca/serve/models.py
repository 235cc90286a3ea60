"""The bundles that a server serves, by name and version, and what may be asked of each."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stca.arrays import Array
from stca.errors import RequestError, UsageError
from stca.near import did_you_mean
from stca.runtime import Request, Session
from stca.runtime.client_values import quoted
from stca.serve.errors import NotFoundError, UnavailableError
from stca.serve.inference import (
    AmendParameters,
    AppendParameters,
    ForgetParameters,
    InferRequest,
    InferResponse,
    ResidenceParameters,
    ScoreParameters,
    SwapParameters,
    WarmParameters,
    parameters,
)
from stca.serve.tensors import DATATYPES
from stca.serve.work import Call
from stca.specs import TensorSpec


@dataclass
class Durations:
    """How often something happened, and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.ns += int(seconds * 1e9)


@dataclass
class Statistics:
    """What the protocol's statistics tell of a model; names are the protocol's."""

    success: Durations = field(default_factory=Durations)
    fail: Durations = field(default_factory=Durations)
    queue: Durations = field(default_factory=Durations)
    compute_input: Durations = field(default_factory=Durations)
    compute_infer: Durations = field(default_factory=Durations)
    compute_output: Durations = field(default_factory=Durations)
    cache_hit: Durations = field(default_factory=Durations)
    cache_miss: Durations = field(default_factory=Durations)


class Served:
    """One bundle under a name and a version. Its methods may run on any thread.

    Args:
        name, version: as clients ask for it.
        bundle: its directory.
    """

    def __init__(self, name: str, version: str, bundle: str) -> None:
        self.name, self.version, self.bundle = name, version, bundle
        self.loaded: Session | None = None
        self.inferences = self.last_ms = 0
        self.statistics = Statistics()
        self._running = 0
        self._lock = threading.Lock()

    @property
    def session(self) -> Session:
        """The session that serves it.

        Raises:
            UnavailableError: while it is being loaded.
        """
        if self.loaded is None:
            raise UnavailableError(f"model {quoted(self.name)} is being loaded; try again later")
        return self.loaded

    @contextlib.contextmanager
    def _runs(self) -> Iterator[None]:
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    def close(self) -> None:
        """Close the session, which writes what it keeps, unless something still runs in it: that may hold its locks."""
        with self._lock:
            running = self._running
        if self.loaded is not None and not running:
            self.loaded.close()

    def infer(self, request: InferRequest, call: Call) -> InferResponse:
        """Scores of one request.

        Raises:
            StcaError: as `Session.score`, and when the deadline passed or the client went away.
        """
        with self._runs():
            return self._infer(request, call)

    def _infer(self, request: InferRequest, call: Call) -> InferResponse:
        given = parameters(ScoreParameters, request.parameters)
        call.expire_in(given.seconds)
        session = self.session
        outputs = session.manifest.graphs["request"].outputs
        if unknown := set(request.outputs) - {o.name for o in outputs}:
            raise RequestError(
                f"output {quoted(min(unknown))}: the model gives {', '.join(o.name for o in outputs):.600}"
            )
        decoded = time.monotonic()
        answer = session.answer(Request(request.inputs, given.user, given.version), deadline=call.deadline)
        ended = time.monotonic()
        scores = by_output(answer.scores, outputs)
        wanted = {name: scores[name] for name in request.outputs or scores}
        with self._lock:
            counted = self.statistics
            computed = sum(answer.seconds.values())
            counted.queue.add(call.begun - call.arrived + max(0.0, ended - decoded - computed))
            counted.compute_input.add(decoded - call.begun)
            counted.compute_infer.add(computed)
            counted.compute_output.add(time.monotonic() - ended)
            # How often a state was there; as no response is kept, no time goes into looking for one.
            (counted.cache_hit if answer.hits[0] else counted.cache_miss).add(0.0)
            self.inferences += 1
            self.last_ms = time.time_ns() // 1_000_000
        return InferResponse(self.name, self.version, wanted, answer.hits[0], request.id)

    def count(self, ok: bool, seconds: float) -> None:
        """Count a request that was answered, with scores or with an error."""
        with self._lock:
            (self.statistics.success if ok else self.statistics.fail).add(seconds)

    def change(self, what: str, request: InferRequest, call: Call) -> dict[str, Any]:
        """A change of a user's state or of the bundle, of `CHANGES`, and what came of it."""
        with self._runs():
            return CHANGES[what](self, request, call)

    def metadata(self) -> dict[str, Any]:
        """The model as the protocol describes it; offsets are made by the runtime, so no client sends them."""
        graph = self.session.manifest.graphs["request"]
        padded = [p for p in self.session.manifest.padding or () if p.side is not None]
        events = {e.name: e.axis for p in padded for e in p.inputs}  # of any number: the session pads them
        inputs = [s for s in graph.inputs if not s.is_offsets]
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": "stca",
            "inputs": [_told(s, events.get(s.name)) for s in inputs],
            "outputs": [_told(s) for s in graph.outputs],
        }

    def config(self) -> dict[str, Any]:
        """The model as Triton's `config` describes it; user inputs may be left out on a hit."""
        told = self.metadata()
        scopes = {s.name: s.scope for s in self.session.manifest.graphs["request"].inputs}
        inputs, outputs = (
            [
                {"name": t["name"], "data_type": f"TYPE_{t['datatype']}", "dims": t["shape"]}
                | ({"optional": True} if scopes.get(t["name"]) == "user" else {})
                for t in told[side]
            ]
            for side in ("inputs", "outputs")
        )
        return {
            "name": self.name,
            "platform": "stca",
            "backend": "stca",
            "max_batch_size": 0,
            "input": inputs,
            "output": outputs,
        }

    def told_statistics(self) -> dict[str, Any]:
        """The protocol's statistics, all counts from the start on."""
        runs = {} if self.loaded is None else self.loaded.runs()
        with self._lock:
            return {
                "name": self.name,
                "version": self.version,
                "last_inference": self.last_ms,
                "inference_count": self.inferences,
                "execution_count": sum(of.times for of in runs.values()) or self.inferences,
                "inference_stats": dataclasses.asdict(self.statistics),
                "batch_stats": [
                    {"batch_size": size, "compute_infer": {"count": of.times, "ns": int(of.seconds * 1e9)}}
                    for size, of in runs.items()
                ],
            }


def _told(spec: TensorSpec, events: int | None = None) -> dict[str, Any]:
    shape = [n if isinstance(n, int) and axis != events else -1 for axis, n in enumerate(spec.shape)]
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": shape}


def by_output(scores: Array, outputs: Sequence[TensorSpec]) -> dict[str, Array]:
    """A session's scores `(N_t, tasks)` as the outputs that the model was exported with."""
    made: dict[str, Array] = {}
    begin = 0
    for spec in outputs:
        row = tuple(n for n in spec.shape[1:] if isinstance(n, int))
        fixed = len(row) == len(spec.shape) - 1
        end = begin + math.prod(row) if fixed and len(outputs) > 1 else scores.shape[1]
        part = scores[:, begin:end].astype(spec.dtype, copy=False)
        made[spec.name] = part.reshape(len(scores), *row) if fixed else part
        begin = end
    return made


def _append(served: Served, request: InferRequest, _: Call) -> dict[str, Any]:
    given = parameters(AppendParameters, request.parameters)
    return {"kept": served.session.append(given.user, request.inputs, given.version, after=given.after)}


def _amend(served: Served, request: InferRequest, _: Call) -> dict[str, Any]:
    given = parameters(AmendParameters, request.parameters)
    if given.at is None:
        raise RequestError("parameters: misses 'at', the place of the first amended event; -1 is the newest")
    return {"kept": served.session.amend(given.user, request.inputs, given.version, at=given.at, after=given.after)}


def _forget(served: Served, request: InferRequest, _: Call) -> dict[str, Any]:
    given = parameters(ForgetParameters, request.parameters)
    _check_user(given.user)
    return {"forgotten": served.session.forget(given.user)}


def _residence(served: Served, request: InferRequest, _: Call) -> dict[str, Any]:
    given = parameters(ResidenceParameters, request.parameters)
    _check_user(given.user)
    found = served.session.residence(given.user, given.version)
    return {"tier": None, "bytes": 0, "version": None} if found is None else dataclasses.asdict(found)


def _check_user(user: Hashable) -> None:
    if user is None:
        raise RequestError("parameters: misses 'user', whose state is meant")


def _warm(served: Served, request: InferRequest, call: Call) -> dict[str, Any]:
    given = parameters(WarmParameters, request.parameters)
    call.expire_in(None if given.deadline_ms is None else given.deadline_ms / 1e3)
    return {"kept": served.session.warm(given.user, request.inputs, given.version, deadline=call.deadline)}


def _swap(served: Served, request: InferRequest, _: Call) -> dict[str, Any]:
    given = parameters(SwapParameters, request.parameters)
    if given.bundle is None:
        raise RequestError("parameters: misses 'bundle', the directory of the bundle to serve from now on")
    served.session.swap(given.bundle)
    served.bundle = given.bundle
    return {"weights": served.session.manifest.weights}


# What the admin port changes, or tells of one user, by the last part of the path.
CHANGES: Mapping[str, Callable[[Served, InferRequest, Call], dict[str, Any]]] = {
    "append": _append,
    "amend": _amend,
    "forget": _forget,
    "residence": _residence,
    "warm": _warm,
    "swap": _swap,
}


class Models:
    """All bundles of a server.

    Args:
        bundles: directories by name; a name may go on with `/VERSION`.

    Raises:
        UsageError: when there is none.
    """

    def __init__(self, bundles: Mapping[str, str]) -> None:
        if not bundles:
            raise UsageError("no bundle is given; name at least one")
        self._served: dict[str, dict[str, Served]] = {}
        for label, bundle in bundles.items():
            name, _, version = label.partition("/")
            self._served.setdefault(name, {})[version or "1"] = Served(name, version or "1", bundle)

    def __iter__(self) -> Iterator[Served]:
        return iter([served for versions in self._served.values() for served in versions.values()])

    @property
    def loaded(self) -> bool:
        """Whether all can be asked."""
        return all(served.loaded is not None for served in self)

    def find(self, name: str, version: str = "") -> Served:
        """A model by its name, of the version asked for or of the last one.

        Raises:
            NotFoundError: naming those there are.
        """
        versions = self._served.get(name)
        if versions is None:
            served = f"served are {', '.join(self._served):.600}{did_you_mean(name, self._served)}"
            raise NotFoundError(f"model {quoted(name)} is not served; {served}")
        if version and version not in versions:
            raise NotFoundError(f"model {name} has no version {quoted(version)}; it has {', '.join(versions):.600}")
        return versions[version or max(versions, key=lambda v: (len(v), v))]

    def some(self, name: str = "", version: str = "") -> list[Served]:
        """One by its name; all where no name is given."""
        return [self.find(name, version)] if name else list(self)

    def index(self) -> list[dict[str, str]]:
        """Each model's name, version and state."""
        states = {True: "READY", False: "LOADING"}
        return [{"name": s.name, "version": s.version, "state": states[s.loaded is not None]} for s in self]
