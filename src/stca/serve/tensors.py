"""Tensors of the Open Inference Protocol: datatypes, shapes that a client claims, values as bytes or as lists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from stca.arrays import Array
from stca.errors import RequestError
from stca.runtime.client_values import MOST_VALUES, array_of, odd_one, quoted

# The protocol's datatypes that a model's inputs and scores can have, as numpy's names.
DTYPES: Final[Mapping[str, str]] = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
DATATYPES: Final[Mapping[str, str]] = {dtype: name for name, dtype in DTYPES.items()} | {"bfloat16": "BF16"}
MOST_DIMS: Final = 16


def dtype_of(name: str, datatype: str) -> np.dtype[Any]:
    """The dtype of an input with this datatype.

    Raises:
        RequestError: when no input has it.
    """
    if datatype not in DTYPES:
        raise RequestError(f"{name}: datatype {quoted(datatype)} is not taken; use one of {', '.join(DTYPES)}")
    return np.dtype(DTYPES[datatype])


def checked_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """A shape that a client claims, and that can be one.

    Raises:
        RequestError: naming the dimension, or the product, and its limit.
    """
    if len(shape) > MOST_DIMS:
        raise RequestError(f"{name}: has {len(shape)} dimensions, the limit is {MOST_DIMS}")
    for size in shape:
        if type(size) is not int or not 0 <= size <= MOST_VALUES:
            wanted = f"a whole number from 0 to {MOST_VALUES}"
            raise RequestError(f"{name}: has a dimension of {quoted(size)}, expected {wanted}")
    if math.prod(shape) > MOST_VALUES:
        raise RequestError(f"{name}: has shape {list(shape)}, more than {MOST_VALUES} values; send fewer at once")
    return tuple(shape)


def from_bytes(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """A tensor whose values are little-endian bytes, read in place where they lie as numpy needs them.

    Args:
        name: of the input, for messages.
        datatype: the protocol's name.
        shape: as the client claims it.
        data: all of its bytes.

    Raises:
        RequestError: when shape and bytes do not fit each other.
    """
    dtype, shape = dtype_of(name, datatype).newbyteorder("<"), checked_shape(name, shape)
    wanted = math.prod(shape) * dtype.itemsize
    if len(data) != wanted:
        raise RequestError(f"{name}: has {len(data)} bytes, {datatype} {list(shape)} takes {wanted}")
    if not wanted:
        return np.empty(shape, dtype)
    if dtype.kind == "b" and np.frombuffer(data, np.uint8).max() > 1:
        raise RequestError(f"{name}: holds a BOOL that is neither 0 nor 1")
    found = np.frombuffer(data, dtype).reshape(shape)
    return found if found.flags.aligned else found.copy()


def from_values(name: str, datatype: str, shape: Sequence[int], values: Any) -> Array:
    """A tensor whose values are numbers, in one list or in nested ones.

    Args:
        name: of the input, for messages.
        datatype: the protocol's name.
        shape: as the client claims it.
        values: as JSON or a message of gRPC gave them.

    Raises:
        RequestError: when shape, datatype and values do not fit each other.
    """
    dtype, shape = dtype_of(name, datatype), checked_shape(name, shape)
    found = array_of(name, values)
    if found.size != math.prod(shape):
        raise RequestError(f"{name}: has {found.size} values, shape {list(shape)} takes {math.prod(shape)}")
    if not found.size:
        return np.empty(shape, dtype)
    kinds = {"b": "b", "f": "iuf"}.get(dtype.kind, "iu")
    if found.dtype.kind not in kinds:
        holds = odd_one(values, found, dtype.kind) or f"has values of {found.dtype!s:.40}"
        raise RequestError(f"{name}: {holds}, expected {datatype}")
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        if int(found.min()) < bounds.min or int(found.max()) > bounds.max:
            raise RequestError(f"{name}: holds values beyond {datatype}")
    with np.errstate(over="ignore"):  # what becomes infinite is refused at the door
        return found.reshape(shape).astype(dtype)
