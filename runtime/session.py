"""The production front: five calls, with the user side computed once and reused."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from stca.bundle import HALVES, TARGETS, TOKENS, USERS, Bundle, Manifest, StateSpec
from stca.errors import BuildError, RequestError
from stca.runtime.engine import Engine, scores_of
from stca.runtime.engine_choice import Choice, best_engine, open_engines, own_graphs
from stca.runtime.request import Door, Request, RequestBatch, check_swap
from stca.runtime.state import CacheStats, StateArray, StateCache, StateKey, UserState, join
from stca.tensorrt_flavours import largest_sizes
from stca.types import Array

# Most history tokens of several users encoded in one run. A run has a price of its own, and so have the copies that
# part users encoded together: on a CPU they break even at a few hundred tokens. `benchmarks/misses.py` measures it.
_TOKENS_TOGETHER: Final = 256


@dataclass(frozen=True)
class _Options:
    """How bundles are loaded, the first one and those swapped in."""

    threads: int | None
    truncate: bool
    engine: str | None
    precision: str | None


@dataclass(frozen=True)
class _Model:
    """One loaded bundle; immutable, so that a swap is one assignment and running requests finish on what they began.

    `window` is the longest history that the bundle and its engines serve.
    """

    manifest: Manifest
    door: Door
    encoder: Engine
    scorer: Engine
    format: str
    choice: Choice
    window: int | None

    @classmethod
    def load(cls, bundle: Bundle, options: _Options) -> _Model:
        manifest = bundle.manifest
        if options.engine == "graphs":
            choice = own_graphs()
        else:
            choice = best_engine(manifest, only=options.engine, precision=options.precision)
        engines = open_engines(bundle, choice, threads=options.threads)
        layout = ";".join(f"{s.name}:{s.dtype}:{','.join(map(str, s.shape))}" for s in manifest.state)
        # Equal weights do not make equal states: what the encoder computes, for which window, and in what, counts too.
        encoder = manifest.files[manifest.graphs["user_encoder"].file]["sha256"]
        limits = [_limits(choice, half)[TOKENS] for half in HALVES]
        limits += [] if manifest.max_history is None else [manifest.max_history]
        window = None if min(limits) == sys.maxsize else min(limits)
        layout += f";{encoder};window:{window};{choice.flavour} {choice.precision}"
        door = Door(dataclasses.replace(manifest, max_history=window), truncate=options.truncate)
        return cls(manifest, door, engines["user_encoder"], engines["target_scorer"], layout, choice, window)

    def key(self, user: Hashable, version: Hashable) -> StateKey:
        return StateKey(user, version, self.manifest.weights, self.format)

    def encode(self, users: Sequence[Mapping[str, Array]]) -> list[UserState]:
        """Run the user encoder on users' admitted inputs, on those with short histories together."""
        if not users:
            return []
        per_token = [n for n in self.door.names("user") if self.door.inputs[n].shape[:1] == (TOKENS,)]
        tokens = [len(arrays[per_token[0]]) if per_token else 0 for arrays in users]
        limits = _limits(self.choice, "user_encoder")
        limits[TOKENS] = min(limits[TOKENS], _TOKENS_TOGETHER)
        if not all(self._is_offsets(s) or s.shape[:1] in ((TOKENS,), (USERS,)) for s in self.manifest.state):
            limits[USERS] = 1  # what is neither per token nor per user cannot be parted
        states: list[UserState] = []
        for run in _runs([{USERS: 1, TOKENS: n} for n in tokens], limits):
            states += self._encode(users[run], tokens[run])
        return states

    def _encode(self, users: Sequence[Mapping[str, Array]], tokens: Sequence[int]) -> list[UserState]:
        feeds = self._pack(users)
        out = self.encoder.run({s.name: feeds[s.name] for s in self.manifest.graphs["user_encoder"].inputs})
        if len(users) == 1:
            return [UserState(out, tokens[0])]
        ends = np.cumsum(tokens)
        return [
            UserState({s.name: self._part(s, out[s.name], i, end - n, end) for s in self.manifest.state}, n)
            for i, (n, end) in enumerate(zip(tokens, ends.tolist(), strict=True))
        ]

    def _part(self, spec: StateSpec, rows: StateArray, user: int, begin: int, end: int) -> StateArray:
        """One user's rows of a state tensor of several, copied: a view would keep all of them alive, uncounted."""
        if self._is_offsets(spec):
            return np.array([0, end - begin], spec.dtype)
        return rows[begin:end].copy() if spec.shape[:1] == (TOKENS,) else rows[user : user + 1].copy()

    def score(self, states: Sequence[UserState], rows: Sequence[Mapping[str, Array]]) -> list[Array]:
        """Run the target scorer for several users, all at once where it can; `rows` are their request and target
        inputs.
        """
        if len(states) == 1:
            return self._score(states, rows)
        targets = next((n for n, s in self.door.offsets.items() if s.scope == "target"), None)
        sizes = [
            {USERS: 1, TOKENS: s.tokens, TARGETS: int(r[targets][-1]) if targets else 0}
            for s, r in zip(states, rows, strict=True)
        ]
        scores: list[Array] = []
        for run in _runs(sizes, _limits(self.choice, "target_scorer")):
            scores += self._score(states[run], rows[run])
        return scores

    def _score(self, states: Sequence[UserState], rows: Sequence[Mapping[str, Array]]) -> list[Array]:
        feeds: dict[str, StateArray] = {**self._pack(rows)}
        if len(states) == 1:
            feeds |= states[0].tensors
        else:
            tokens = np.cumsum([0, *(s.tokens for s in states)])
            for spec in self.manifest.state:
                parts = [s.tensors[spec.name] for s in states]
                feeds[spec.name] = tokens.astype(spec.dtype) if self._is_offsets(spec) else join(parts)
        outputs = self.scorer.run({s.name: feeds[s.name] for s in self.manifest.graphs["target_scorer"].inputs})
        scores = scores_of([outputs[s.name] for s in self.manifest.graphs["target_scorer"].outputs])
        if len(states) == 1:
            return [scores]
        targets = next(n for n, s in self.door.offsets.items() if s.scope == "target")
        return np.split(scores, np.cumsum([r[targets][-1] for r in rows])[:-1])

    def _pack(self, rows: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        """Admitted inputs of several requests as one ragged batch."""
        if len(rows) == 1:
            return dict(rows[0])
        return {
            name: np.cumsum([0, *(r[name][-1] for r in rows)]).astype(first.dtype)
            if name in self.door.offsets
            else np.concatenate([r[name] for r in rows])
            for name, first in rows[0].items()
        }

    def _is_offsets(self, spec: StateSpec) -> bool:
        """Whether a state tensor says where each user's tokens begin: then it is made anew, not cut or joined."""
        return spec.input in self.door.offsets

    def extend(self, old: UserState, new: UserState) -> UserState:
        """The state of both histories one after the other, its oldest tokens dropped beyond the window."""
        total = old.tokens + new.tokens
        kept = total if self.window is None else min(total, self.window)
        tensors = dict(old.tensors)
        for spec in self.manifest.state:
            if self._is_offsets(spec):
                tensors[spec.name] = np.array([0, kept], dtype=spec.dtype)
            elif spec.shape[:1] == (TOKENS,):
                # Slice before joining, so that only what is kept is copied, once.
                dropped = total - kept
                later = new.tensors[spec.name][max(0, dropped - old.tokens) :]
                tensors[spec.name] = join([old.tensors[spec.name][dropped:], later])
        return UserState(tensors, kept)


# Of a request: its key, its kept state, and its admitted user inputs where there is none.
_Found: TypeAlias = tuple[StateKey | None, UserState | None, Mapping[str, Array] | None]


class Session:
    """Scores targets for users. One session serves many threads.

    Make one with `Session.load`.
    """

    def __init__(self, model: _Model, cache: StateCache, options: _Options) -> None:
        self._model, self._cache, self._options = model, cache, options

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        *,
        cache_bytes: int = 1 << 30,
        threads: int | None = None,
        truncate: bool = False,
        engine: str | None = None,
        precision: str | None = None,
    ) -> Session:
        """Load a bundle, checking every file of it.

        Args:
            bundle: its directory.
            cache_bytes: most bytes of user states to keep between requests; 0 keeps none.
            threads: threads of one request; None takes every core.
            truncate: serve the most recent part of a history longer than bundle and engines take, and do not refuse it.
            engine: onnxruntime, tensorrt or tensorrt-rtx, whose built engines must run here, or graphs for the bundle's
                own graphs on a CPU; None takes the fastest that runs, and `engines` says which and why.
            precision: of that engine, fp32, bf16 or fp16; None takes the fastest that was built.

        Raises:
            BundleError: when the bundle is missing, damaged or too new.
            BuildError: when the engine cannot load a graph.
        """
        if precision is not None and engine in (None, "graphs"):
            raise BuildError(f"precision {precision}: is of a built engine; say which with engine=")
        options = _Options(threads, truncate, engine, precision)
        return cls(_Model.load(Bundle.load(bundle), options), StateCache(cache_bytes), options)

    def score(self, request: Request | RequestBatch) -> Array:
        """Scores `(targets, tasks)` of a request; of a batch, all requests' targets one after the other.

        A user whose state is kept is not encoded again; a batch goes through the target scorer in one piece.

        Raises:
            RequestError: naming the input, the value and the limit; nothing was computed or kept.
            EngineError: when an engine fails on valid inputs.
        """
        if not isinstance(request, Request | RequestBatch):
            raise RequestError(f"score takes a Request or a RequestBatch, got {type(request).__name__}")
        model = self._model
        requests = model.door.unpack(request) if isinstance(request, RequestBatch) else [request]
        rows = [model.door.admit(_without(r.inputs, model.door.names("user")), "request", "target") for r in requests]
        looked_up = [self._look_up(model, r) for r in requests]
        states = self._states(model, looked_up)
        if not requests:
            specs = model.manifest.graphs["request"].outputs
            return scores_of([np.zeros((0, *(n for n in s.shape if isinstance(n, int))), s.dtype) for s in specs])
        return np.concatenate(scores) if len(scores := model.score(states, rows)) > 1 else scores[0]

    def append(
        self, user: Hashable, events: Mapping[str, ArrayLike], version: Hashable, *, after: Hashable = None
    ) -> bool:
        """Add new events, oldest first, to a kept state: only they are encoded, and the result is exact.

        Args:
            user: whose state.
            events: the per-token user inputs of the new events, by name.
            version: of the history with the new events; the next request for it is a hit.
            after: version of the history they follow. Nothing is appended to another one, so no event lost on the way
                goes unnoticed; None appends to whichever is kept.

        Returns:
            Whether the state with the new events is kept. If not (none was there to append to, or it went or changed
            meanwhile, or the new one is over the budget), the next request brings the history.

        Raises:
            RequestError: when an input is wrong, or the model's tokens depend on each other or on the request.
        """
        model = self._model
        if version is None:
            raise RequestError("version: is None; name the history with the new events, or no request will find it")
        if not model.manifest.appendable:
            raise RequestError("this bundle's states cannot be appended to; send the whole history with a new version")
        names = model.door.names("user")
        once = {n: model.door.placeholder(n) for n in names if model.door.inputs[n].shape[:1] != (TOKENS,)}
        if given := [n for n in events if n in once or n in model.door.names("request", "target")]:
            raise RequestError(f"{given[0]}: is no part of an event; append takes the per-token user inputs alone")
        arrays = model.door.admit({**once, **events}, "user")
        held = self._cache.find(_key(user, version)[0])
        if held is None or (held[0].weights, held[0].format) != (model.manifest.weights, model.format):
            return False
        if held[0].version == version:
            return True  # the same call again, after a timeout perhaps: its events are in
        if after is not None and held[0].version != after:
            return False
        state = model.extend(held[1], model.encode([arrays])[0])
        return model is self._model and self._cache.put(model.key(user, version), state, instead_of=held[1])

    def forget(self, user: Hashable) -> bool:
        """Drop what is kept of a user; False when nothing was."""
        return self._cache.forget(_key(user, None)[0])

    def swap(self, bundle: str | os.PathLike[str]) -> None:
        """Serve another bundle from the next request on; running ones finish on the old. States of other weights go.

        Raises:
            BundleError, BuildError: as `load`, and when the bundle takes other inputs or gives other scores than the
                one being served, so that its clients' requests would fail. The session goes on with the bundle it has.
        """
        found = Bundle.load(bundle)
        check_swap(bundle, self._model.manifest, found.manifest)
        model = _Model.load(found, self._options)
        same = (model.manifest.weights, model.format) == (self._model.manifest.weights, self._model.format)
        self._model = model
        if not same:
            self._cache.clear()

    @property
    def manifest(self) -> Manifest:
        """Manifest of the bundle being served."""
        return self._model.manifest

    @property
    def engines(self) -> Mapping[str, str]:
        """Which engine runs each half, in which `precision`, `why` that one, and why no other (`passed_over`)."""
        model = self._model
        return {
            "user_encoder": model.encoder.name,
            "target_scorer": model.scorer.name,
            "precision": model.choice.precision,
            "why": model.choice.why,
            "passed_over": "; ".join(model.choice.passed_over),
        }

    def stats(self) -> CacheStats:
        """What the state cache holds and did."""
        return self._cache.stats()

    def _look_up(self, model: _Model, request: Request) -> _Found:
        """Key, kept state, and admitted user inputs where there is no such state."""
        user_names = model.door.names("user")
        sent = {n: x for n, x in request.inputs.items() if n in user_names}
        _key(request.user, request.version)
        if request.user is None:
            return None, None, model.door.admit(sent, "user")
        if request.version is not None:
            key = model.key(request.user, request.version)
            held = self._cache.get(key)
            if held is None and not sent and user_names:
                raise RequestError(
                    f"user {request.user!r}: no state of version {request.version!r} is kept; send the user inputs"
                )
            return key, held, None if held is not None else model.door.admit(sent, "user")
        arrays = model.door.admit(sent, "user")
        key = model.key(request.user, model.door.digest(arrays))
        return key, self._cache.get(key), arrays

    def _states(self, model: _Model, found: Sequence[_Found]) -> list[UserState]:
        """Of each request, the kept state or a new one; a user with several requests in the batch is encoded once."""
        missing: dict[StateKey | int, Mapping[str, Array]] = {}
        for place, (key, held, arrays) in enumerate(found):
            if held is None:
                assert arrays is not None
                missing.setdefault(place if key is None else key, arrays)
        fresh = dict(zip(missing, model.encode(list(missing.values())), strict=True))
        if model is self._model:  # after a swap, the state of an old model would only be in the way
            for name, state in fresh.items():
                if isinstance(name, StateKey):
                    self._cache.put(name, state)
        return [held or fresh[place if key is None else key] for place, (key, held, _) in enumerate(found)]


