"""JSON into dataclasses, by the types that their fields are declared with: what does not fit is named, not guessed."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

# An integer that may be negative; all others are sizes and counts.
Signed: TypeAlias = Annotated[int, "signed"]
# What names a user, or a version.
Label: TypeAlias = str | Signed | None

# What other languages read as an integer, too: 64 bits.
_LARGEST = (1 << 63) - 1


def parse(text: str) -> Any:
    """JSON as Python values.

    Raises:
        ValueError, RecursionError: when it is not JSON, an object has one name twice, or a number is NaN or infinite.
    """
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark; leave that out")
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant, parse_float=_finite)
    except ValueError as e:
        if "integer string conversion" in str(e):  # whose words name a setting of Python's
            raise ValueError("it holds an integer of thousands of digits") from e
        raise


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different: which of two counts is each reader's own choice."""
    if len(made := dict(pairs)) != len(pairs):
        raise ValueError(f"a name occurs twice among {', '.join(k for k, _ in pairs)[:80]}")
    return made


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text:.40} is too large for a number")
    return number


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def is_required(kind: Any, field_: str) -> bool:
    """Whether JSON must have a field of a class; None is a default that may be left out."""
    return getattr(kind, field_, ...) is not None


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a class's fields; to evaluate them takes longer than to read a request."""
    return typing.get_type_hints(kind, include_extras=True)


def as_type(kind: Any, raw: Any, where: str) -> Any:
    """`raw`, as JSON gave it, as the type a field is declared with; unknown and missing fields are errors.

    Raises:
        TypeError, ValueError: naming the place, which begins with `where`, and what was expected there.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return raw
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        values, hints = as_type(Mapping[str, Any], raw, where), _hints(kind)
        for field_ in hints:
            if field_ not in values and is_required(kind, field_):
                raise ValueError(f"{where} misses {field_!r}")
        if unknown := sorted(values.keys() - hints.keys()):
            raise ValueError(f"{where} has an unknown field {unknown[0]!r}")
        return kind(**{n: as_type(hints[n], v, f"{where}: {n}") for n, v in values.items()})
    if origin is Annotated and isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if origin in (types.UnionType, typing.Union):
        for choice in inner:
            with contextlib.suppress(TypeError, ValueError):
                return as_type(choice, raw, where)
    elif origin is Literal:
        if raw in inner:
            return raw
    elif origin is tuple and isinstance(raw, list | tuple):
        return tuple(as_type(inner[0], x, f"{where}[{i}]") for i, x in enumerate(raw))
    elif origin is collections.abc.Mapping and isinstance(raw, dict):
        return {k: as_type(inner[1], v, f"{where}[{k!r:.40}]") for k, v in raw.items()}
    elif kind is int and isinstance(raw, int) and not isinstance(raw, bool):
        if raw < 0:
            raise ValueError(f"{where} is {raw}; it cannot be negative")
        if raw > _LARGEST:
            raise ValueError(f"{where} is {raw!r:.60}; the largest is {_LARGEST}")
        return raw
    elif kind is float and isinstance(raw, int | float) and not isinstance(raw, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond any float
            if math.isfinite(number := float(raw)):
                return number
    elif kind in (str, bool, types.NoneType) and isinstance(raw, kind):
        return raw
    raise TypeError(f"{where} is {raw!r:.60}, expected {_said(kind)}")


def _said(kind: Any) -> str:
    """A type in words; of several, each but that of nothing."""
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(_said(k) for k in typing.get_args(kind) if k is not types.NoneType)
    words = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
    return words.get(kind) or str(getattr(kind, "__name__", kind))
