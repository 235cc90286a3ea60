"""`python tests/fuzz/replay.py`: random calls of the Python session, recorded with their results and made in C++.

The calls are those of `tests/fuzz/calls.py`, of several bundles and settings of a session, each as far as a C++ program
could make it. Scores, errors with their text, and statistics must be the same. `--out` keeps the calls as one file,
which `stca_golden FOLDER FILE --engine onnxruntime` replays. Exit codes: 0 all the same, 1 something was not.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from calls import DTYPES, Fuzzer, hostile
from cpp import fuzz

from stca import probe
from stca.arrays import Array
from stca.errors import HistoryNeededError, RequestError, StcaError
from stca.runtime import Deadline, Request, RequestBatch, Session
from stca.runtime.cache import REASONS
from stca.runtime.client_values import MOST_VALUES
from stca.runtime.store import DAMAGED, FILE, JOINED, MEMORY

OTHERS = ("log_other_weights", "log_other_limits", "log_other_dtype", "log_other_scores")
MOST_AXES = 8  # of a tensor in C++
HITS = (MEMORY, JOINED, FILE)
MISSES = (*REASONS, DAMAGED)


class NotInCpp(Exception):
    """A call that no C++ program could make: a value without a dtype, say, or a user that is no text."""


@dataclass(frozen=True)
class Setting:
    """A bundle of the golden ones, and how a session of it is loaded.

    Attributes:
        bundle: its name.
        others: bundles that the session is swapped to, or that it must refuse.
        states: a budget of so many states in place of `cache_bytes`: the languages' states differ in size.
        keep: requests that can be kept, and little else; each user's state has the same size.
        files: states lie in files, too, some of which are damaged, and the session is loaded again now and then.
            Memory has room for all users of a batch: who leaves it is in a file by then.
    """

    bundle: str
    others: Sequence[str] = ()
    cache_bytes: int = 1 << 30
    states: int | None = None
    max_users: int | None = None
    ttl_seconds: float | None = None
    max_targets: int | None = None
    check_versions: bool = False
    truncate: bool = False
    keep: bool = False
    files: bool = False


SETTINGS = (
    Setting("log"),
    Setting("log", OTHERS),
    Setting("log", max_users=2, truncate=True),
    Setting("log", cache_bytes=0),
    Setting("log", ttl_seconds=1e-9),
    Setting("log", ttl_seconds=1e9, max_users=1),
    Setting("log", max_targets=3, check_versions=True),
    Setting("plain"),
    Setting("plain", max_targets=2),
    Setting("rows", truncate=True),
    Setting("rows", max_users=3),
    Setting("padded_left"),
    Setting("padded_right", truncate=True),
    Setting("exact"),
    Setting("padded_left", states=3, keep=True),
    Setting("padded_right", states=1, keep=True),
    Setting("log", OTHERS, max_users=4, files=True),
    Setting("log", max_users=5, truncate=True, files=True),
    Setting("padded_left", max_users=4, files=True),
)


class Recorder:
    """A session that notes each call and how it ended, for C++ to do the same.

    Args:
        load: the session, and the next one on the same folder of states.
        folder: of its states, where there is one.
    """

    def __init__(self, load: Callable[[], Session], folder: Path | None) -> None:
        self._load, self._folder, self._session = load, folder, load()
        session = self._session
        self.steps: list[dict[str, Any]] = []
        self.manifest = session.manifest

    def score(self, request: Request | RequestBatch, *, deadline: Deadline | None = None) -> Array:
        if isinstance(request, RequestBatch):
            call = "score_batch"
            labels: Any = {n: [_text(x) for x in _list(getattr(request, n))] for n in ("users", "versions")}
        elif isinstance(request, Request):
            call = "score"
            labels = {n: _text(getattr(request, n)) for n in ("user", "version")}
        else:
            raise NotInCpp
        step = {"call": call, "request": {"inputs": _tensors(request.inputs), **labels}, **_deadline(deadline)}
        scores: Array = self._noted(step, "scores", lambda: self._session.score(request, deadline=deadline))
        return scores

    def append(self, user: Any, events: Any, version: Any, *, after: Any = None) -> bool:
        step = {"call": "append", "user": _name(user), "events": _tensors(events), "version": _name(version)}
        step["after"] = _text(after)
        return bool(self._noted(step, "kept", lambda: self._session.append(user, events, version, after=after)))

    def amend(self, user: Any, events: Any, version: Any, *, at: Any, after: Any = None) -> bool:
        if type(at) is not int:
            raise NotInCpp
        step = {"call": "amend", "user": _name(user), "events": _tensors(events), "version": _name(version), "at": at}
        step["after"] = _text(after)
        return bool(self._noted(step, "kept", lambda: self._session.amend(user, events, version, at=at, after=after)))

    def warm(self, user: Any, history: Any, version: Any, *, deadline: Deadline | None = None) -> bool:
        step = {"call": "warm", "user": _name(user), "history": _tensors(history), "version": _text(version)}
        step |= _deadline(deadline)
        return bool(self._noted(step, "kept", lambda: self._session.warm(user, history, version, deadline=deadline)))

    def forget(self, user: Any) -> bool:
        return bool(self._noted({"call": "forget", "user": _name(user)}, "kept", lambda: self._session.forget(user)))

    def swap(self, bundle: Path) -> None:
        self._noted({"call": "swap", "bundle": bundle.name}, None, lambda: self._session.swap(bundle))

    def restart(self) -> None:
        self._session.close()
        self._session = self._load()
        self.steps.append({"call": "restart"})

    def damage(self) -> None:
        """Change the last byte of each state in a file."""
        assert self._folder is not None
        for path in self._folder.glob("*.state"):
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        self.steps.append({"call": "damage"})

    def stats(self) -> None:
        """Note what is kept and was done, without the bytes that each language's objects take."""
        kept = dataclasses.asdict(self._session.stats())
        names = (
            "hits",
            "misses",
            "evictions",
            "refused",
            "expired",
            "users",
            "state_bytes",
            "warmed",
            "appends",
            "appended_bytes",
        )
        noted = {n: kept[n] for n in names}
        for kinds, known in (("hits_from", HITS), ("misses_for", MISSES)):
            noted |= {f"{kinds[: kinds.index('_')]}_{kind}": kept[kinds].get(kind, 0) for kind in known}
        if kept["file"] is not None:
            noted |= {f"file_{n}": kept["file"][n] for n in ("users", "discarded")}
        self.steps.append({"call": "stats", "stats": noted})

    def _settled(self, call: Callable[[], Any]) -> Any:
        """What the call gives, once all states that it made are in files: what comes next finds them there."""
        try:
            return call()
        finally:
            if (file := self._session._store.file) is not None:
                assert file.wait(60)

    def _noted(self, step: dict[str, Any], result: str | None, call: Callable[[], Any]) -> Any:
        try:
            made = self._settled(call)
        except StcaError as e:
            self.steps.append(step | {"error": {"class": type(e).__name__, "kind": e.code, "text": str(e)}})
            raise
        value = made.tolist() if isinstance(made, np.ndarray) else made
        self.steps.append(step | ({} if result is None else {result: value}))
        return made


