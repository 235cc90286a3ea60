"""One input of a model, and how what a client sends for it is checked. What that takes is made once, at load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from stca.arrays import Array, all_finite, extremes
from stca.errors import RequestError
from stca.runtime.client_values import MOST_VALUES, array_of, in_numbers, odd_one
from stca.specs import TARGETS, TOKENS, USERS, TensorSpec

# By its name, how long a dimension of a request is, and which input said so first.
Agreed = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Limits:
    """How much a request may bring.

    Attributes:
        max_history: most history tokens; None for as many as the model takes.
        truncate: whether a longer history is cut instead of refused.
        max_targets: most targets of a request, or of a batch together.
    """

    max_history: int | None
    truncate: bool
    max_targets: int

    def check_targets(self, targets: int, name: str) -> None:
        """Raises RequestError when these are too many targets for a request, or for a batch together."""
        if targets > self.max_targets:
            raise RequestError(
                f"{name}: has {targets} targets, the limit is {self.max_targets}; send fewer at once, or load the "
                "session with max_targets"
            )

    def check_history(self, tokens: int, name: str) -> None:
        """Raises RequestError when a history is too long, and may not be cut."""
        if self.max_history is not None and tokens > self.max_history and not self.truncate:
            raise RequestError(
                f"{name}: has {tokens} tokens, the limit is {self.max_history}; send the most recent ones, or load "
                "the session with truncate=True"
            )


class InputCheck:
    """Checks one input.

    Args:
        spec: of the request graph.
        limits: of requests.
    """

    def __init__(self, spec: TensorSpec, limits: Limits) -> None:
        self.spec, self.name, self.dtype = spec, spec.name, np.dtype(spec.dtype)
        self._limits, self._shape, self._rank = limits, spec.shape, len(spec.shape)
        self._bounds = _Bounds.of(spec, self.dtype) if self.dtype.kind in "iu" else None
        # Whether one target's value may stand for all of them, without the axis of targets.
        self._of_targets = spec.scope == "target" and isinstance(next(iter(spec.shape), 0), str)
        # Whether one value may stand for all history tokens, whose number the state knows.
        self._of_tokens = spec.scope == "request" and spec.shape[:1] == (TOKENS,)
        self.plain = Plain.of(spec, self.dtype, limits, self._bounds)

    def of_kind(self, value: ArrayLike) -> Array:
        """What was sent as an array of the input's kind.

        Raises:
            RequestError: when it is no array, or its dtype is of another kind.
        """
        raw = array_of(self.name, value)
        if raw.dtype is not self.dtype:
            if raw.size == 0 and raw.dtype == np.float64:
                raw = raw.astype(self.dtype)  # an empty list has no dtype of its own
            kind, wanted = raw.dtype.kind, self.dtype.kind
            if wanted == "f" and kind in "iu" and in_numbers(value):
                return self._exactly(raw)
            if not (kind in "iu" if wanted in "iu" else kind == wanted):
                holds = odd_one(value, raw, wanted) or _said(raw)
                raise RequestError(f"{self.name}: {holds}, expected {self.spec.dtype}")
        if self._rank > 1 and raw.shape == (0,) and isinstance(self._shape[0], str):
            raw = raw.reshape(
                0, *(n if isinstance(n, int) else 0 for n in self._shape[1:])
            )  # nor does it say more sizes
        return raw

    def _exactly(self, raw: Array) -> Array:
        """Whole numbers without a dtype of their own as the input's floats."""
        found = _as(raw, self.dtype)
        if (lost := found.astype(np.longdouble) != raw.astype(np.longdouble)).any():
            value, where = _at(raw, int(np.argmax(lost)))
            raise RequestError(f"{self.name}: holds {value}{where}, which {self.spec.dtype} does not hold exactly")
        return found

    def for_any_target(self, raw: Array) -> bool:
        """Whether it is one target's value, without the axis of targets: the only target's, or that of all."""
        return self._of_targets and raw.ndim == self._rank - 1

    def repeated(self, raw: Array, sizes: Agreed) -> Array:
        """One target's value for as many targets as the other inputs have."""
        count = sizes.get(str(self._shape[0]), (1, ""))[0]
        return np.broadcast_to(raw, (count, *raw.shape))

    def array(self, raw: Array, sizes: Agreed) -> Array:
        """What was sent, of the right kind, as the contiguous array that graphs take.

        Args:
            raw: as `of_kind` gives it.
            sizes: of the inputs that were looked at before; this one's are added.

        Raises:
            RequestError: naming the input, the value and the limit.
        """
        shape = self._shape
        if self._of_tokens and raw.ndim == self._rank - 1:
            raw, sizes = raw[np.newaxis], {}
        elif raw.ndim == self._rank - 1 and 1 in (shape[0], *sizes.get(str(shape[0]), ())):
            raw = raw[np.newaxis]  # one user's value, given without the batch axis
        if raw.ndim != self._rank:
            raise RequestError(
                f"{self.name}: has shape {list(raw.shape)}, expected {shape_of(self.spec)}{self._advice(raw)}"
            )
        for n, size in zip(raw.shape, shape, strict=True):
            expected, because = sizes.setdefault(size, (n, self.name)) if isinstance(size, str) else (size, "")
            if n != expected:
                wrong = f"expected {shape_of(self.spec)}"
                if because:  # which of the two is wrong, nothing tells
                    wrong = f"so {size} = {n}, but {because} has {size} = {expected}; send as many of both"
                raise RequestError(f"{self.name}: has shape {list(raw.shape)}, {wrong}{self._advice(raw)}")
            if size == TARGETS:
                self._limits.check_targets(n, self.name)
            elif size == TOKENS:
                self._limits.check_history(n, self.name)  # before its values are looked at
        self.check_values(raw)
        fits = raw.dtype is self.dtype and raw.flags.c_contiguous
        return raw if fits else np.ascontiguousarray(raw, dtype=self.dtype)

    def _advice(self, raw: Array) -> str:
        """What to do about several values where there is one: those of a request may have been meant for targets."""
        if self.spec.scope == "user" and self._shape[:1] == (1,) and raw.ndim == self._rank > 1 and len(raw) != 1:
            return "; send one row for the user"
        once = self._rank < raw.ndim or (self._rank == raw.ndim and self._shape[:1] in ((1,), (USERS,)))
        if self.spec.scope != "request" or not once or len(raw) == 1:
            return ""
        return "; it has one value per request: make it a target input if it differs between targets"

    def check_values(self, raw: Array) -> None:
        """Raises RequestError when a value is not finite, or out of range."""
        if self._bounds is not None:
            if not (self._bounds.whole and raw.dtype is self.dtype) and raw.size:
                self._check_range(raw, self._bounds)
        elif self.dtype.kind == "f":
            asked = raw if raw.dtype == self.dtype else _as(raw, self.dtype)
            if not all_finite(asked):
                value, where = _at(raw, int(np.argmin(np.isfinite(asked))))
                raise RequestError(f"{self.name}: holds {value}{where}; values must be finite as {self.dtype}")
            if (low := self.spec.low) is not None and raw.size and asked.min() < low:
                value, where = _at(raw, int(np.argmax(asked < low)))
                raise RequestError(f"{self.name}: holds {value}{where}; it must be at least {low}")

    def _check_range(self, raw: Array, bounds: _Bounds) -> None:
        least, most = extremes(raw)
        if least < bounds.low or most > bounds.high:
            outside = int(np.argmax((raw < bounds.low) | (raw > bounds.high)))
            value, where = _at(raw, outside)
            raise RequestError(f"{self.name}: holds {value}{where}; it must be {bounds.said(int(value))}")


