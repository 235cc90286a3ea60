"""Bodies of HTTP requests and answers: JSON, with tensors as numbers or as bytes behind it; and what headers tell."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any, Final

from stca import typed_json
from stca.arrays import Array
from stca.errors import RequestError
from stca.runtime.client_values import quoted
from stca.serve.errors import EncodingError, TooLargeError
from stca.serve.inference import InferRequest, InferResponse
from stca.serve.tensors import DATATYPES, from_bytes, from_values

# The length of the JSON in a body that goes on with bytes.
HEADER_LENGTH: Final = "Inference-Header-Content-Length"
# Milliseconds in which an answer is of use, told before the body is read.
DEADLINE: Final = "stca-deadline-ms"
_MILLISECONDS: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")
# JSON takes up to some twenty times its length in memory, and bytes none of it.
JSON_SHARE: Final = 4
MOST_TENSORS: Final = 1024


# The fields of a request, of its inputs and of its outputs, and what JSON makes of them; lists of numbers are long, so
# nothing here looks at each value.
_BODY: Final = {"inputs": list, "outputs": list, "parameters": dict, "id": str}
_INPUT: Final = {"name": str, "shape": list, "datatype": str, "data": object, "parameters": dict}
_OUTPUT: Final = {"name": str, "parameters": dict}


def seconds_left(given: str | None) -> float | None:
    """What the header `DEADLINE` says, in seconds; None where it is not sent.

    Raises:
        RequestError: when it is no such number.
    """
    if given is None:
        return None
    if not _MILLISECONDS.fullmatch(given):
        raise RequestError(f"{DEADLINE}: is {quoted(given)}, expected milliseconds, 0 or more")
    return float(given) / 1e3


def plain(body: bytes, encoding: str, limit: int) -> bytes:
    """A body as it was before the client compressed it.

    Args:
        body: as it arrived.
        encoding: what `Content-Encoding` says of it.
        limit: most bytes of the result.

    Raises:
        EncodingError, RequestError, TooLargeError: when the encoding is not taken, the body is not in it, or too large.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise EncodingError(f"Content-Encoding {quoted(encoding)} is not taken; use gzip, deflate or none")
    stream = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either kind, by its first bytes
    try:
        made = stream.decompress(body, limit + 1)
    except zlib.error as e:
        raise RequestError(f"the body is not {encoding} ({e})") from e
    if len(made) > limit:
        raise TooLargeError(f"the body has more than {limit} bytes when it is decompressed; send less at once")
    if not stream.eof or stream.unused_data:
        raise RequestError(f"the body is not one whole {encoding} stream")
    return made


