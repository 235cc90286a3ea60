"""Embedding tables stay out of the graphs while these are worked on, and large ones leave them for good.

A table is copied by no pass here. Its weight is hollow: a name, a type and a shape, its contents an array that is read
by slices. Until the graphs are finished a stand-in of some of its rows is in its place, looked up by the ids modulo its
rows: so every pass and proof has a whole and ordinary graph. The table comes back into what is asked for its limits
and, last, into the graphs; of one that leaves, in a file of the bundle by then, an input of rows replaces the look-up.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from stca.arrays import Array, Progress
from stca.errors import SplitError
from stca.export.analysis.cost import NominalSizes, any_sizes, without_weights
from stca.export.analysis.positions import position_tables
from stca.export.analysis.scope import STAND_IN, Dataflow, attribute, drop_unread, is_stand_in, label, stand_ins
from stca.export.passes.nodes import NewNodes, names_in
from stca.specs import Lookup, TableSpec
from stca.tables import write_table

# Tables of more bytes leave unless it is said otherwise.
DEFAULT_ABOVE: Final = 1 << 30
# A weight of fewer bytes stays, whatever was asked for: a file of its own would be no gain.
LEAST: Final = 1 << 16
# Weights of more bytes are kept out of the graphs while these are worked on: passes and proofs copy what is in them.
APART: Final = 1 << 20
_DTYPES: Final[Mapping[int, str]] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
_INTEGERS: Final = frozenset((TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, *(
    getattr(TensorProto, f"{sign}INT{bits}") for sign in ("", "U") for bits in (8, 16)
), TensorProto.UINT32, TensorProto.UINT64))  # fmt: skip
# Rows of a stand-in: primes, so that one is found to which the table's rows are not congruent by 1. Then no id stands
# for the same row as the id before the first, or as the last.
_STAND_INS: Final = (1009, 1013, 1019)
_ROWS_AT_ONCE: Final = 1 << 14


@dataclass
class Large:
    """Weights that are kept out of a model while it is read.

    Attributes:
        above: tables of more bytes leave the graphs; None for none.
        contents: by name.
    """

    above: int | None = None
    contents: dict[str, Array] = field(default_factory=dict)

    def takes(self, dtype: int, dims: Sequence[int]) -> bool:
        """Whether such a weight is kept out."""
        if dtype not in _DTYPES or len(dims) != 2:
            return False
        size = math.prod(dims) * helper.tensor_dtype_to_np_dtype(dtype).itemsize
        return size > APART or self.leaves(size)

    def leaves(self, size: int) -> bool:
        """Whether a table of so many bytes leaves the graphs, if it may."""
        return self.above is not None and size > max(self.above, LEAST)

    def hollow(self, tensor: TensorProto, contents: Array) -> None:
        """Keep a weight's contents, and leave its name, type and shape in the model."""
        self.contents[tensor.name] = contents
        bare = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        tensor.CopyFrom(bare)

    def hollow_external(self, model: onnx.ModelProto, home: Path) -> None:
        """Keep what a model file has in or beside it.

        Args:
            model: loaded without its external data.
            home: the file's directory.
        """
        for tensor in model.graph.initializer:
            if not self.takes(tensor.data_type, tensor.dims):
                continue
            if tensor.data_location != TensorProto.EXTERNAL:
                self.hollow(tensor, numpy_helper.to_array(tensor))
                continue
            place = external_data_helper.ExternalDataInfo(tensor)
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            shape = tuple(tensor.dims)
            self.hollow(tensor, np.memmap(home / place.location, dtype, "r", place.offset or 0, shape))


@dataclass(frozen=True)
class Left:
    """The tables that left a graph, for good or while it is worked on, and what was decided of each large weight.

    Attributes:
        tables: that left for good, in the order of the graph's weights.
        apart: contents of those that come back, by name.
        verdicts: `{"table", "bytes", "why"}`; `why` it stays, None for those that left.
    """

    tables: tuple[TableSpec, ...] = ()
    apart: Mapping[str, Array] = field(default_factory=dict)
    verdicts: tuple[Mapping[str, Any], ...] = ()


