"""JSON Schema of a dataclass, by the types that `typed_json` reads it with."""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from typing import Any, Literal

from stca.typed_json import Signed, is_required

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_of(kind: Any, title: str) -> dict[str, Any]:
    """The schema of what `typed_json.as_type(kind, …)` takes; classes within it are in `$defs`.

    Raises:
        TypeError: when a field has a type that JSON cannot give.
    """
    known: dict[str, Any] = {}
    top = _schema(kind, known)
    name = top["$ref"].rsplit("/", 1)[1]
    return {"$schema": DIALECT, "title": title, **known.pop(name), **({"$defs": known} if known else {})}


def _schema(kind: Any, known: dict[str, Any]) -> dict[str, Any]:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    plain = {str: "string", bool: "boolean", float: "number", types.NoneType: "null"}
    if kind is Any:
        return {}
    if kind == Signed:
        return {"type": "integer"}
    if kind is int:  # `typed_json` takes no negative one: sizes, counts
        return {"type": "integer", "minimum": 0}
    if kind in plain:
        return {"type": plain[kind]}
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return _object(kind, known)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_schema(choice, known) for choice in inner]}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (tuple, collections.abc.Sequence, list):
        return {"type": "array", "items": _schema(inner[0], known)}
    if origin in (collections.abc.Mapping, dict):
        return {"type": "object", "additionalProperties": _schema(inner[1], known)}
    raise TypeError(f"{kind} has no JSON Schema")


def _object(kind: Any, known: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in known:
        known[name] = {}  # a class that holds itself refers to this
        hints = typing.get_type_hints(kind, include_extras=True)
        known[name] = {
            "description": (kind.__doc__ or "").strip().partition("\n")[0],
            "type": "object",
            "properties": {n: _schema(t, known) for n, t in hints.items()},
            "required": [n for n in hints if is_required(kind, n)],
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}
