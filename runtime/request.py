"""Requests, and the one place where they are checked: whatever passes this door is right by the time it is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from stca.bundle import OFFSETS, TARGETS, TOKENS, USERS, GraphSpec, Manifest, TensorSpec, packable
from stca.errors import BundleError, RequestError
from stca.types import Array


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
    """

    def __init__(self, manifest: Manifest, *, truncate: bool = False) -> None:
        self.inputs = {s.name: s for s in manifest.graphs["request"].inputs}
        self.offsets = {s.name: s for s in self.inputs.values() if s.shape == (OFFSETS,)}
        self.ragged = packable(manifest.graphs["request"].inputs)
        self._max_history = manifest.max_history
        self._truncate = truncate
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}  # asked for several times per request

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
                raise RequestError(f"{name}: the model has no such input; it takes {', '.join(self.names(*_ALL))}")
        sizes: dict[str, tuple[int, str]] = {USERS: (1, "one request")} if self.offsets else {}
        arrays: dict[str, Array] = {}
        for name in names:
            if name not in inputs:
                raise RequestError(f"{name}: is missing; the model needs it ({self.inputs[name].scope} input)")
            arrays[name] = self._array(self.inputs[name], inputs[name], sizes)
        if "user" in scopes:
            self._limit_history(arrays, sizes)
        for spec in self.offsets.values():
            if spec.scope in scopes:
                rows = sizes.get(TOKENS if spec.scope == "user" else TARGETS, (0, ""))[0]
                arrays[spec.name] = np.array([0, rows], dtype=spec.dtype)
        return arrays

    def placeholder(self, name: str) -> Array:
        """One valid row of an input there is once per user, for a run whose result does not depend on it."""
        spec = self.inputs[name]
        return np.zeros([n if isinstance(n, int) else 1 for n in spec.shape], spec.dtype)

    def unpack(self, batch: RequestBatch) -> list[Request]:
        """Check a batch's offsets and cut it into its requests, without copying.

        Raises:
            RequestError: when offsets do not start at 0, go backwards, or end elsewhere than the rows.
        """
        if not self.ragged:
            raise RequestError("this model's inputs cannot be packed into batches; send one Request at a time")
        bounds: dict[str | int, list[int]] = {}
        for name, spec in self.offsets.items():
            if name not in batch.inputs:
                raise RequestError(f"{name}: is missing; a batch needs it")
            offsets = _array_of(name, batch.inputs[name])
            if offsets.ndim != 1 or offsets.size < 1 or offsets.dtype.kind not in "iu":
                raise RequestError(f"{name}: must be a list of at least one integer, got {_described(offsets)}")
            if offsets[0] != 0:
                raise RequestError(f"{name}: starts at {offsets[0]}; it must start at 0")
            if (back := np.flatnonzero(np.diff(offsets.astype(np.int64)) < 0)).size:
                i = int(back[0])
                raise RequestError(f"{name}: goes backwards at {i + 1}, from {offsets[i]} to {offsets[i + 1]}")
            bounds[TOKENS if spec.scope == "user" else TARGETS] = offsets.tolist()
        counts = {len(b) - 1 for b in bounds.values()}
        if len(counts) != 1:
            raise RequestError(
                f"{' and '.join(self.offsets)}: differ in length; each needs one entry more than requests"
            )
        requests = counts.pop()
        bounds[USERS] = list(range(requests + 1))
        for name, labels in (("users", batch.users), ("versions", batch.versions)):
            if len(labels) and len(labels) != requests:
                raise RequestError(f"{name}: has {len(labels)} entries for {requests} requests")
        rows: dict[str, Array] = {}
        for name, value in batch.inputs.items():
            if name in self.offsets:
                continue
            rows[name] = _array_of(name, value)
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
                batch.users[i] if len(batch.users) else None,
                batch.versions[i] if len(batch.versions) else None,
            )
            for i in range(requests)
        ]

    def digest(self, arrays: Mapping[str, Array]) -> str:
        """A version for a history that has none: SHA-1 of its user inputs (speed matters here, not secrecy)."""
        h = hashlib.sha1(usedforsecurity=False)
        for name in self.names("user"):
            h.update(str(arrays[name].shape).encode())
            h.update(arrays[name].data)
        return h.hexdigest()

    def _array(self, spec: TensorSpec, value: ArrayLike, sizes: dict[str, tuple[int, str]]) -> Array:
        raw = _array_of(spec.name, value)
        wanted = np.dtype(spec.dtype)
        if raw.size == 0 and raw.dtype == np.float64:
            raw = raw.astype(wanted)  # an empty list has no dtype of its own
        fits = raw.dtype.kind in "iu" if wanted.kind in "iu" else raw.dtype.kind == wanted.kind
        if not fits:
            raise RequestError(f"{spec.name}: has dtype {raw.dtype}, expected {spec.dtype}")
        if spec.shape and raw.ndim == len(spec.shape) - 1 and sizes.get(str(spec.shape[0]), (0, ""))[0] == 1:
            raw = raw[np.newaxis]  # one user's value, given without the batch axis
        if raw.ndim != len(spec.shape):
            raise RequestError(f"{spec.name}: has shape {list(raw.shape)}, expected {_shape(spec)}")
        for n, size in zip(raw.shape, spec.shape, strict=True):
            expected, because = sizes.setdefault(size, (n, spec.name)) if isinstance(size, str) else (size, "the model")
            if n != expected:
                raise RequestError(
                    f"{spec.name}: has shape {list(raw.shape)}, expected {_shape(spec)} with {size} = {expected} "
                    f"as in {because}"
                )
        self._values(spec, raw, wanted)
        return np.ascontiguousarray(raw, dtype=wanted)

    def _values(self, spec: TensorSpec, raw: Array, wanted: np.dtype[Any]) -> None:
        if raw.size == 0:
            return
        if wanted.kind == "f":
            with np.errstate(over="ignore"):
                finite = np.isfinite(raw.astype(wanted, copy=False))
            if not finite.all():
                where = np.unravel_index(int(np.argmin(finite)), raw.shape)
                raise RequestError(
                    f"{spec.name}: holds {raw[where]} at {list(map(int, where))}; values must be finite as {wanted}"
                )
        elif wanted.kind in "iu":
            low, high = (0, spec.limit - 1) if spec.limit else (np.iinfo(wanted).min, np.iinfo(wanted).max)
            if raw.min() < low or raw.max() > high:
                outside = np.argmax((raw < low) | (raw > high))
                where = np.unravel_index(int(outside), raw.shape)
                raise RequestError(
                    f"{spec.name}: holds {raw[where]} at {list(map(int, where))}; it must be in [{low}, {high}]"
                )

    def _limit_history(self, arrays: dict[str, Array], sizes: dict[str, tuple[int, str]]) -> None:
        tokens, name = sizes.get(TOKENS, (0, ""))
        if self._max_history is None or tokens <= self._max_history:
            return
        if not self._truncate:
            raise RequestError(
                f"{name}: has {tokens} tokens, the limit is {self._max_history}; send the most recent ones, or load "
                "the session with truncate=True"
            )
        for key in self.names("user"):
            if self.inputs[key].shape[:1] == (TOKENS,):
                arrays[key] = arrays[key][tokens - self._max_history :]
        sizes[TOKENS] = (self._max_history, name)


