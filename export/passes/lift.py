"""From a pointwise graph to a request-level one: one row for what is the user's, a row per target for the rest.

A pointwise graph has one batch axis, and a user's history is repeated in it for each target. Lifted, user and request
inputs keep that axis with size 1, target inputs and outputs have `N_t` there. What is computed from user and request
inputs alone is then computed once. Where it meets a target's value it is broadcast, if the operator does so, or
expanded to the targets there, at the latest place.

Sizes have no scope: in a pointwise graph the batch's size is the same wherever it was read, so a node whose values are
the user's is the user's even if its shape was read from a target. A size that counts rows is therefore made twice, for
one row and for the targets', each on demand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import onnx
from onnx import helper

from stca.errors import SplitError
from stca.export.analysis.operators import ELEMENTWISE, SIZES
from stca.export.analysis.rows import RowAxis, Rows
from stca.export.analysis.scope import Dataflow, Scope, label, reads, subgraphs
from stca.export.analysis.whose_rows import Marks, repeats_users, row_size, shares_rows
from stca.export.passes.nodes import NewNodes, names_in, rename, renamed
from stca.specs import TARGETS, TensorSpec

_ONE: Final = "_of_user"
_MANY: Final = "_per_target"
# These take the shape of their first input and broadcast the others to it alone.
_FIRST_DECIDES: Final = frozenset(("PRelu",))


@dataclass(frozen=True)
class Lifted:
    """A lifted graph and what was decided on the way.

    Attributes:
        model: the request-level graph.
        inputs: of it.
        rows: the symbolic size that counted rows.
        shared: whether users and targets shared that size; if not, the model itself repeated users for its targets.
        mixes: the first node of a target's that makes rows depend on one another, if any: a suspect and no proof.
        decisions: what was done with a node or an input, by its name.
    """

    model: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    rows: str
    shared: bool
    mixes: str | None
    decisions: Mapping[str, str]


def lift(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> Lifted | None:
    """Part the batch axis that users and targets share.

    Args:
        model: valid, weights inline, functions inlined but the operator's; not changed.
        inputs: of the graph, each with its scope.

    Returns:
        None where there is nothing to part: no target input has a symbolic first size, or nothing of the user has rows.

    Raises:
        SplitError: naming the node that cannot be lifted, and why.
    """
    size = row_size(inputs)
    if size is None or not (shares_rows(inputs) or repeats_users(model, inputs)):
        return None
    return _Lift(model, inputs, size).run()


class _Lift:
    def __init__(self, model: onnx.ModelProto, inputs: Sequence[TensorSpec], size: str) -> None:
        self.model, self.graph, self.inputs, self.size = model, model.graph, inputs, size
        self.marks = Marks(model.graph, {s.name: Scope.of(s.scope or "user") for s in inputs})
        self.rows = Rows(model, inputs, size)
        for spec in inputs:
            if spec.shape.count(size) > 1:
                raise SplitError(f"input {spec.name!r} has the batch's size {size} twice; it cannot be lifted")
            if size in spec.shape:
                self.rows.axis[spec.name] = RowAxis(spec.shape.index(size))
        self.flow = Dataflow(model.graph)
        self.made: dict[tuple[str, str], str] = {}  # (value, _ONE or _MANY, or what else) → its name in the new graph
        self.decisions: dict[str, str] = {}
        self.new = NewNodes(names_in(model.graph))
        self.outputs: list[onnx.ValueInfoProto] = []

    def run(self) -> Lifted:
        live, _ = self.flow.needed(o.name for o in self.graph.output)
        for i, node in enumerate(self.graph.node):
            if i in live and not self.marks.sizes.issuperset(n for n in node.output if n):
                self._emit(node)
        for value in self.graph.output:
            self._output(value)
        lifted = onnx.ModelProto()
        lifted.CopyFrom(self.model)
        graph = lifted.graph
        for field in (graph.node, graph.input, graph.output, graph.value_info):
            del field[:]
        graph.node.extend(self.new.nodes)
        graph.initializer.extend(self.new.weights)
        graph.output.extend(self.outputs)
        specs = tuple(self._spec(s) for s in self.inputs)
        types = {v.name: v.type.tensor_type.elem_type for v in self.graph.input}
        graph.input.extend(helper.make_tensor_value_info(s.name, types[s.name], s.shape) for s in specs)
        return Lifted(lifted, specs, self.size, shares_rows(self.inputs), self._mixes(live), self.decisions)

    def _mixes(self, live: set[int]) -> str | None:
        for i in sorted(live):
            node = self.graph.node[i]
            if self._scope(node) == Scope.TARGET and not self.rows.mixed.isdisjoint(node.output):
                return f"{label(node)!r} ({node.op_type})"
        return None

    def _spec(self, spec: TensorSpec) -> TensorSpec:
        if self.size not in spec.shape:
            return spec
        to: int | str = TARGETS if spec.scope == "target" else 1
        if to == 1:
            self.decisions[spec.name] = f"one row for all targets ({self.size} → 1)"
        return replace(spec, shape=tuple(to if n == self.size else n for n in spec.shape))

    # Nodes

    def _emit(self, node: onnx.NodeProto) -> None:
        """The node as it is, on inputs of as many rows as its scope has."""
        scope = self._scope(node)
        many = scope == Scope.TARGET
        if many:
            self._must_keep_rows(node)
        if many and node.op_type == "Einsum" and (copy := self._einsum(node)) is not None:
            self.new.nodes.append(copy)
            return
        names: dict[str, str] = {}
        for place, name in enumerate(reads(node)):
            names[name] = self._read(node, place, name, many)
        self.new.nodes.append(renamed(node, names))

    def _scope(self, node: onnx.NodeProto) -> Scope:
        return max((self.marks.of[n] for n in reads(node)), default=Scope.CONSTANT)

    def _must_keep_rows(self, node: onnx.NodeProto) -> None:
        for name in filter(None, node.output):
            if name in self.rows.why_not:
                bag = (
                    " (torch writes nn.EmbeddingBag so; `stca export --model` takes one of ids [batch, ids]: where it "
                    "has offsets, pad each bag's ids to one length and set padding_idx)"
                )
                raise SplitError(
                    f"node {label(node)!r} ({node.op_type}) does not keep the rows of the batch apart: "
                    f"{self.rows.why_not[name]}{bag if node.op_type == 'Loop' else ''}"
                )

    def _read(self, node: onnx.NodeProto, place: int, name: str, many: bool) -> str:
        """Under which name `node` reads a value: that of one row, or of the targets' rows where it needs those."""
        if name in self.marks.sizes:
            return self._sized(name, many)
        scope = self.marks.of[name]
        if not many or scope in (Scope.CONSTANT, Scope.TARGET):
            return name
        if name in self.rows.why_not:
            raise SplitError(
                f"node {label(node)!r} ({node.op_type}) needs a row of {name!r} for each target, but those cannot be "
                f"told apart: {self.rows.why_not[name]}"
            )
        if name not in self.rows.axis or self._broadcasts(node, place, name):
            return name
        return self._expanded(name, node)

    def _broadcasts(self, node: onnx.NodeProto, place: int, name: str) -> bool:
        """Whether the operator itself repeats the one row of `name` for each row of another input."""
        matmul = node.op_type == "MatMul"
        if node.domain or any(subgraphs(node)) or not (matmul or node.op_type in ELEMENTWISE):
            return False
        if node.op_type in _FIRST_DECIDES and place == 0:
            return False
        out = self._from_right(node.output[0])
        if out is None or self._from_right(name) != out or (matmul and out > -3):
            return False
        return any(self._has_many(n) and self._from_right(n) == out for n in node.input if n and n != name)

    def _has_many(self, name: str) -> bool:
        return name not in self.marks.sizes and self.marks.of[name] == Scope.TARGET and name in self.rows.axis

    def _from_right(self, name: str) -> int | None:
        """The axis that counts rows, as a negative number; None where it counts more than rows, or there is none."""
        found = self.rows.axis.get(name)
        return None if found is None or found.factor != 1 else found.axis - self._rank(name)

    def _rank(self, name: str) -> int:
        dims = self.rows.dims.get(name)
        return len(next(s.shape for s in self.inputs if s.name == name) if dims is None else dims)

    def _einsum(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """An Einsum of values of one row without their row's label: they are the same for each target."""
        equation = helper.get_attribute_value(node.attribute[0]).decode().replace(" ", "")
        left, arrow, out = equation.partition("->")
        terms = left.split(",")
        if not arrow or "." in equation or any(len(set(t)) < len(t) for t in (*terms, out)):
            return None
        rows = {t[self.rows.axis[n].axis] for t, n in zip(terms, node.input, strict=True) if self._has_many(n)}
        if len(rows) != 1 or not rows <= set(out):
            return None
        copy, dropped = onnx.NodeProto(), []
        copy.CopyFrom(node)
        for i, name in enumerate(node.input):
            found = self.rows.axis.get(name)
            if name in self.marks.sizes or self._has_many(name) or found is None:
                copy.input[i] = self._read(node, i, name, True)
            elif found.factor != 1 or terms[i][found.axis] not in rows:
                return None
            else:
                terms[i] = terms[i].replace(terms[i][found.axis], "")
                copy.input[i] = self.new.node("Squeeze", [name, self.new.integers([found.axis])], f"{name}_row")
                dropped.append(name)
        copy.attribute[0].s = f"{','.join(terms)}->{out}".encode()
        if dropped:
            self.decisions[label(node)] = f"takes {_listed(dropped)} without the axis of one row"
        return copy

    # Values of one row, for each target

    def _expanded(self, name: str, reader: onnx.NodeProto) -> str:
        """A user's or a request's value with a row for each target."""
        if (name, _MANY) not in self.made:
            if name in self.rows.counted and name in self.flow.writer:
                self.made[name, _MANY] = self._again(name)
            else:
                self.made[name, _MANY] = self._expand(name, self.rows.axis[name])
        self.decisions.setdefault(name, f"expanded to the targets, for {label(reader)} ({reader.op_type})")
        return self.made[name, _MANY]

    def _expand(self, name: str, rows: RowAxis) -> str:
        rank = self._rank(name)
        new = self.new.name(f"{name}{_MANY}")
        if rows.factor == 1:
            shape = self._around(rows.axis, rank, self._count())
            return self.new.node("Expand", [name, shape], new, exact=True)
        at = rows.axis + rows.inner
        parted = self.new.node("Unsqueeze", [name, self.new.integers([at])], f"{name}_parted")
        wide = self.new.node("Expand", [parted, self._around(at, rank + 1, self._count())], f"{name}_wide")
        shape = self.new.node("Shape", [name], f"{name}_shape")
        factor = self._around(rows.axis, rank, self._count())
        return self.new.node("Reshape", [wide, self.new.node("Mul", [shape, factor], f"{name}_rows")], new, exact=True)

    def _again(self, name: str) -> str:
        """Made again from expanded values: this value holds places in the batch, which copies would repeat."""
        node = self.graph.node[self.flow.writer[name]]
        names = {}
        for n in reads(node):
            if n in self.marks.sizes:
                names[n] = self._sized(n, True)
            else:
                names[n] = self._expanded(n, node) if n in self.rows.axis else n
        copy = renamed(node, names)
        for i, output in enumerate(copy.output):
            copy.output[i] = self.new.name(f"{output}{_MANY}")
            self.made[node.output[i], _MANY] = copy.output[i]
        copy.name = self.new.name(label(node)) if node.name else ""
        self.new.nodes.append(copy)
        return self.made[name, _MANY]

    def _around(self, axis: int, rank: int, count: str) -> str:
        """A shape of ones, with the number of targets at `axis`."""
        key = (f"{axis} of {rank}", "shape")
        if key not in self.made:
            parts = [self.new.integers([1] * axis)] * bool(axis) + [count]
            parts += [self.new.integers([1] * (rank - axis - 1))] * (rank - axis > 1)
            self.made[key] = self.new.node("Concat", parts, "targets_shape", axis=0) if rank > 1 else count
        return self.made[key]

    def _count(self) -> str:
        """The number of targets, of shape [1]."""
        if ("", "count") not in self.made:
            spec = next(s for s in self.inputs if s.scope == "target" and s.shape[:1] == (self.size,))
            self.made["", "count"] = self.new.node("Shape", [spec.name], "targets_count", start=0, end=1)
        return self.made["", "count"]

    # Sizes

    def _sized(self, name: str, many: bool) -> str:
        """A size for one row or for the targets' rows; one that does not count rows is the same for both."""
        if many and (name in self.rows.axis or name in self.rows.mixed or name in self.rows.why_not):
            return self._size_of(name, _MANY)
        try:
            return self._size_of(name, _ONE)
        except _Unknown as e:
            if not many:
                raise SplitError(str(e)) from e
        return self._size_of(name, _MANY)

    def _size_of(self, name: str, which: str) -> str:
        if name not in self.marks.sizes:
            return name
        if (name, which) not in self.made:
            node = self.graph.node[self.flow.writer[name]]
            if node.op_type in SIZES and not node.domain:
                self.made[name, which] = self._shape(node, which)
            else:
                copy = renamed(node, {n: self._size_of(n, which) for n in reads(node)})
                other = _MANY if which == _ONE else _ONE
                for i, output in enumerate(node.output):
                    copy.output[i] = output if (output, other) not in self.made else self.new.name(f"{output}{which}")
                    self.made[output, which] = copy.output[i]
                copy.name = node.name if copy.output[0] == node.output[0] else copy.output[0]
                self.new.nodes.append(copy)
        return self.made[name, which]

    def _shape(self, node: onnx.NodeProto, which: str) -> str:
        """The shape of a value as if it had one row, or the targets' rows, whichever it has."""
        source, output = node.input[0], node.output[0]
        other = _MANY if which == _ONE else _ONE
        new = output if (output, other) not in self.made else self.new.name(f"{output}{which}")
        if source in self.marks.sizes:
            return self._as_before(node, self._sized(source, which == _MANY), new)
        many = self.marks.of[source] == Scope.TARGET
        if many == (which == _MANY):
            return self._as_before(node, source, new)
        if source in self.rows.why_not:
            raise _Unknown(f"node {label(node)!r} reads the shape of {source!r}: {self.rows.why_not[source]}")
        if not many:
            if source not in self.rows.axis:
                return self._as_before(node, source, new)
            shape = self.new.node("Shape", [source], f"{source}_shape")
            factor = self._around(self.rows.axis[source].axis, self._rank(source), self._count())
            whole = self.new.node("Mul", [shape, factor], f"{source}_shape{_MANY}")
        else:
            whole = self._whole_shape(source, node)
        return self._cut(node, whole, new)

    def _as_before(self, node: onnx.NodeProto, source: str, new: str) -> str:
        copy = renamed(node, {node.input[0]: source})
        copy.output[0] = new
        copy.name = node.name if new == node.output[0] else new
        self.new.nodes.append(copy)
        return new

    def _cut(self, node: onnx.NodeProto, whole: str, new: str) -> str:
        """What a Shape or Size node makes of a whole shape."""
        if node.op_type == "Size":
            return self.new.node("ReduceProd", [whole], new, exact=True, keepdims=0)
        ends = {a.name: int(a.i) for a in node.attribute}
        rank = self._rank(node.input[0])
        start, end, _ = slice(ends.get("start"), ends.get("end")).indices(rank)
        return self.new.node("Slice", [whole, self.new.integers([start]), self.new.integers([end])], new, exact=True)

    def _whole_shape(self, source: str, node: onnx.NodeProto) -> str:
        """The shape that a target's value would have with one row, from sizes that do not depend on targets."""
        parts = []
        dims = self.rows.dims.get(source) or next(s.shape for s in self.inputs if s.name == source)
        rows = self.rows.axis.get(source)
        for axis, dim in enumerate(dims):
            if rows is not None and rows.axis == axis:
                parts.append(self.new.integers([rows.factor]))
            elif isinstance(dim, int):
                parts.append(self.new.integers([dim]))
            else:
                parts.append(self._input_size(dim, source, node))
        return self.new.node("Concat", parts, f"{source}_shape{_ONE}", axis=0) if parts else self.new.integers([])

    def _input_size(self, dim: str | None, source: str, node: onnx.NodeProto) -> str:
        spec = next((s for s in self.inputs if s.scope != "target" and dim in s.shape), None)
        if spec is None or dim is None:
            raise _Unknown(
                f"node {label(node)!r} gives a user's value a size of {source!r}, which depends on targets and is no "
                "size of a user input"
            )
        axis = spec.shape.index(dim)
        return self.new.node("Shape", [spec.name], f"{spec.name}_{dim}", start=axis, end=axis + 1)

    # Outputs, and what is new

    def _output(self, value: onnx.ValueInfoProto) -> None:
        name, kind = value.name, value.type.tensor_type.elem_type
        rows, dims = self.rows.axis.get(name), self.rows.dims.get(name) or ()
        if rows is None or rows.factor != 1:
            why = self.rows.why_not.get(name, "its shape does not grow with the batch")
            raise SplitError(f"output {name!r} has no row for each target: {why}")
        if name in self.marks.sizes or self.marks.of[name] != Scope.TARGET:
            one = self.new.name(f"{name}{_ONE}")
            for node in self.new.nodes:
                rename(node, {name: one})
                for i, output in enumerate(node.output):
                    node.output[i] = one if output == name else output
            self.new.node("Expand", [one, self._around(rows.axis, len(dims), self._count())], name, exact=True)
            self.decisions[name] = "the same for all targets, repeated"
        shape = [TARGETS if axis == rows.axis else dim for axis, dim in enumerate(dims)]
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))


class _Unknown(SplitError):
    """A size that cannot be made for the rows asked for."""


def _listed(names: Sequence[str]) -> str:
    return " and ".join(repr(n) for n in names)
