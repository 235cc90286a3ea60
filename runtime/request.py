"""Requests, and the one place where they are checked: whatever passes this door is right by the time it is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike

from stca.arrays import FEW, Array, all_finite
from stca.errors import RequestError
from stca.manifest import OFFSETS, TARGETS, TOKENS, USERS, Manifest, TensorSpec, packable
from stca.runtime.client_values import array_of, key_of, labels_of, mapping_of, quoted
from stca.runtime.padding import History

# Most targets scored together unless a session says otherwise: so many need gigabytes.
MOST_TARGETS: Final = 1 << 20


@dataclass(frozen=True)
class Request:
    """One user and the targets to score for them.

    Attributes:
        inputs: the model's inputs by name, for this user alone: `(tokens, …)`, `(targets, …)`, and one value or one row
            for what there is once per user or request. Offsets are made by the runtime.
        user: whose state may be kept and reused; None keeps nothing.
        version: which history this is; change it when the history changes. None takes a digest of the user inputs.
            With a version, a user whose state is kept need not send the user inputs again.
    """

    inputs: Mapping[str, ArrayLike]
    user: Hashable = None
    version: Hashable = None


@dataclass(frozen=True)
class RequestBatch:
    """Several requests as flat rows with offsets, no padding.

    Attributes:
        inputs: the model's inputs, all requests' rows one after the other; `history_offsets` and `target_offsets`
            `(requests + 1,)` integers say where each one's begin.
            A lifted model's user and request inputs are stacked, `(requests, …)`, and have no offsets.
        users, versions: as in `Request`, one for each request; empty when no state is to be kept.
    """

    inputs: Mapping[str, ArrayLike]
    users: Sequence[Hashable] = field(default=())
    versions: Sequence[Hashable] = field(default=())


class Door:
    """Checks requests against a bundle's manifest and turns them into arrays the graphs take.

    Args:
        manifest: of the bundle whose inputs are expected.
        truncate: keep the most recent `max_history` tokens of a longer history instead of refusing it.
        max_targets: most targets of a request, or of a batch together.
    """

    key_of = staticmethod(key_of)

    def __init__(self, manifest: Manifest, *, truncate: bool = False, max_targets: int = MOST_TARGETS) -> None:
        self.inputs = {s.name: s for s in manifest.graphs["request"].inputs}
        self._dtypes = {
            s.name: np.dtype(s.dtype) for s in self.inputs.values()
        }  # made anew, they cost as much as checks
        self.offsets = {s.name: s for s in self.inputs.values() if s.shape == (OFFSETS,)}
        self.ragged = packable(manifest.graphs["request"].inputs)
        # One row of users and requests, a row per target: several users are stacked, and run one after the other.
        self.stacked = bool(self.inputs) and all(
            s.shape[:1] == (TARGETS if s.scope == "target" else 1,) for s in self.inputs.values()
        )
        self._min_history, self._max_history = manifest.min_history, manifest.max_history
        self._truncate, self._max_targets = truncate, max_targets
        self.histories = [
            History(p, self.inputs, manifest.min_history, manifest.max_history, truncate)
            for p in manifest.padding or ()
        ]
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}  # asked for several times per request
        self._bounds = {n: _bounds(self.inputs[n], dtype) for n, dtype in self._dtypes.items() if dtype.kind in "iu"}
        self._lengths = [s for s in self.inputs.values() if s.length_of is not None]

    def names(self, *scopes: str) -> tuple[str, ...]:
        """Inputs of these scopes, offsets aside."""
        if scopes not in self._names:
            found = (s.name for s in self.inputs.values() if s.scope in scopes and s.name not in self.offsets)
            self._names[scopes] = tuple(found)
        return self._names[scopes]

    def admit(self, inputs: Mapping[str, ArrayLike], *scopes: str) -> dict[str, Array]:
        """Check one request's inputs of `scopes` and return them as contiguous arrays, offsets included.

        Raises:
            RequestError: naming the input, the value and the limit.
        """
        names = self.names(*scopes)
        for name in inputs:
            if name in self.offsets:
                raise RequestError(f"{name}: is made by the runtime for a single request; leave it out")
            if name not in self.inputs:
                known = ", ".join(self.names(*_ALL))
                raise RequestError(f"{quoted(name)}: the model has no such input; it takes {known:.600}")
        sizes: dict[str, tuple[int, str]] = {USERS: (1, "one request")} if self.offsets else {}
        arrays: dict[str, Array] = {}
        if self.histories and "user" in scopes:
            inputs = {**inputs, **self._completed(inputs)}
        shared: list[str] = []
        for name in names:
            if name not in inputs:
                raise RequestError(f"{name}: is missing; the model needs it ({self.inputs[name].scope} input)")
            spec = self.inputs[name]
            raw = self._of_kind(spec, inputs[name])
            if raw.ndim < len(spec.shape) and _for_any_target(spec, raw):
                shared.append(name)
                inputs = {**inputs, name: raw}
                continue
            arrays[name] = self._array(spec, raw, sizes)
        for name in shared:
            raw, spec = np.asarray(inputs[name]), self.inputs[name]
            count = sizes.get(str(spec.shape[0]), (1, ""))[0]
            arrays[name] = self._array(spec, np.broadcast_to(raw, (count, *raw.shape)), sizes)
        for spec in self._lengths:
            if spec.name in arrays and (of := str(spec.length_of)) in sizes:
                _check_length(spec.name, arrays[spec.name], *sizes[of])
        if "user" in scopes:
            self._limit_history(arrays, sizes)
        for spec in self.offsets.values():
            if spec.scope in scopes:
                rows = sizes.get(TOKENS if spec.scope == "user" else TARGETS, (0, ""))[0]
                arrays[spec.name] = np.array([0, rows], dtype=spec.dtype)
        return arrays

    def why_not_appendable(self) -> str:
        """Why new events are not appended, of a bundle whose states cannot be."""
        padded = [h.size for h in self.histories if h.size is not None]
        if padded:
            return f"the model's history is padded to {padded[0]} events, so none can be appended"
        if not any(s.scope == "user" for s in self.offsets.values()):
            return "the model takes one whole history, without offsets, so no events can be appended"
        return "this bundle's states cannot be appended to: their events depend on each other or on other inputs"

    def placeholder(self, name: str) -> Array:
        """One valid row of an input there is once per user, for a run whose result does not depend on it."""
        spec = self.inputs[name]
        return np.zeros([n if isinstance(n, int) else 1 for n in spec.shape], spec.dtype)

    def unpack(self, batch: RequestBatch) -> list[Request]:
        """Check a batch's offsets and cut it into its requests, without copying.

        Raises:
            RequestError: when offsets do not start at 0, go backwards, or end elsewhere than the rows.
        """
        mapping_of("inputs", batch.inputs)
        if self.stacked:
            return self._unstack(batch)
        if not self.ragged:
            raise RequestError("this model's inputs cannot be packed into batches; send one Request at a time")
        bounds: dict[str | int, list[int]] = {}
        for name, spec in self.offsets.items():
            bounds[TOKENS if spec.scope == "user" else TARGETS] = _offsets(name, batch)
        counts = {len(b) - 1 for b in bounds.values()}
        if len(counts) != 1:
            raise RequestError(
                f"{' and '.join(self.offsets)}: differ in length; each needs one entry more than requests"
            )
        requests = counts.pop()
        bounds[USERS] = list(range(requests + 1))
        users, versions = (labels_of(n, getattr(batch, n), requests) for n in ("users", "versions"))
        rows: dict[str, Array] = {}
        for name, value in batch.inputs.items():
            if name in self.offsets:
                continue
            rows[name] = array_of(name, value)
            known = self.inputs.get(name)
            if known is None:
                continue  # the request that gets it will refuse it, with the list of inputs there are
            end = bounds[known.shape[0]][-1]
            if rows[name].ndim < 1 or len(rows[name]) != end:
                ends = ", ".join(f"{n} at {np.asarray(batch.inputs[n])[-1]}" for n in self.offsets)
                raise RequestError(
                    f"{name}: has shape {list(rows[name].shape)}, expected {end} rows for {requests} requests; "
                    f"the offsets end: {ends}"
                )
        return [
            Request(
                {
                    name: x[slice(*bounds[self.inputs[name].shape[0]][i : i + 2])] if name in self.inputs else x
                    for name, x in rows.items()
                },
                users[i],
                versions[i],
            )
            for i in range(requests)
        ]

    def _unstack(self, batch: RequestBatch) -> list[Request]:
        """A batch of users stacked `[requests, …]` and their targets, which `target_offsets` tell apart."""
        bounds = _offsets(TARGET_OFFSETS, batch)
        requests = len(bounds) - 1
        users, versions = (labels_of(n, getattr(batch, n), requests) for n in ("users", "versions"))
        parts: list[dict[str, ArrayLike]] = [{} for _ in range(requests)]
        for name, value in batch.inputs.items():
            if name == TARGET_OFFSETS:
                continue
            of_targets = name in self.inputs and self.inputs[name].scope == "target"
            rows: Any = value if isinstance(value, list | tuple) and not of_targets else array_of(name, value)
            found = len(rows) if isinstance(rows, list | tuple) or rows.ndim else None
            expected = bounds[-1] if of_targets else requests
            if found != expected:
                has = "no" if found is None else found
                raise RequestError(
                    f"{name}: has {has} rows, expected {expected} for {requests} requests; "
                    f"{TARGET_OFFSETS} ends at {bounds[-1]}"
                )
            for i, part in enumerate(parts):
                part[name] = rows[bounds[i] : bounds[i + 1]] if of_targets else rows[i : i + 1]
        return [Request(part, users[i], versions[i]) for i, part in enumerate(parts)]

    def digest(self, arrays: Mapping[str, Array]) -> str:
        """A version for a history that has none: SHA-1 of its user inputs (speed matters here, not secrecy)."""
        h = hashlib.sha1(usedforsecurity=False)
        for name in self.names("user"):
            h.update(str(arrays[name].shape).encode())
            h.update(arrays[name].data)
        return h.hexdigest()

    def _completed(self, inputs: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """The inputs of all histories as the model takes them; integers and the like are checked where they stand."""
        made: dict[str, Array] = {}
        for history in self.histories:
            sent = {n: self._of_kind(self.inputs[n], inputs[n]) for n in history.names if n in inputs}
            for name, raw in sent.items():
                self._values(self.inputs[name], raw, self._dtypes[name])
            made |= history.complete(sent)
        return made

    def _of_kind(self, spec: TensorSpec, value: ArrayLike) -> Array:
        """What was sent as an array of the input's kind."""
        raw = array_of(spec.name, value)
        wanted = self._dtypes[spec.name]
        if raw.size == 0 and raw.dtype == np.float64:
            raw = raw.astype(wanted)  # an empty list has no dtype of its own
        if raw.shape == (0,) and len(spec.shape) > 1 and isinstance(spec.shape[0], str):
            raw = raw.reshape(
                0, *(n if isinstance(n, int) else 0 for n in spec.shape[1:])
            )  # nor does it say more sizes
        fits = raw.dtype.kind in "iu" if wanted.kind in "iu" else raw.dtype.kind == wanted.kind
        if not fits:
            raise RequestError(f"{spec.name}: has dtype {raw.dtype!s:.60}, expected {spec.dtype}")
        return raw

    def _array(self, spec: TensorSpec, raw: Array, sizes: dict[str, tuple[int, str]]) -> Array:
        wanted = self._dtypes[spec.name]
        if spec.shape and raw.ndim == len(spec.shape) - 1 and 1 in (spec.shape[0], *sizes.get(str(spec.shape[0]), ())):
            raw = raw[np.newaxis]  # one user's value, given without the batch axis
        if raw.ndim != len(spec.shape):
            raise RequestError(f"{spec.name}: has shape {list(raw.shape)}, expected {shape_of(spec)}")
        for n, size in zip(raw.shape, spec.shape, strict=True):
            expected, because = sizes.setdefault(size, (n, spec.name)) if isinstance(size, str) else (size, "the model")
            if n != expected:
                like = "" if isinstance(size, int) else f" with {size} = {expected} as in {because}"
                raise RequestError(f"{spec.name}: has shape {list(raw.shape)}, expected {shape_of(spec)}{like}")
            if size == TARGETS:
                self.check_targets(n, spec.name)
            elif size == TOKENS and not self._truncate:
                self._check_history(n, spec.name)  # before its values are looked at
        self._values(spec, raw, wanted)
        return np.ascontiguousarray(raw, dtype=wanted)

    def _values(self, spec: TensorSpec, raw: Array, wanted: np.dtype[Any]) -> None:
        if raw.size == 0:
            return
        if wanted.kind == "f":
            asked = raw if raw.dtype == wanted else _as(raw, wanted)
            if not all_finite(asked):
                where = np.unravel_index(int(np.argmin(np.isfinite(asked))), raw.shape)
                raise RequestError(
                    f"{spec.name}: holds {raw[where]} at {list(map(int, where))}; values must be finite as {wanted}"
                )
        elif wanted.kind in "iu":
            low, high, any_will_do = self._bounds[spec.name]
            if not (any_will_do and raw.dtype == wanted) and _beyond(raw, low, high):
                outside = np.argmax((raw < low) | (raw > high))
                where = np.unravel_index(int(outside), raw.shape)
                raise RequestError(
                    f"{spec.name}: holds {raw[where]} at {list(map(int, where))}; it must be in [{low}, {high}]"
                )

    def check_targets(self, targets: int, name: str) -> None:
        """Raises RequestError when these are too many targets for a request, or for a batch together."""
        if targets > self._max_targets:
            raise RequestError(
                f"{name}: has {targets} targets, the limit is {self._max_targets}; send fewer at once, or load the "
                "session with max_targets"
            )

    def _check_history(self, tokens: int, name: str) -> None:
        if self._max_history is not None and tokens > self._max_history:
            raise RequestError(
                f"{name}: has {tokens} tokens, the limit is {self._max_history}; send the most recent ones, or load "
                "the session with truncate=True"
            )

    def _limit_history(self, arrays: dict[str, Array], sizes: dict[str, tuple[int, str]]) -> None:
        if TOKENS not in sizes:
            return
        tokens, name = sizes[TOKENS]
        if tokens < (self._min_history or 0):
            raise RequestError(f"{name}: has {tokens} tokens, the model needs at least {self._min_history}")
        if self._max_history is None or tokens <= self._max_history:
            return
        for key in self.names("user"):
            if TOKENS in (shape := self.inputs[key].shape):
                recent = np.arange(tokens - self._max_history, tokens)
                arrays[key] = arrays[key].take(recent, axis=shape.index(TOKENS))
        sizes[TOKENS] = (self._max_history, name)


