"""Weights in 8 bits: embedding tables, in files and in graphs, and the matrices of products.

    step = largest magnitude of a row (a table's) or of a column (a matrix's) / levels
    kept = round(value / step)                     int8, or the nearest E4M3 number
    read = kept · step

A table in a file keeps its steps at the ends of its rows; the runtime multiplies. In a graph, a weight `NAME` becomes
`NAME_int8` and `NAME_scale`, both in the weights file, and standard operators make what was read of it before: `Gather`
takes rows of both, `DequantizeLinear` makes a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stca.arrays import Array
from stca.calibration.quantized_state import Kind, levels, onnx_type, require_opset
from stca.errors import UsageError
from stca.export.analysis.scope import Dataflow, attribute
from stca.export.passes.nodes import NewNodes, names_in
from stca.specs import TableSpec
from stca.tables import TableFile, write_table

# A table of fewer bytes stays: what it saves is not worth three nodes.
LEAST_TABLE: Final = 1 << 16
# Narrower rows would save little beside their scales.
_NARROWEST: Final = 8
_NUMPY: Final = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}


@dataclass(frozen=True)
class RowFormat:
    """An embedding table with a step for each row."""

    kind: Kind


def in_steps(values: Array, kind: Kind, axis: int | tuple[int, ...]) -> tuple[Array, Array]:
    """Weights as 8-bit numbers and their steps.

    Args:
        values: float32, finite.
        kind: of the numbers.
        axis: along which one step is shared, or several.

    Returns:
        The numbers, of the values' shape; the steps, float32, of size 1 along the axis. Zeros have a step of 0.
    """
    exact = values.astype(np.float64)
    steps = (np.abs(exact).max(axis, keepdims=True, initial=0.0) / levels(kind)).astype(np.float32)
    units = np.divide(exact, steps, out=np.zeros_like(exact), where=steps > 0)
    units = np.clip(units, -levels(kind), levels(kind))  # a step that was rounded down is a little too small
    return (np.rint(units) if kind == "int8" else units).astype(_NUMPY[kind]), steps


def quantizable_files(tables: Iterable[TableSpec]) -> tuple[str, ...]:
    """Names of the tables in files that can have rows of 8 bits."""
    return tuple(t.name for t in tables if t.dtype == "float32" and t.width >= _NARROWEST)


def write_rows(root: Path, table: TableSpec, kind: Kind, folder: Path) -> TableSpec:
    """Write a bundle's table with rows of 8 bits under its own file names.

    Args:
        root: directory of the bundle.
        table: float32.
        kind: of the new numbers.
        folder: where to.

    Raises:
        UsageError: when a row is not finite.
    """
    source = TableFile(root, table)

    def read(begin: int, end: int) -> Array:
        rows = source.rows(np.arange(begin, end))
        if not np.isfinite(rows).all():
            raise UsageError(f"table {table.name!r} has values that are not finite, which no step holds; leave it")
        numbers, steps = in_steps(rows, kind, 1)
        return np.concatenate([numbers.view(np.uint8), steps.astype("<f4").view(np.uint8)], axis=1)

    dtype = "int8" if kind == "int8" else "float8_e4m3fn"
    return write_table(folder, Path(table.file).stem, table.name, table.rows, table.width, dtype, read)


def quantizable_tables(models: Iterable[onnx.ModelProto]) -> tuple[str, ...]:
    """Names of the float32 weights that all graphs read by look-ups of rows alone, and that are worth it."""

    def fits(tensor: TensorProto, node: onnx.NodeProto) -> bool:
        large = len(tensor.dims) == 2 and tensor.dims[1] >= _NARROWEST and 4 * math.prod(tensor.dims) > LEAST_TABLE
        first = node.op_type == "Gather" and node.input[1] != tensor.name and attribute(node, "axis", 0) in (0, -2)
        return large and first

    good: dict[str, bool] = {}
    for model in models:
        flow, outputs = Dataflow(model.graph), {o.name for o in model.graph.output}
        for tensor in model.graph.initializer:
            readers = [model.graph.node[i] for i in flow.readers.get(tensor.name, ())]
            fine = tensor.data_type == TensorProto.FLOAT and tensor.name not in outputs
            fine = fine and all(not n.domain and tensor.name in n.input and fits(tensor, n) for n in readers)
            good[tensor.name] = good.get(tensor.name, True) and fine and bool(readers)
    return tuple(name for name, fine in good.items() if fine)


def quantize_tables(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Give embedding tables of a graph rows of int8, in place.

    Args:
        model: with its weights.
        names: of the tables, from `quantizable_tables`.

    Raises:
        StcaError: when the graph is of an ONNX version that is too old.
        UsageError: when a table has values that are not finite.
    """
    graph = model.graph
    kept = {t.name: replaced(graph, t, "int8", 1) for t in list(graph.initializer) if t.name in names}
    if not kept:
        return
    require_opset(model)
    new = NewNodes(names_in(graph))
    # A node, not an initializer: it is no weight of the model.
    one = new.node("Constant", [], "table_step", value=numpy_helper.from_array(np.array(1.0, np.float32)))
    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] not in kept:
            new.nodes.append(node)
            continue
        (numbers, scales), made = kept[node.input[0]], node.output[0]
        parts = [new.node("Gather", [source, node.input[1]], f"{made}_rows") for source in (numbers, scales)]
        units = new.node("DequantizeLinear", [parts[0], one], f"{made}_units")
        new.node("Mul", [units, parts[1]], made, exact=True)
    finish(graph, new, kept)


def replaced(
    graph: onnx.GraphProto, tensor: TensorProto, kind: Kind, axis: int | tuple[int, ...], *, flat: bool = False
) -> tuple[str, str]:
    """Put a weight's numbers and steps in its place; their names.

    Args:
        graph: which has the weight.
        tensor: the weight.
        kind, axis: as of `in_steps`.
        flat: whether the steps are a list, as `DequantizeLinear` takes them.

    Raises:
        UsageError: when the weight has values that are not finite, or the graph has such names.
    """
    values = numpy_helper.to_array(tensor)
    if not np.isfinite(values).all():
        raise UsageError(f"weight {tensor.name!r} has values that are not finite, which no step holds; leave it")
    numbers, steps = in_steps(values, kind, axis)
    steps = steps.reshape(-1) if flat else steps
    names = f"{tensor.name}_{kind}", f"{tensor.name}_scale"
    if clash := names_in(graph) & set(names):
        raise UsageError(f"weight {tensor.name!r}: the graph has a {min(clash)!r} already; rename it")
    made = helper.make_tensor(names[0], onnx_type(kind), values.shape, numbers.tobytes(), raw=True)
    graph.initializer.remove(tensor)
    graph.initializer.extend([made, numpy_helper.from_array(steps, names[1])])
    return names


def finish(graph: onnx.GraphProto, new: NewNodes, gone: Collection[str]) -> None:
    """Give a graph its new nodes and weights, in place; `gone` are the names of weights that it no longer has."""
    listed = [v for v in graph.value_info if v.name not in gone]  # an exporter may list weights there too
    del graph.node[:], graph.value_info[:]
    graph.node.extend(new.nodes)
    graph.value_info.extend(listed)
    graph.initializer.extend(new.weights)