def _deadline(deadline: Deadline | None) -> dict[str, Any]:
    """A deadline as it is when the call begins: over, or so far away that it does not matter."""
    if deadline is None:
        return {}
    left = deadline.remaining()
    return {"deadline": {"seconds": 1e9 if left is None else left, "cancelled": deadline._cancelled.is_set()}}


def _list(labels: Any) -> Sequence[Any]:
    if not isinstance(labels, list | tuple):
        raise NotInCpp
    return labels


def _text(value: Any) -> str | None:
    return None if value is None else _name(value)


def _name(value: Any) -> str:
    if type(value) is not str or "\0" in value:
        raise NotInCpp
    return value


def _tensors(inputs: Any) -> dict[str, Any]:
    if not isinstance(inputs, Mapping):
        raise NotInCpp
    return {_name(name): _tensor(value) for name, value in inputs.items()}


def _tensor(value: Any) -> dict[str, Any]:
    if isinstance(value, np.ma.MaskedArray):
        raise NotInCpp
    try:
        x = np.asarray(value)
    except Exception:
        raise NotInCpp from None
    if x.dtype not in DTYPES or not x.dtype.isnative or x.ndim > MOST_AXES:
        raise NotInCpp
    if x.size > MOST_VALUES:  # refused before it is looked at
        return {"dtype": str(x.dtype), "shape": list(x.shape), "data": []}
    data = [v if abs(v) < 1 << 63 else str(v) for v in x.ravel().tolist()]  # JSON has no NaN, and C++ no longer numbers
    return {"dtype": str(x.dtype), "shape": list(x.shape), "data": data}


