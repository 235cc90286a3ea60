"""Messages of gRPC as requests and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.message import DecodeError

from stca.arrays import Array
from stca.errors import RequestError
from stca.runtime.client_values import quoted
from stca.serve.errors import TooLargeError
from stca.serve.http_body import JSON_SHARE, MOST_TENSORS
from stca.serve.inference import InferRequest, InferResponse
from stca.serve.messages import message
from stca.serve.tensors import DATATYPES, from_bytes, from_values

# Where a datatype's values stand when they are not bytes.
_CONTENTS: Final[Mapping[str, str]] = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
}  # fmt: skip
# On the wire: the field of tensors as bytes, and fields of a message at most.
_RAW, _LENGTH_DELIMITED, _MOST_FIELDS = 7, 2, 1 << 13


def parsed(name: str, data: bytes) -> Any:
    """A message from its bytes.

    Raises:
        RequestError: when they are none.
    """
    try:
        return message(name).FromString(data)
    except DecodeError as e:
        raise RequestError(f"the message is no {name}") from e


def decoded(data: bytes, limit: int) -> tuple[str, str, InferRequest]:
    """The model, its version and the request of a `ModelInferRequest`.

    Args:
        data: the message.
        limit: most bytes of a message; what is not in `raw_input_contents` may be a part of it, as it grows in memory.

    Raises:
        RequestError, TooLargeError: naming what is not as it should be.
    """
    rest = _not_raw(data)
    if rest > limit // JSON_SHARE:
        raise TooLargeError(f"the message has {rest} bytes outside of raw_input_contents, the limit is "
                            f"{limit // JSON_SHARE}; send tensors there")  # fmt: skip
    asked = parsed("ModelInferRequest", data)
    raw = asked.raw_input_contents
    if raw and len(raw) != len(asked.inputs):
        raise RequestError(f"raw_input_contents: has {len(raw)} entries for {len(asked.inputs)} inputs")
    if len(asked.inputs) > MOST_TENSORS:
        raise RequestError(f"has {len(asked.inputs)} inputs, the limit is {MOST_TENSORS}")
    inputs: dict[str, Array] = {}
    for i, one in enumerate(asked.inputs):
        name = quoted(one.name)[1:-1]
        if one.name in inputs:
            raise RequestError(f"{name}: comes twice among the inputs")
        _refuse_parameters(name, one)
        inputs[one.name] = _tensor(name, one, raw[i] if raw else None)
    for output in asked.outputs:
        _refuse_parameters(f"output {quoted(output.name)}", output)
    request = InferRequest(inputs, tuple(o.name for o in asked.outputs), _parameters(asked), asked.id)
    return asked.model_name, asked.model_version, request


def _tensor(name: str, one: Any, raw: bytes | None) -> Array:
    given = [field.name for field, _ in one.contents.ListFields()]
    if raw is not None:
        if given:
            raise RequestError(f"{name}: has {given[0]} and raw_input_contents; send one of them")
        return from_bytes(name, one.datatype, one.shape, raw)
    field = _CONTENTS.get(one.datatype)
    if field is None:
        raise RequestError(f"{name}: {quoted(one.datatype)} is not taken as contents; send raw_input_contents")
    if given not in ([], [field]):
        raise RequestError(f"{name}: has {', '.join(given)}, {one.datatype} takes {field} alone")
    return from_values(name, one.datatype, one.shape, list(getattr(one.contents, field)))


def _parameters(asked: Any) -> dict[str, Any]:
    found = {}
    for name, value in asked.parameters.items():
        which = value.WhichOneof("parameter_choice")
        found[name] = None if which is None else getattr(value, which)
    return found


def _refuse_parameters(what: str, of: Any) -> None:
    if of.parameters:
        raise RequestError(f"{what}: has the parameter {quoted(min(of.parameters))}; leave it out")


def encoded(response: InferResponse) -> bytes:
    """An answer as a `ModelInferResponse`, its scores as bytes."""
    made = message("ModelInferResponse")(model_name=response.model, model_version=response.version, id=response.id)
    made.parameters["hit"].bool_param = response.hit
    for name, scores in response.outputs.items():
        made.outputs.add(name=name, datatype=DATATYPES[scores.dtype.name], shape=scores.shape)
        made.raw_output_contents.append(scores.astype(scores.dtype.newbyteorder("<"), copy=False).tobytes())
    data: bytes = made.SerializeToString()
    return data


def _not_raw(data: bytes) -> int:
    """Bytes of a message that are not tensors' bytes, found by its fields' lengths, before anything is made of it.

    Raises:
        RequestError: when its fields end elsewhere than it does, or are too many.
    """
    at = rest = fields = 0
    while at < len(data):
        tag, after = _varint(data, at)
        length, begin = _varint(data, after) if tag & 7 == _LENGTH_DELIMITED else (0, after)
        fields += 1
        if tag & 7 != _LENGTH_DELIMITED or length > len(data) - begin or fields > _MOST_FIELDS:
            raise RequestError("the message is no ModelInferRequest, or has too many fields")
        rest += begin - at + (0 if tag >> 3 == _RAW else length)
        at = begin + length
    return rest


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, at + i + 1
    raise RequestError("the message is no ModelInferRequest: it ends within a number")