class _Bounds(NamedTuple):
    """The least and the largest value of an integer input, and whether they are its dtype's."""

    low: int
    high: int
    lowest: bool
    highest: bool

    @classmethod
    def of(cls, spec: TensorSpec, dtype: np.dtype[Any]) -> _Bounds:
        least, most = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        low = max(least, spec.low if spec.low is not None else 0 if spec.limit else least)
        high = min(most, spec.limit - 1 if spec.limit else most)  # beyond its dtype a value would be another one
        return cls(low, high, low <= least, high >= most)

    @property
    def whole(self) -> bool:
        """Whether all values of its dtype are allowed."""
        return self.lowest and self.highest

    def said(self, value: int) -> str:
        """What a value that is out of range must be. A limit that is the dtype's alone tells nobody anything."""
        if value > self.high and self.lowest and not self.highest:
            return f"at most {self.high}"
        if value < self.low and self.highest and not self.lowest:
            return f"at least {self.low}"
        return f"in [{self.low}, {self.high}]"


class Plain(NamedTuple):
    """An array of an input that needs no more than a few comparisons.

    Attributes:
        name, dtype: its own.
        rows: the size of its first axis, a number or a name.
        behind: the other sizes, in which a name equals none.
        most: most rows.
        any_value: whether all values of the dtype are allowed.
        below, above: what its values must be between.
    """

    name: str
    dtype: np.dtype[Any]
    rows: int | str
    behind: tuple[int | str, ...]
    most: int
    any_value: bool
    below: float
    above: float

    @classmethod
    def of(cls, spec: TensorSpec, dtype: np.dtype[Any], limits: Limits, bounds: _Bounds | None) -> Plain:
        rows = spec.shape[0] if spec.shape else -1  # a number of its own is no array's first axis
        limit = {TARGETS: limits.max_targets, TOKENS: limits.max_history}.get(str(rows))
        most = MOST_VALUES if limit is None else limit
        if bounds is not None:
            return cls(spec.name, dtype, rows, spec.shape[1:], most, bounds.whole, bounds.low - 1, bounds.high + 1)
        below = -math.inf if spec.low is None else math.nextafter(spec.low, -math.inf)
        return cls(spec.name, dtype, rows, spec.shape[1:], most, dtype.kind != "f", below, math.inf)