_ALL = ("user", "request", "target")


def check_swap(bundle: object, served: Manifest, other: Manifest) -> None:
    """Whoever sends requests for one bundle must be able to send them to the other: the same inputs, and scores of the
    same form. Weights, id limits, the longest history and all that is inside the graphs may differ.

    Args:
        bundle: the name of the one with the manifest `other`, for the message.

    Raises:
        BundleError: naming the first input that differs, or the outputs.
    """
    old, new = (
        {s.name: f"{s.dtype} {_shape(s)} of scope {s.scope}" for s in _whole(m).inputs} for m in (served, other)
    )
    for name in [*old, *new]:
        if old.get(name) != new.get(name):
            _refuse_swap(bundle, f"input {name!r}", new.get(name, "missing"), old.get(name, "missing"))
    # Symbolic sizes of outputs are names that an exporter made up.
    have, has = (
        ", ".join(f"{s.dtype} [{', '.join('*' if isinstance(n, str) else str(n) for n in s.shape)}]" for s in outputs)
        for outputs in (_whole(served).outputs, _whole(other).outputs)
    )
    if have != has:
        _refuse_swap(bundle, "the output", has, have)


def _whole(manifest: Manifest) -> GraphSpec:
    return manifest.graphs["request"]


def _refuse_swap(bundle: object, what: str, new: str, old: str) -> NoReturn:
    raise BundleError(
        f"{bundle}: cannot take the place of the bundle being served: {what} is {new} in it, {old} there; "
        "load it as a session of its own"
    )


def _array_of(name: str, value: ArrayLike) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        raise RequestError(f"{name}: is a masked array; fill it or leave the masked rows out")
    try:
        return np.asarray(value)
    except ValueError as e:
        raise RequestError(f"{name}: is not a rectangular array ({e})") from e


def _shape(spec: TensorSpec) -> str:
    return "[" + ", ".join(map(str, spec.shape)) + "]"


def _described(x: Array) -> str:
    return f"{x.dtype} of shape {list(x.shape)}"