def decoded(body: bytes, header_length: str | None, limit: int) -> InferRequest:
    """A request for scores, or for a change of a user's state, from a body.

    Args:
        body: JSON, and behind it bytes where `header_length` says how long the JSON is.
        header_length: the header `HEADER_LENGTH`; None where the body is JSON alone.
        limit: most bytes of the body; the JSON may have a part of it.

    Raises:
        RequestError, TooLargeError: naming what is not as it should be.
    """
    end = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdecimal()) or int(header_length[:20]) > len(body):
            raise RequestError(f"{HEADER_LENGTH}: is {quoted(header_length)}, the body has {len(body)} bytes")
        end = int(header_length)
    if end > limit // JSON_SHARE:
        raise TooLargeError(f"the JSON has {end} bytes, the limit is {limit // JSON_SHARE}; send tensors as bytes")
    try:
        raw = typed_json.parse(body[:end].decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise RequestError(f"the body is not JSON: {e}") from e
    inputs, outputs, given, id_ = _fields(raw, "the request", _BODY)
    given = dict(given or {})
    every = _flag(given.pop("binary_data_output", False), "parameters: binary_data_output")
    wanted: dict[str, bool] = {}
    for place, output in enumerate(_few(outputs, "outputs")):
        name, more = _fields(output, f"outputs[{place}]", _OUTPUT, required=1)
        if refused := (more or {}).keys() - {"binary_data"}:
            raise RequestError(f"output {quoted(name)}: has the parameter {quoted(min(refused))}; leave it out")
        wanted[name] = _flag((more or {}).get("binary_data", every), f"output {quoted(name)}: binary_data")
    binary = None if every and not wanted else frozenset(name for name, as_bytes in wanted.items() if as_bytes)
    return InferRequest(_tensors(inputs, memoryview(body)[end:]), tuple(wanted), given, id_ or "", binary)


def _fields(raw: Any, where: str, kinds: Mapping[str, type], required: int = 0) -> tuple[Any, ...]:
    """The values of a JSON object's fields in their order, None where one is left out; the first ones must be there."""
    if not isinstance(raw, dict):
        raise RequestError(f"{where}: is {quoted(type(raw).__name__)}, expected an object")
    if unknown := raw.keys() - kinds.keys():
        raise RequestError(f"{where}: has an unknown field {quoted(min(unknown))}; it takes {', '.join(kinds)}")
    for place, (name, kind) in enumerate(kinds.items()):
        value = raw.get(name)
        if value is None and place < required:
            raise RequestError(f"{where}: misses {name!r}")
        if value is not None and not isinstance(value, kind):
            raise RequestError(f"{where}: {name} is {quoted(type(value).__name__)}, expected {kind.__name__}")
    return tuple(map(raw.get, kinds))


def _flag(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{what} is {quoted(value)}, expected true or false")
    return value


def _few(raw: list[Any] | None, what: str) -> list[Any]:
    if len(found := raw or []) > MOST_TENSORS:
        raise RequestError(f"the request: has {len(found)} {what}, the limit is {MOST_TENSORS}")
    return found


def _tensors(inputs: list[Any] | None, data: memoryview) -> dict[str, Array]:
    made: dict[str, Array] = {}
    used = 0
    for place, one in enumerate(_few(inputs, "inputs")):
        name, shape, datatype, values, given = _fields(one, f"inputs[{place}]", _INPUT, required=3)
        said = quoted(name)[1:-1]
        if name in made:
            raise RequestError(f"{said}: comes twice among the inputs")
        if refused := (given or {}).keys() - {"binary_data_size"}:
            raise RequestError(f"{said}: has the parameter {quoted(min(refused))}; leave it out")
        size = (given or {}).get("binary_data_size")
        if (size is None) == (values is None):
            raise RequestError(f"{said}: needs either data or the parameter binary_data_size")
        if size is None:
            made[name] = from_values(said, datatype, shape, values)
            continue
        if type(size) is not int or not 0 <= size <= len(data) - used:
            raise RequestError(f"{said}: binary_data_size is {quoted(size)}, {len(data) - used} bytes are left")
        made[name] = from_bytes(said, datatype, shape, data[used : used + size])
        used += size
    if used != len(data):
        raise RequestError(f"the body goes on for {len(data) - used} bytes that belong to no input")
    return made


def encoded(response: InferResponse, binary: frozenset[str] | None) -> tuple[bytes, int | None]:
    """An answer's body, and the length of its JSON where bytes follow.

    Args:
        response: the scores.
        binary: outputs to send as bytes; None for all.
    """
    outputs, parts = [], []
    for name, scores in response.outputs.items():
        told: dict[str, Any] = {"name": name, "datatype": DATATYPES[scores.dtype.name], "shape": list(scores.shape)}
        if binary is None or name in binary:
            parts.append(scores.astype(scores.dtype.newbyteorder("<"), copy=False).tobytes())
            told["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            told["data"] = scores.ravel().tolist()
        outputs.append(told)
    head: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    head |= {"id": response.id} if response.id else {}
    text = json.dumps({**head, "parameters": {"hit": response.hit}, "outputs": outputs}).encode()
    return b"".join([text, *parts]), len(text) if parts else None