def ready(plain: Sequence[Plain], inputs: Mapping[str, ArrayLike], sizes: Agreed) -> dict[str, Array] | None:
    """Inputs that are all arrays which graphs take as they are, and not empty; None where `InputCheck` is to say.

    Most requests bring nothing else, and these few comparisons, in one piece, are all that their inputs cost.

    Args:
        plain: of each input that is wanted.
        inputs: what was sent, by name.
        sizes: as of `InputCheck.array`; left alone where None is given.
    """
    found = sizes.copy()
    arrays: dict[str, Array] = {}
    for name, dtype, size, behind, most, any_value, below, above in plain:
        value = inputs.get(name)
        if type(value) is not np.ndarray:
            return None
        shape = value.shape
        if value.dtype is not dtype or not shape or shape[1:] != behind or not value.flags.c_contiguous:
            return None
        rows = shape[0]
        if type(size) is not str:
            if size != rows:
                return None
        elif (known := found.get(size)) is None:
            found[size] = rows, name
        elif known[0] != rows:
            return None
        if rows > most or not 0 < value.size <= MOST_VALUES:
            return None
        # As in `extremes`, without its call; no comparison with NaN holds.
        if not (any_value or (below < value.item(value.argmin()) and value.item(value.argmax()) < above)):
            return None
        arrays[name] = value
    sizes |= found
    return arrays


def shape_of(spec: TensorSpec) -> str:
    """An input's shape for a message."""
    return "[" + ", ".join(map(str, spec.shape)) + "]"


# What numpy calls by letters.
_KINDS: Final = {"U": "text", "S": "bytes", "O": "objects", "M": "dates", "m": "spans of time", "V": "records"}


def _said(raw: Array) -> str:
    if raw.dtype == object and raw.size and raw.flat[0] is None:
        return "holds None" if raw.ndim else "is None"
    kind = _KINDS.get(raw.dtype.kind)
    return f"holds {kind}" if kind else f"has dtype {raw.dtype!s:.60}"


def _at(raw: Array, index: int) -> tuple[Any, str]:
    """The value counted row by row, and where it stands, for a message; a number alone stands nowhere."""
    where = np.unravel_index(index, raw.shape)
    return raw[where], f" at {list(map(int, where))}" if raw.ndim else ""


def _as(raw: Array, wanted: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        return raw.astype(wanted)