def _limits(choice: Choice, half: str) -> dict[str, int]:
    """How much one run of a half's engine takes: requests, history tokens, targets."""
    entry = choice.entries.get(half, {})
    limits = {USERS: entry.get("requests") or sys.maxsize}
    largest = largest_sizes(entry.get("profiles", ()))
    return limits | {dim: largest.get(dim, sys.maxsize) for dim in (TOKENS, TARGETS)}


def _runs(sizes: Sequence[Mapping[str, int]], limits: Mapping[str, int]) -> Iterator[slice]:
    """Neighbours that go through an engine together: as many as the limits let, and at least one."""
    begin, total = 0, dict.fromkeys(limits, 0)
    for i, size in enumerate(sizes):
        if i > begin and any(total[dim] + n > limits[dim] for dim, n in size.items()):
            yield slice(begin, i)
            begin, total = i, dict.fromkeys(limits, 0)
        for dim, n in size.items():
            total[dim] += n
    if begin < len(sizes):
        yield slice(begin, len(sizes))


def _key(user: Hashable, version: Hashable) -> tuple[Hashable, Hashable]:
    """Both, when they can be looked up."""
    try:
        hash((user, version))
    except TypeError as e:
        raise RequestError(f"user {user!r:.60}, version {version!r:.60}: cannot be a key ({e}); use a string") from e
    return user, version


def _without(inputs: Mapping[str, ArrayLike], names: Sequence[str]) -> dict[str, ArrayLike]:
    if not isinstance(inputs, Mapping):
        raise RequestError(f"inputs: is {type(inputs).__name__}, expected the model's inputs by name")
    return {n: x for n, x in inputs.items() if n not in names}
