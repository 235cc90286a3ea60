"""Requests as JSON, as `stca score` reads them: one object, or a list of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stca import typed_json
from stca.errors import RequestError, said
from stca.json_schema import schema_of
from stca.manifest import Manifest
from stca.runtime.request import Request
from stca.specs import USERS, TensorSpec


@dataclass(frozen=True)
class JsonRequest:
    """One user and the targets to score for them; `stca.runtime.Request` says what each field means.

    Attributes:
        inputs: numbers, or lists of them, by the input's name.
        user: whose state may be kept and reused.
        version: which history this is.
    """

    inputs: Mapping[str, Any]
    user: typed_json.Label = None
    version: typed_json.Label = None


def read_requests(text: str) -> list[Request]:
    """Requests of a JSON text; their inputs are checked when they are scored.

    Raises:
        RequestError: when it is not JSON, or naming the request and the field that is not as it should be.
    """
    try:
        raw = typed_json.parse(text)
    except (ValueError, RecursionError) as e:
        raise RequestError(f"the requests are not JSON ({said(e)}); see `stca schema requests`") from e
    try:
        made = [
            typed_json.as_type(JsonRequest, one, f"request {i}")
            for i, one in enumerate(raw if isinstance(raw, list) else [raw])
        ]
    except (TypeError, ValueError) as e:
        raise RequestError(f"{e}; see `stca schema requests`") from e
    return [Request(one.inputs, one.user, one.version) for one in made]


def requests_schema(manifest: Manifest | None = None) -> dict[str, Any]:
    """JSON Schema of what `read_requests` takes; of one bundle's requests where its manifest is given."""
    one = schema_of(JsonRequest, "A request")
    if manifest is not None:
        specs = [s for s in manifest.graphs["request"].inputs if not s.is_offsets]
        events = {e.name: e for history in manifest.padding or () for e in history.inputs}
        made = {history.lengths for history in manifest.padding or ()}
        made |= {name for name, e in events.items() if e.event is not None}  # masks
        one["properties"]["inputs"] = {
            "type": "object",
            "properties": {s.name: _input(s, events[s.name].axis if s.name in events else None) for s in specs},
            # A user whose state is kept, and has a version, need not send the user inputs again.
            "required": [s.name for s in specs if s.scope != "user" and s.name not in made],
            "additionalProperties": False,
        }
    dialect, title = one.pop("$schema"), "Requests of stca score"
    return {"$schema": dialect, "title": title, "anyOf": [one, {"type": "array", "items": one}]}


def _input(spec: TensorSpec, events: int | None) -> dict[str, Any]:
    """Lists as deep as an input's shape. The axis `events` is as long as it was sent; one of 1 may be left out."""
    kinds = {"f": "number", "b": "boolean"}
    value: dict[str, Any] = {"type": kinds.get(spec.dtype[0], "integer")}
    if value["type"] == "integer" and (spec.limit or spec.low is not None):
        value["minimum"] = spec.low or 0
        value |= {"maximum": spec.limit - 1} if spec.limit else {}
    elif spec.low is not None:
        value["minimum"] = spec.low
    for axis, size in reversed(list(enumerate(spec.shape))):
        least = {"minItems": size} if isinstance(size, int) and axis != events else {}
        most = {"maxItems": size} if isinstance(size, int) else {}
        value = {"type": "array", "items": value, **least, **most}
    may_drop = bool(spec.shape) and (spec.shape[0] in (1, USERS)) and events != 0
    return {"anyOf": [value, value["items"]]} if may_drop else value
