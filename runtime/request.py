"""Requests, and the one place where they are checked: whatever passes this door is right by the time it is computed."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from stca.arrays import Array
from stca.errors import RequestError
from stca.manifest import Manifest
from stca.near import did_you_mean
from stca.runtime.client_values import TEXT, array_of, mapping_of, quoted, whose_of
from stca.runtime.input_check import Agreed, InputCheck, Limits, Plain, ready
from stca.runtime.padding import History
from stca.specs import OFFSETS, TARGETS, TOKENS, USERS, TensorSpec, packable

# Most targets scored together unless a session says otherwise: so many need gigabytes.
MOST_TARGETS: Final = 1 << 20


@dataclass(frozen=True)
class Request:
    """One user and the targets to score for them.

    Attributes:
        inputs: the model's inputs by name, for this user alone: `(tokens, …)`, `(targets, …)`, and one value or one row
            for what there is once per user or request. Offsets are made by the runtime.
        user: whose state may be kept and reused, text or an integer (or bytes, a UUID, a date, a tuple of these), and
            never a float; None keeps nothing. C++ and JSON know text alone, or text and integers.
        version: which history this is, of the same kinds; change it when the history changes. None takes a digest of
            the user inputs. Versions have no order: of two calls, the later one's state is kept.
            With a version, a user whose state is kept need not send the user inputs again.
        neighbours: users whose histories are read behind the user's own, as if they were one. Each is a request without
            targets: who it is, the history unless it is kept, and request inputs with an entry per history token.
        leave_out: score without the neighbours of whom neither a state nor a history is there.
    """

    inputs: Mapping[str, ArrayLike]
    user: Hashable = None
    version: Hashable = None
    neighbours: Sequence[Request] = ()
    leave_out: bool = False


@dataclass(frozen=True)
class RequestBatch:
    """Several requests as flat rows with offsets, no padding.

    Attributes:
        inputs: the model's inputs, all requests' rows one after the other; `history_offsets` and `target_offsets`
            `(requests + 1,)` integers say where each one's begin.
            A lifted model's user and request inputs are stacked, `(requests, …)`, and have no offsets.
        users, versions: as in `Request`, one for each request; empty when no state is to be kept. A version counts
            where there is a user.
    """

    inputs: Mapping[str, ArrayLike]
    users: Sequence[Hashable] = field(default=())
    versions: Sequence[Hashable] = field(default=())


class _Part(NamedTuple):
    """What the door knows of some scopes: their inputs without offsets, the checks of these, short and whole, each
    offsets input with its dtype and the size that it counts, and which inputs are lengths, and which may hold blanks.
    """

    names: tuple[str, ...]
    checks: tuple[InputCheck, ...]
    plain: tuple[Plain, ...]
    offsets: tuple[tuple[str, str, str], ...]
    lengths: tuple[TensorSpec, ...]
    blanks: tuple[TensorSpec, ...]
    has_user: bool


@functools.lru_cache(1024)
def _from_0_to(rows: int, dtype: str) -> Array:
    """Offsets of one request, shared by all that have as many rows."""
    offsets = np.array([0, rows], dtype=dtype)
    offsets.flags.writeable = False
    return offsets


class Door:
    """Checks requests against a bundle's manifest and turns them into arrays the graphs take.

    Args:
        manifest: of the bundle whose inputs are expected.
        truncate: keep the most recent `max_history` tokens of a longer history instead of refusing it.
        max_targets: most targets of a request, or of a batch together.
    """

    def __init__(self, manifest: Manifest, *, truncate: bool = False, max_targets: int = MOST_TARGETS) -> None:
        self.inputs = {s.name: s for s in manifest.graphs["request"].inputs}
        self.offsets = {s.name: s for s in self.inputs.values() if s.shape == (OFFSETS,)}
        self.ragged = packable(manifest.graphs["request"].inputs)
        # One row of users and requests, a row per target: several users are stacked, and run one after the other.
        self.stacked = bool(self.inputs) and all(
            s.shape[:1] == (TARGETS if s.scope == "target" else 1,) for s in self.inputs.values()
        )
        self.limits = Limits(manifest.max_history, truncate, max_targets)
        self.histories = [
            History(p, self.inputs, manifest.min_history, manifest.max_history, truncate)
            for p in manifest.padding or ()
        ]
        self._min_history = manifest.min_history
        self._checks = {n: InputCheck(s, self.limits) for n, s in self.inputs.items() if n not in self.offsets}
        self._parts: dict[tuple[str, ...], _Part] = {}
        self._no_user = frozenset(self.names("request", "target"))
        # Request inputs with an entry per history token, which one value may stand for.
        self.of_tokens = tuple(n for n in self.names("request") if self.inputs[n].shape[:1] == (TOKENS,))
        self._sizes: Agreed = {USERS: (1, "one request")} if self.offsets else {}
        self._of_request = self._part(("request", "target"))

    def names(self, *scopes: str) -> tuple[str, ...]:
        """Inputs of these scopes, offsets aside."""
        return self._part(scopes).names

    def _part(self, scopes: tuple[str, ...]) -> _Part:
        if (part := self._parts.get(scopes)) is None:
            of = [s for s in self.inputs.values() if s.scope in scopes]
            checks = tuple(self._checks[s.name] for s in of if s.name not in self.offsets)
            counted = {"user": TOKENS, "target": TARGETS}
            offsets = tuple((s.name, s.dtype, counted[str(s.scope)]) for s in of if s.name in self.offsets)
            self._parts[scopes] = part = _Part(
                tuple(c.name for c in checks),
                checks,
                tuple(c.plain for c in checks),
                offsets,
                tuple(s for s in of if s.length_of is not None),
                tuple(s for s in of if s.blank is not None),
                "user" in scopes,
            )
        return part

    def has_user(self, inputs: dict[str, ArrayLike]) -> bool:
        """Whether anything is sent that is not the request's or its targets'."""
        return not inputs.keys() <= self._no_user

    def plain(self, inputs: Mapping[str, ArrayLike]) -> dict[str, Array] | None:
        """As `admit` of one request's request and target inputs, where it brings these alone, and as arrays that graphs
        take as they are, none of them empty; None where `admit` is to say.
        """
        part = self._of_request
        whole = type(inputs) is dict and len(inputs) == len(part.plain) and TEXT.issuperset(map(type, inputs))
        if part.lengths or part.blanks or not whole:
            return None
        sizes = self._sizes.copy()
        if (arrays := ready(part.plain, inputs, sizes)) is not None:
            for name, dtype, size in part.offsets:
                arrays[name] = _from_0_to(sizes[size][0] if size in sizes else 0, dtype)
        return arrays

    def admit(
        self, inputs: dict[str, ArrayLike], *scopes: str, events: bool = False, cut: bool = True
    ) -> dict[str, Array]:
        """Check one request's inputs of `scopes` and return them as contiguous arrays, offsets included. Of inputs of
        other scopes only the names are looked at.

        Args:
            inputs: by name.
            scopes: of those that are admitted.
            events: they are a part of a history: any of its events may be blank, as long as others are not.
            cut: drop the oldest tokens beyond the limit, where the session truncates; otherwise all are left.

        Raises:
            RequestError: naming the input, the value and the limit.
        """
        part, sizes = self._parts.get(scopes) or self._part(scopes), self._sizes.copy()
        if part.has_user and self.histories:
            self._check_names(inputs)
            inputs = {**inputs, **self._completed(inputs)}
        arrays = ready(part.plain, inputs, sizes) or {}
        if len(arrays) < len(inputs):
            self._check_names(inputs)
        arrays = arrays or self._checked(part, inputs, sizes)
        for spec in part.lengths:
            if (of := str(spec.length_of)) in sizes:
                _check_length(spec.name, arrays[spec.name], *sizes[of])
        if part.has_user and TOKENS in sizes:
            self._limit_history(arrays, sizes, cut=cut)
        for spec in part.blanks:
            if not (events and spec.shape[:1] == (TOKENS,)):
                _check_not_blank(spec, arrays[spec.name])
        for name, dtype, size in part.offsets:
            arrays[name] = _from_0_to(sizes[size][0] if size in sizes else 0, dtype)
        return arrays

    def _checked(self, part: _Part, inputs: Mapping[str, ArrayLike], sizes: Agreed) -> dict[str, Array]:
        """Each input of a part as the contiguous array that graphs take; `sizes` are added to."""
        arrays: dict[str, Array] = {}
        of_any_target: list[tuple[InputCheck, Array]] = []
        for check in part.checks:
            name = check.name
            if name not in inputs:
                raise RequestError(f"{name}: is missing; the model needs it ({check.spec.scope} input)")
            raw = check.of_kind(inputs[name])
            if check.for_any_target(raw):
                of_any_target.append((check, raw))
            else:
                arrays[name] = check.array(raw, sizes)
        for check, raw in of_any_target:
            arrays[check.name] = check.array(check.repeated(raw, sizes), sizes)
        return arrays

    def _check_names(self, inputs: Mapping[str, ArrayLike]) -> None:
        """Raises RequestError of the first input that is not the client's to send."""
        if inputs.keys() <= self._checks.keys():
            return
        name = next(n for n in inputs if n not in self._checks)
        if name in self.offsets:
            raise RequestError(f"{name}: is made by the runtime for a single request; leave it out")
        known = self.names(*_ALL)
        takes = f"it takes {', '.join(known):.600}{did_you_mean(name, known) if isinstance(name, str) else ''}"
        raise RequestError(f"{quoted(name)}: the model has no such input; {takes}")

    def only_blank(self, arrays: Mapping[str, Array]) -> TensorSpec | None:
        """An admitted input that holds nothing but what stands for no event, where the model has no score for that."""
        return next((s for s in self._part(("user",)).blanks if _is_blank(s, arrays[s.name])), None)

    def admit_neighbour(self, inputs: dict[str, ArrayLike]) -> dict[str, Array]:
        """Of a neighbour's inputs those of the request, one for each history token; raises RequestError as `admit`."""
        self._check_names(inputs)
        if other := [n for n in inputs if n in self._no_user and n not in self.of_tokens]:
            raise RequestError(f"neighbours: {other[0]} is the request's or its targets' own; leave it out")
        if missing := [n for n in self.of_tokens if n not in inputs]:
            raise RequestError(f"neighbours: {missing[0]} is missing; the model needs it of each neighbour's history")
        return {n: self._checks[n].array(self._checks[n].of_kind(inputs[n]), {}) for n in self.of_tokens}

    def why_not_changeable(self, call: str) -> str:
        """Why `append` or `amend` does nothing to the states of a bundle that cannot be appended to."""
        done, states = {"append": ("appended", "appended to"), "amend": ("amended", "amended")}[call]
        if padded := next((h.size for h in self.histories if h.size is not None), None):
            return f"the model's history is padded to {padded} events, so none can be {done}"
        if other := next((s.name for s in self.inputs.values() if s.scope == "user" and TOKENS in s.shape[1:]), None):
            return f"the model has the events of {other} on another axis than the first, so none can be {done}"
        return f"this bundle's states cannot be {states}: their events depend on each other or on other inputs"

    def placeholder(self, name: str) -> Array:
        """One valid row of an input, for a run whose result does not depend on it."""
        spec = self.inputs[name]
        least = spec.low or 0
        value = least + 1 if least == spec.blank else least
        return np.full([n if isinstance(n, int) else 1 for n in spec.shape], value, spec.dtype)

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
        whose = whose_of(batch.users, batch.versions, requests)
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
                *whose[i],
            )
            for i in range(requests)
        ]

    def _unstack(self, batch: RequestBatch) -> list[Request]:
        """A batch of users stacked `[requests, …]` and their targets, which `target_offsets` tell apart."""
        bounds = _offsets(TARGET_OFFSETS, batch)
        requests = len(bounds) - 1
        whose = whose_of(batch.users, batch.versions, requests)
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
        return [Request(part, *whose[i]) for i, part in enumerate(parts)]

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
            sent = {n: self._checks[n].of_kind(inputs[n]) for n in history.names if n in inputs}
            for name, raw in sent.items():
                self._checks[name].check_values(raw)
            made |= history.complete(sent)
        return made

    def _limit_history(self, arrays: dict[str, Array], sizes: Agreed, *, cut: bool) -> None:
        tokens, name = sizes[TOKENS]
        if tokens < (self._min_history or 0):
            raise RequestError(f"{name}: has {tokens} tokens, the model needs at least {self._min_history}")
        most = self.limits.max_history
        if most is None or tokens <= most or not cut:
            return
        for key in self.names("user"):
            if TOKENS in (shape := self.inputs[key].shape):
                recent = np.arange(tokens - most, tokens)
                arrays[key] = arrays[key].take(recent, axis=shape.index(TOKENS))
        sizes[TOKENS] = (most, name)


def _check_length(name: str, values: Array, size: int, of: str) -> None:
    if values.size and values.max() > size:
        raise RequestError(f"{name}: holds {values.max()}, which is more than the {size} rows of {of}")


def _is_blank(spec: TensorSpec, values: Array) -> bool:
    return values.size > 0 and bool((values == spec.blank).all())


def _check_not_blank(spec: TensorSpec, values: Array) -> None:
    if _is_blank(spec, values):
        raise RequestError(
            f"{spec.name}: holds nothing but {spec.blank}, for which the model has no finite score; send at least one "
            "other value"
        )


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


def _described(x: Array) -> str:
    return f"{x.dtype!s:.60} of shape {list(x.shape)}"