class Caller(Fuzzer):
    """The fuzzer's calls that C++ can make, of users whose names are text."""

    def __init__(self, seed: int, setting: Setting, session: Session, alone: Mapping[Path, Session | None]) -> None:
        users = ("ann", "bob", "cat", "dan")
        if not setting.keep:
            users += ("", "é\n", "it's", "x" * 80, "a\"'")
        bad = [*(x for x in hostile() if _is_made(x)), "\u202e", "é\x85", "ü" * 65, "\\'", 1e38, -70000.5, 1e16]
        super().__init__(seed, session, alone, users, bad)
        self._keep, self._files = setting.keep, setting.files
        self._known: list[tuple[dict[str, Any], str, str]] = []  # inputs, user and version of some that were kept

    def _restart(self, rng: random.Random) -> str:
        self.session.restart()
        self._serve(next(iter(self._bundles)))
        return "restarts"

    def _damage(self, rng: random.Random) -> str:
        self.session.damage()
        return "damages"

    def _again(self, rng: random.Random) -> str:
        """Mostly a history by its version alone, of one of the users who were here before."""
        if not self._known or rng.random() < 0.3:
            inputs, user, version = self._inputs(rng), self._user(rng), f"w{rng.randrange(10**9)}"
            self._known.append((inputs, user, version))
        else:
            inputs, user, version = rng.choice(self._known[-8:])
            if rng.random() < 0.7:
                inputs = {n: x for n, x in inputs.items() if self._of[n] != "user"}
        try:
            self.session.score(Request(inputs, user, version))
        except RequestError as e:  # another bundle may have come meanwhile, which has fewer items
            return "states that were not kept" if isinstance(e, HistoryNeededError) else "requests for another bundle"
        return "users who come again"

    def _kinds(self, rng: random.Random) -> Callable[[random.Random], str]:
        if self._files and rng.random() < 0.5:
            return rng.choice((*(self._again,) * 8, self._restart, self._damage))
        return rng.choice((self._right, self._right, self._batch, self._forget)) if self._keep else super()._kinds(rng)


def _is_made(value: Any) -> bool:
    try:
        _tensor(value) if type(value) is not str else _name(value)
    except NotInCpp:
        return False
    return True


def record(seed: int, rounds: int, folder: Path = fuzz.GOLDEN) -> dict[str, Any]:
    """`rounds` random calls, parted among all settings, as cases of the golden file's form."""
    each = -(-rounds // len(SETTINGS))
    return {"cases": [_case(seed, s, range(i * each, (i + 1) * each), folder) for i, s in enumerate(SETTINGS)]}


def _case(seed: int, setting: Setting, numbers: range, folder: Path) -> dict[str, Any]:
    load = {"truncate": setting.truncate, "threads": 1}
    alone: dict[Path, Session | None] = {}
    for name in (setting.bundle, *setting.others):
        served = name in (setting.bundle, *OTHERS[:2])
        alone[folder / name] = Session.load(folder / name, cache_bytes=0, **load) if served else None
    kept = {"max_users": setting.max_users, "ttl_seconds": setting.ttl_seconds, "max_targets": setting.max_targets}
    kept = {n: x for n, x in kept.items() if x is not None} | {"check_versions": setting.check_versions}
    case = {"name": f"recorded {numbers.start}", "bundle": setting.bundle, "truncate": setting.truncate}
    case |= kept
    case |= {"cache_bytes": setting.cache_bytes} if setting.states is None else {"cache_states": setting.states}
    budget = setting.cache_bytes
    if setting.states is not None:
        case["measured"], budget = _measured(folder / setting.bundle, setting.states)
    with tempfile.TemporaryDirectory() as states:
        if setting.files:
            case["files"], kept["state_folder"] = True, states
        again = functools.partial(Session.load, folder / setting.bundle, cache_bytes=budget, **kept, **load)
        recorder = Recorder(again, Path(states) if setting.files else None)
        _call(Caller(seed, setting, recorder, alone), recorder, numbers, setting)
        return {**case, "steps": recorder.steps}


def _call(caller: Caller, recorder: Recorder, numbers: Iterable[int], setting: Setting) -> None:
    refused = RequestError if setting.max_targets else NotInCpp  # what is right otherwise has too many targets
    for number in numbers:
        try:
            caller.round(number)
        except (NotInCpp, refused):
            continue
        if number % 8 == 0:
            recorder.stats()
    recorder.stats()


def _measured(path: Path, states: int) -> tuple[dict[str, Any], int]:
    """A request whose kept state is as large as any other, and the budget of so many states in Python."""
    session = Session.load(path, threads=1)
    specs = session.manifest.graphs["request"].inputs
    inputs = probe.single(specs, 1, 1, np.random.default_rng(0))
    session.score(Request(inputs, "ann"))
    return {"inputs": _tensors(inputs), "user": "ann", "version": None}, session.stats().bytes * states


def main(argv: Sequence[str] | None = None) -> int:
    """Record, build and replay; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=20_000, help="calls, some of several in a row (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("calls.json"), help="the recorded calls (%(default)s)")
    parser.add_argument("--build", type=Path, default=Path("build/fuzz-cpp"), help="where to build (%(default)s)")
    args = parser.parse_args(argv)
    lines = ",\n".join(map(json.dumps, record(args.seed, args.rounds)["cases"]))
    args.out.write_text(f'{{"cases": [\n{lines}\n]}}\n', encoding="utf-8")
    program = fuzz.build(args.build, "stca_golden")
    command = [str(program), str(fuzz.GOLDEN), str(args.out), "--engine", "onnxruntime"]
    return subprocess.run(command, env=fuzz.environment(), check=False).returncode


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # why a state went is remembered in places that follow from hashes
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})
    sys.exit(main())