def leave(model: onnx.ModelProto, large: Large, folder: Path, progress: Progress) -> Left:
    """Put stand-ins in the place of tables, and write those that leave to `folder`; other weights are put back.

    Args:
        model: with hollow weights, its functions but the operator's inlined. Changed in place.
        large: their contents.

    Raises:
        SplitError: when a table has values that are not finite.
    """
    tables: list[TableSpec] = []
    apart: dict[str, Array] = {}
    verdicts: list[dict[str, Any]] = []
    why = _why_not(model, large.contents)
    for tensor in [t for t in model.graph.initializer if t.name in large.contents]:
        contents, reason = large.contents[tensor.name], why[tensor.name]
        size = math.prod(tensor.dims) * contents.dtype.itemsize
        leaves = large.leaves(size)
        if reason is not None:
            tensor.raw_data = np.ascontiguousarray(contents).tobytes()
        elif leaves:
            progress(f"table {tensor.name!r} leaves the graphs: {size:,} bytes")
            tables.append(_written(tensor, contents, folder, f"table_{len(tables)}"))
        else:
            apart[tensor.name] = contents
            for begin in range(0, len(contents), _ROWS_AT_ONCE):
                _require_finite(tensor.name, contents[begin : begin + _ROWS_AT_ONCE])
        if leaves and reason is not None:
            progress(f"table {tensor.name!r} stays in the graphs: {reason}")
        verdicts += [{"table": tensor.name, "bytes": size, "why": reason}] * leaves
    _stand_in(model, {n: large.contents[n] for n in (*apart, *(t.name for t in tables))})
    return Left(tuple(tables), apart, tuple(verdicts))


def with_mapped_tables(file: Path) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of a bundle, and its large tables: hollow in the model, and mapped, so that only rows are read."""
    model, large = onnx.load(file, load_external_data=False), Large()
    large.hollow_external(model, file.parent)
    why = _why_not(model, large.contents)
    for tensor in model.graph.initializer:
        if why.get(tensor.name):
            tensor.raw_data = np.ascontiguousarray(large.contents.pop(tensor.name)).tobytes()
    onnx.load_external_data_for_model(model, str(file.parent))
    return model, large.contents


def _why_not(model: onnx.ModelProto, names: Iterable[str]) -> dict[str, str | None]:
    """Of each weight, why it cannot leave; None where all that reads it are look-ups by ids that inputs give."""
    flow, graph = Dataflow(model.graph), model.graph
    types, places = _types(model), position_tables(model)
    outputs = {o.name for o in graph.output}
    found: dict[str, str | None] = {}
    for name in names:
        readers = [graph.node[i] for i in flow.readers.get(name, ())]
        found[name] = "nothing reads it" if not readers else None
        if name in outputs:
            found[name] = "it is an output"
        elif name in places:
            found[name] = "its rows are looked up by places in a history, and not by ids"
        for node in readers:
            if node.domain or node.op_type != "Gather" or node.input[0] != name or node.input[1] == name:
                found[name] = f"node {label(node)!r} ({node.op_type}) reads it otherwise than by a Gather of rows"
            elif attribute(node, "axis", 0) not in (0, -2):
                found[name] = f"node {label(node)!r} gathers its columns, not its rows"
            elif wrong := _no_ids(flow, types, node.input[1]):
                found[name] = f"the ids of node {label(node)!r} {wrong}"
    return found


def _no_ids(flow: Dataflow, types: Mapping[str, int], ids: str) -> str:
    """What is wrong with ids that integers of inputs and constants alone do not give; empty where nothing is."""
    nodes, leaves = flow.needed([ids])
    made = [n for i in sorted(nodes) for n in flow.graph.node[i].output if n]
    if not leaves - flow.constants:
        return "depend on no input"
    odd = next((n for n in (*sorted(leaves), *made) if types.get(n) not in _INTEGERS), None)
    if odd is None:
        return ""
    kind = helper.tensor_dtype_to_np_dtype(types[odd]).name if types.get(odd) else "of an unknown type"
    return f"are not made of integers alone: {odd!r} is {kind}"


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of values as far as inference knows them."""
    graph = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return types | {t.name: t.data_type for t in model.graph.initializer}