def _bounds(spec: TensorSpec, dtype: np.dtype[Any]) -> tuple[int, int, bool]:
    """The least and the largest value of an integer input, and whether that is all its dtype has."""
    least, most = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    low = max(least, spec.low if spec.low is not None else 0 if spec.limit else least)
    high = min(most, spec.limit - 1 if spec.limit else most)  # beyond its dtype a value would be another one
    return low, high, low <= least and high >= most


def _beyond(raw: Array, low: int, high: int) -> bool:
    """Whether a value lies outside; of a few values, looking at each is quicker than two reductions."""
    values = raw.ravel().tolist() if raw.size <= FEW else (raw.min(), raw.max())
    return bool(min(values) < low or max(values) > high)


def _as(raw: Array, wanted: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        return raw.astype(wanted)


def _for_any_target(spec: TensorSpec, raw: Array) -> bool:
    """Whether it is one target's value, without the axis of targets: the only target's, or that of all."""
    return spec.scope == "target" and raw.ndim == len(spec.shape) - 1 and isinstance(spec.shape[0], str)


def _check_length(name: str, values: Array, size: int, of: str) -> None:
    if values.size and values.max() > size:
        raise RequestError(f"{name}: holds {values.max()}, which is more than the {size} rows of {of}")


_ALL = ("user", "request", "target")
# Far more than go through an engine together; each is looked at by itself.
_MOST_REQUESTS = 1 << 14
# Of a batch for a model that has no such input.
TARGET_OFFSETS = "target_offsets"


def _offsets(name: str, batch: RequestBatch) -> list[int]:
    """Where each request's rows begin in a batch, and where the last one's end."""
    if name not in batch.inputs:
        raise RequestError(f"{name}: is missing; a batch needs it")
    offsets = array_of(name, batch.inputs[name])
    if offsets.ndim != 1 or offsets.size < 1 or offsets.dtype.kind not in "iu":
        raise RequestError(f"{name}: must be a list of at least one integer, got {_described(offsets)}")
    if offsets.size - 1 > _MOST_REQUESTS:
        raise RequestError(
            f"{name}: tells of {offsets.size - 1} requests, the limit is {_MOST_REQUESTS}; send fewer at once"
        )
    if offsets[0] != 0:
        raise RequestError(f"{name}: starts at {offsets[0]}; it must start at 0")
    if (back := np.flatnonzero(np.diff(offsets.astype(np.int64)) < 0)).size:
        i = int(back[0])
        raise RequestError(f"{name}: goes backwards at {i + 1}, from {offsets[i]} to {offsets[i + 1]}")
    found: list[int] = offsets.tolist()
    return found


def shape_of(spec: TensorSpec) -> str:
    """An input's shape for a message."""
    return "[" + ", ".join(map(str, spec.shape)) + "]"


def _described(x: Array) -> str:
    return f"{x.dtype!s:.60} of shape {list(x.shape)}"
