"""One weights file for all graphs of a bundle: ONNX external data that points into a safetensors file.

The graphs then hold structure alone, the weights exist once on disk, and new weights are one new file.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import safetensors.torch
import torch
from onnx import TensorProto, external_data_helper

from stca.arrays import Array
from stca.errors import ExportError
from stca.manifest import WEIGHTS

_DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
# Numbers of weights that were quantized, where they are no single ones.
_QUANTIZED = {
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
}
# Integers are structure, but for tables of them: those of so many.
_INTEGERS = {TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32, TensorProto.INT16: torch.int16}
_TABLE = 1 << 10
# The key of a safetensors header that holds no tensor.
_RESERVED = "__metadata__"


def externalize(
    models: Iterable[onnx.ModelProto], directory: Path, contents: Mapping[str, Array] | None = None
) -> None:
    """Move the floating-point initializers of `models`, their matrices of 8 bits and tables of integers into
    `directory/weights.safetensors`, in place.

    An initializer of one name is one tensor, whichever graphs use it. Other integers stay in the graphs: they are
    structure.
    The file depends on names, dtypes, shapes and values alone, so equal weights have equal digests.

    Args:
        models: with their weights inline.
        directory: of the file.
        contents: of weights that are hollow in the models, by name.

    Raises:
        ExportError: when two graphs have different tensors of one name, or one has a name that cannot be saved.
    """
    tensors: dict[str, torch.Tensor] = {}
    uses: list[TensorProto] = []
    for model in models:
        for tensor in model.graph.initializer:
            kinds = _DTYPES | (_QUANTIZED if len(tensor.dims) > 1 else {})
            kinds |= _INTEGERS if math.prod(tensor.dims) >= _TABLE else {}
            dtype = kinds.get(tensor.data_type)
            if dtype is None or 0 in tensor.dims:  # runtimes refuse external data of no length
                continue
            if tensor.name == _RESERVED:
                raise ExportError(f"weight {_RESERVED!r} has a name that safetensors keeps for itself; give it another")
            uses.append(tensor)
            if contents and tensor.name in contents:
                tensors[tensor.name] = _shared(contents[tensor.name], dtype)
                continue
            data = onnx.numpy_helper.to_array(tensor).reshape(-1).view("u1").copy()
            weight = torch.empty(list(tensor.dims), dtype=dtype)
            _bytes(weight)[:] = torch.from_numpy(data)
            known = tensors.setdefault(tensor.name, weight)
            same = (known.dtype, known.shape) == (weight.dtype, weight.shape)
            if not same or not torch.equal(_bytes(known), _bytes(weight)):
                raise ExportError(f"weight {tensor.name!r} differs between graphs; give the two tensors two names")
    file = directory / WEIGHTS
    safetensors.torch.save_file(tensors, file)
    places = offsets(file)
    for tensor in uses:
        begin, end = places[tensor.name]
        tensor.ClearField("float_data")
        tensor.ClearField("int32_data")
        tensor.ClearField("double_data")
        tensor.raw_data = b""
        external_data_helper.set_external_data(tensor, WEIGHTS, offset=begin, length=end - begin)
        tensor.ClearField("raw_data")


def _shared(array: Array, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the array's own memory, which may be of a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may not be written to: nothing does
        return torch.from_numpy(np.ascontiguousarray(array).view("u1")).view(dtype)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def offsets(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file begins and ends, in bytes from the start of the file."""
    with file.open("rb") as f:
        header_bytes = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(header_bytes))
    start = 8 + header_bytes
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != _RESERVED
    }