def _written(tensor: TensorProto, contents: Array, folder: Path, stem: str) -> TableSpec:
    """The table's file; pages of a mapped source are let go once they were read."""
    mapped = contents._mmap if isinstance(contents, np.memmap) and contents.mode == "r" else None  # type: ignore[attr-defined]

    def read(begin: int, end: int) -> Array:
        rows = np.array(contents[begin:end])
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)  # read-only and of a file: nothing is lost
        _require_finite(tensor.name, rows)
        return rows

    rows, width = tensor.dims
    return write_table(folder, stem, tensor.name, rows, width, _DTYPES[tensor.data_type], read)


def _require_finite(name: str, rows: Array) -> None:
    values = rows.astype(np.float32, copy=False)  # bfloat16 is not of numpy's own kinds
    if (np.isnan(values) | np.isposinf(values)).any():
        raise SplitError(f"weight {name!r} has NaN or infinite values; export an earlier step")


def _stand_in(model: onnx.ModelProto, contents: Mapping[str, Array]) -> None:
    """Put some rows in each table's place, and its ids modulo their number before each look-up, in place."""
    graph = model.graph
    sizes: dict[str, int] = {}
    for tensor in graph.initializer:
        if tensor.name in contents:
            whole = contents[tensor.name]
            sizes[tensor.name] = rows = next((n for n in _STAND_INS if len(whole) % n != 1), _STAND_INS[0])
            some = np.resize(np.array(whole[:rows]), (rows, whole.shape[1]))
            tensor.CopyFrom(numpy_helper.from_array(some, tensor.name))
    if not sizes:
        return
    types, new = _types(model), NewNodes(names_in(graph))
    moduli: dict[tuple[int, int], str] = {}
    for node in graph.node:
        table = node.input[0] if node.op_type == "Gather" else ""
        if table in sizes:
            kind = types[node.input[1]]
            key = (sizes[table], kind)
            if key not in moduli:
                dtype = helper.tensor_dtype_to_np_dtype(kind)
                moduli[key] = new.weight(f"{STAND_IN}_rows", np.array(sizes[table], dtype))
            # One for each look-up: a pass that moves one must not move another.
            node.input[1] = new.node("Mod", [node.input[1], moduli[key]], f"{node.output[0]}_id")
        new.nodes.append(node)
    kept = [v for v in graph.value_info if v.name not in sizes]  # an exporter may list weights there too
    del graph.node[:], graph.value_info[:]
    graph.value_info.extend(kept)
    graph.node.extend(new.nodes)
    graph.initializer.extend(new.weights)


@dataclass(frozen=True)
class WithRows:
    """A graph that takes rows.

    Attributes:
        model: with an input of rows for each table and its ids.
        lookups: which rows are looked up by which ids.
        ids: computes ids that are no inputs; None where all are.
    """

    model: onnx.ModelProto
    lookups: tuple[Lookup, ...]
    ids: onnx.ModelProto | None


def with_rows(model: onnx.ModelProto, tables: Sequence[TableSpec]) -> WithRows:
    """Let inputs of rows take the place of look-ups in stand-ins.

    Args:
        model: finished but for that. Not changed.
        tables: that left.

    Raises:
        SplitError: when a pass made something else of a stand-in.
    """
    known = {t.name: t for t in tables}
    done = onnx.ModelProto()
    done.CopyFrom(model)
    _take_true_ids(done.graph, known)
    flow, sizes = Dataflow(done.graph), NominalSizes(done, any_sizes(done.graph))
    new = NewNodes(names_in(done.graph))
    inputs: dict[tuple[str, str], onnx.ValueInfoProto] = {}
    lookups: list[Lookup] = []
    wanted: dict[str, Sequence[int | str]] = {}
    given = {i.name for i in done.graph.input}
    for node in done.graph.node:
        if not known.keys() & set(node.input):
            new.nodes.append(node)
            continue
        table, ids = known[node.input[0]], _origin(done.graph, flow, node.input[1])
        key = (table.name, ids)
        if key not in inputs:
            name = new.name(f"{table.name}_rows")
            dims = sizes.dims(node.output[0]) or ()
            shape = [f"{name}_{axis}" if n is None else n for axis, n in enumerate(dims)]
            inputs[key] = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            lookups.append(Lookup(name, table.name, ids))
            if ids not in given:
                wanted[ids] = shape[:-1]
        _read_rows(new, inputs[key].name, node.output[0], table.dtype)
    outside = _ids_graph(done, flow, wanted) if wanted else None
    del done.graph.node[:]
    done.graph.node.extend(new.nodes)
    done.graph.input.extend(inputs.values())
    drop_unread(done.graph)
    return WithRows(done, tuple(lookups), outside)


def put_back(model: onnx.ModelProto, contents: Mapping[str, Array]) -> None:
    """Let tables take the place of their stand-ins again, in place; their weights are hollow.

    Args:
        model: finished but for that.
        contents: of the tables, by name.

    Raises:
        SplitError: when a pass made something else of a stand-in.
    """
    made = stand_ins(model)
    _take_true_ids(model.graph, contents)
    for tensor in model.graph.initializer:
        if tensor.name in contents:
            tensor.CopyFrom(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=contents[tensor.name].shape))
    kept = [v for v in model.graph.value_info if v.name not in made]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    drop_unread(model.graph)


def _take_true_ids(graph: onnx.GraphProto, tables: Collection[str]) -> None:
    """Give look-ups in stand-ins the ids that there were before those were made to fit, in place.

    A pass may have moved the ids since: then all that moves them has the true ones.
    """
    flow = Dataflow(graph)
    for node in graph.node:
        if (table := next((n for n in node.input if n in tables), None)) is None:
            continue
        if node.op_type != "Gather" or node.input[1] == table or attribute(node, "axis", 0) not in (0, -2):
            raise SplitError(
                f"node {label(node)!r} ({node.op_type}) of the rewritten model reads the table {table!r} other than "
                "by a Gather of rows; pass --no-lift or CutOptions(free=False), which leave look-ups as they are"
            )
        made = [graph.node[i] for i in flow.needed([node.input[1]])[0]]
        for mod in filter(is_stand_in, made):
            for reader in (graph.node[i] for i in flow.readers[mod.output[0]]):
                reader.input[:] = [mod.input[0] if n == mod.output[0] else n for n in reader.input]


def _origin(graph: onnx.GraphProto, flow: Dataflow, ids: str) -> str:
    """The ids' first name: a half begins with copies of the state under the names of what it was made of."""
    while ids in flow.writer and graph.node[flow.writer[ids]].op_type == "Identity":
        ids = graph.node[flow.writer[ids]].input[0]
    return ids


def _read_rows(new: NewNodes, rows: str, made: str, dtype: str) -> None:
    """Make what the look-up made of its rows, in the table's own type."""
    kinds = {name: kind for kind, name in _DTYPES.items()}
    if dtype == "float32":
        new.node("Identity", [rows], made, exact=True)
    else:
        new.node("Cast", [rows], made, exact=True, to=kinds[dtype])


def _ids_graph(model: onnx.ModelProto, flow: Dataflow, ids: Mapping[str, Sequence[int | str]]) -> onnx.ModelProto:
    """What of a graph computes ids; `ids` has their shapes by name."""
    nodes, leaves = flow.needed(ids)
    types = _types(model)
    graph = model.graph
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, producer_name="stca")
    part.graph.name = "ids"
    part.graph.node.extend(graph.node[i] for i in sorted(nodes))
    part.graph.input.extend(v for v in graph.input if v.name in leaves)
    part.graph.initializer.extend(t for t in graph.initializer if t.name in leaves)
    part.graph.output.extend(helper.make_tensor_value_info(n, types[n], shape) for n, shape in ids.items())
    return part
