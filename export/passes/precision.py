"""A float32 graph as a typed bfloat16 or float16 graph, for engines that compute what the graph says and nothing else.

Weights and activations get the low precision; what would lose more than a rounding stays in float32, with casts around:

* normalizations keep their float32 stash; exponentials, softmax, powers and squares compute in float32, and integers
  become float32: a gap in seconds is beyond float16;
* what is done next with such a value, sums, roots, divisions and rounding, stays in float32 as long as its other
  operands are constants or float32 too. Together with a low value it is computed in float32 and the result is low, as
  in `x / sqrt(mean(x²) + eps)`. Products of matrices are always low: a value beyond float16 becomes infinite there;
* the score head, from the last matrix product to the output, computes in float32: a probability in bfloat16 has
  steps of 1/256 near 1, and the best targets would tie;
* inputs and outputs keep their type, except the user state, which has the low precision in both halves. That halves
  the state's bytes, and it means that the two halves' engines must have the same precision.

A constant stays float32 for those nodes. Elsewhere it must fit: one beyond float16, or a scalar of which float16 leaves
no digit, is an error. Scalars that mean "minus a lot", as masks have them, become the lowest finite number instead.

Integers, and the bucket and segment arithmetic done with them, are not touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, numpy_helper

from stca.errors import ExportError
from stca.export.analysis import operators
from stca.export.analysis.cost import NominalSizes, any_sizes
from stca.export.analysis.scope import Dataflow, label, reads, subgraphs
from stca.plugins.spec import ARGUMENTS, DOMAIN, OP_NAME

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: Final[Mapping[Precision, int]] = {
    "fp32": TensorProto.FLOAT,
    "bf16": TensorProto.BFLOAT16,
    "fp16": TensorProto.FLOAT16,
}
_NUMPY: Final[Mapping[int, Any]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    TensorProto.FLOAT16: np.float16,
}
_COUNTS = {
    TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
    TensorProto.DOUBLE,
}  # fmt: skip
_MINUS_A_LOT = -1e6
_SUMS = {"Add", "Sub", "Where"}
_LOWEST: Final[Mapping[int, float]] = {
    TensorProto.FLOAT: -3.4028235e38,
    TensorProto.BFLOAT16: -3.3895314e38,
    TensorProto.FLOAT16: -65504.0,
}


def to_precision(
    model: onnx.ModelProto,
    precision: Precision,
    state: Collection[str],
    weights: Mapping[str, NDArray[Any]] = MappingProxyType({}),
) -> onnx.ModelProto:
    """A copy of `model` that computes in `precision`.

    Args:
        model: float32; its large weights may be left out (external data is not read). A weight's type changes here, its
            contents only when they are inside the model: `cast_weight` converts the rest.
        precision: fp32 gives an unchanged copy.
        state: names of the inputs and outputs that carry the user state.
        weights: contents of weights that are left out, by name; only looked at, where the graph itself casts one.

    Raises:
        ExportError: when a value's type cannot be inferred, or a constant or weight does not fit; see `cast_weight`.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if precision != "fp32":
        _Conversion(copy, PRECISIONS[precision], state, weights).run()
    return copy


def cast_weight(name: str, values: NDArray[Any], element_type: int) -> NDArray[Any]:
    """A weight's contents in the type `to_precision` gave it; unchanged when it has that type.

    A single value at or below -1e6 is taken for "minus a lot" and becomes at least the type's lowest finite number.

    Raises:
        ExportError: when a finite value would become infinite, or a single value would be off by a tenth or more: an
            epsilon that becomes 0.
    """
    wanted = _NUMPY.get(element_type)
    if wanted is None or values.dtype == wanted:
        return values
    if values.size == 1 and (values <= _MINUS_A_LOT).all() and np.isfinite(values).all():
        values = np.maximum(values, _LOWEST[element_type])
    with np.errstate(over="ignore"):
        cast = values.astype(wanted)
    other = f"{np.dtype(wanted).name}; use {'bf16' if element_type == TensorProto.FLOAT16 else 'fp32'}"
    lost = np.isfinite(values) & ~np.isfinite(cast)
    if lost.any():
        raise ExportError(f"weight {name!r} reaches {float(np.abs(values[lost]).max()):.3g}, beyond {other}")
    if values.size == 1 and np.isfinite(values).all() and abs(cast.item() - values.item()) > abs(values.item()) / 10:
        raise ExportError(f"constant {name!r} is {float(values.item()):.3g}, too small for {other}")
    return cast


class _Conversion:
    """One conversion in place. A float value is `wide` (float32) or low; casts go in where a reader wants the other."""

    def __init__(
        self, model: onnx.ModelProto, low: int, state: Collection[str], weights: Mapping[str, NDArray[Any]]
    ) -> None:
        self.graph, self.low = model.graph, low
        self.flow = Dataflow(model.graph)
        self.constants = {t.name: t for t in model.graph.initializer} | {
            node.output[0]: tensor for node in model.graph.node if (tensor := _constant(node)) is not None
        }
        self.contents = weights
        self.type_of = NominalSizes(model, any_sizes(model.graph)).element_type
        self.outputs = {o.name for o in self.graph.output}
        self.keep = {t.name for t in (*self.graph.input, *self.graph.output)} - set(state)
        self.wide_nodes, self.narrowed = self._wide_nodes()
        self.wide = set(self.keep)
        self.casts: dict[tuple[str, int], str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def is_float(self, name: str) -> bool:
        return self.type_of(name) == TensorProto.FLOAT

    def run(self) -> None:
        graph = self.graph
        self.wide.update(name for i in self.wide_nodes for name in graph.node[i].input if name in self.constants)
        for tensor in graph.initializer:
            if tensor.name not in self.wide:
                _narrow(tensor, self.low, tensor.name)
        for i, node in enumerate(graph.node):
            self._convert(node, TensorProto.FLOAT if i in self.wide_nodes else self.low, i in self.narrowed)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        for value in (*graph.input, *graph.output):
            if value.name not in self.keep and value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = self.low

    def _convert(self, node: onnx.NodeProto, kind: int, narrowed: bool) -> None:
        captured = [
            name for name in reads(node) if name not in node.input and name in self.wide and self.is_float(name)
        ]
        if captured:
            raise ExportError(
                f"node {label(node)!r} reads float32 value {captured[0]!r} inside its body; pass it as input"
            )
        for i, name in enumerate(node.input):
            if name and self.is_float(name):
                node.input[i] = self._as(name, TensorProto.FLOAT if _is_logits(node, i) else kind)
        if kind == self.low:
            _narrow_attributes(node, self.low)
        made = _as_products(node) if kind == TensorProto.BFLOAT16 and node.op_type == "Einsum" else [node]
        self.nodes.extend(made)
        node = made[-1]
        for i, name in enumerate(node.output):
            if name and self.type_of(name) == TensorProto.UNDEFINED:
                raise ExportError(
                    f"the type of {name!r} (node {label(node)!r}) cannot be inferred; declare it in the model"
                )
            if not self.is_float(name):
                continue
            if name not in self.outputs and not narrowed:
                self.wide.update([name] if kind == TensorProto.FLOAT else [])
            elif (declared := TensorProto.FLOAT if name in self.wide else self.low) != kind:
                computed = node.output[i] = self.casts[name, kind] = f"{name}_computed"
                if narrowed and node.op_type in _SUMS:
                    self.nodes.append(onnx.helper.make_node("Max", [computed, self._lowest()], [f"{name}_finite"]))
                    computed = f"{name}_finite"
                self.nodes.append(onnx.helper.make_node("Cast", [computed], [name], to=declared))

    def _as(self, name: str, kind: int) -> str:
        """The name of `name` as a value of type `kind`."""
        if (TensorProto.FLOAT if name in self.wide else self.low) == kind:
            return name
        if (name, kind) not in self.casts:
            if kind == self.low and name in self.constants:
                self._check(name)
            cast = self.casts[name, kind] = f"{name}_{'wide' if kind == TensorProto.FLOAT else 'low'}"
            self.nodes.append(onnx.helper.make_node("Cast", [name], [cast], to=kind))
        return self.casts[name, kind]

    def _lowest(self) -> str:
        """The name of the lowest finite number, float32: a score plus a mask's "minus a lot" must stay finite too."""
        name = "stca.lowest_finite"
        if all(t.name != name for t in self.graph.initializer):
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(_LOWEST[self.low], np.float32), name))
        return name

    def _check(self, name: str) -> None:
        """Refuse a constant that the graph casts, as it has readers of both kinds, when it does not fit."""
        tensor = self.constants[name]
        values = numpy_helper.to_array(tensor) if _has_contents(tensor) else self.contents.get(name)
        if values is not None:
            cast_weight(name, values, self.low)

    def _wide_nodes(self) -> tuple[set[int], set[int]]:
        """Nodes that compute in float32, and those of them whose result is low."""
        nodes = self.graph.node
        wide = {i for i, node in enumerate(nodes) if self._is_wide(node)}
        narrowed, values = set[int](), set[str]()
        for i, node in enumerate(nodes):
            floats = [name for name in node.input if self.is_float(name) and name not in self.constants]
            if (
                i not in wide
                and node.op_type in operators.SPREADS_FLOAT32
                and not node.domain
                and not values.isdisjoint(floats)
            ):
                if values.issuperset(floats):
                    wide.add(i)
                elif node.op_type in operators.ARITHMETIC:
                    wide.add(i)
                    narrowed.add(i)
            if i in wide and i not in narrowed:
                values.update(node.output)
        head = self._head()
        wide |= head
        used = {name for i in wide for name in nodes[i].input}
        wide |= {i for i, node in enumerate(nodes) if _constant(node) is not None and node.output[0] in used}
        return wide, narrowed - head

    def _is_wide(self, node: onnx.NodeProto) -> bool:
        """Whether a node computes in float32 whatever it is given."""
        if node.domain:
            return False
        if node.op_type in ("Cast", "CastLike"):
            return self.is_float(node.output[0]) and self.type_of(node.input[0]) in _COUNTS
        if node.op_type == "Mul":
            return bool(node.input[0] == node.input[1])
        if node.op_type == "Einsum":
            return self.low == TensorProto.BFLOAT16 and _terms(node) is None
        return node.op_type in operators.WIDE_RANGE

    def _head(self) -> set[int]:
        """Nodes from the last matrix product to an output."""
        nodes = self.graph.node
        pending = [o.name for o in self.graph.output if o.name in self.keep]
        head: set[int] = set()
        while pending:
            i = self.flow.writer.get(pending.pop(), -1)
            if i < 0 or i in head or nodes[i].domain or not any(map(self.is_float, nodes[i].output)):
                continue
            if nodes[i].op_type in operators.HEAD | {"MatMul", "Gemm"}:
                head.add(i)
                pending.extend(nodes[i].input if nodes[i].op_type in operators.HEAD else ())
        return head


def _is_logits(node: onnx.NodeProto, i: int) -> bool:
    """Whether an input of the operator is float32 whatever the others are."""
    return (node.domain, node.op_type) == (DOMAIN, OP_NAME) and ARGUMENTS[i].kind == "logits"


def _terms(node: onnx.NodeProto) -> tuple[str, str, str] | None:
    """Labels `(left, right, out)` of an Einsum that is one matrix product per batch; None for any other."""
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
    terms, arrow, out = equation.partition("->")
    left, _, right = terms.partition(",")
    if not arrow or len(node.input) != 2 or "," in right or not (left + right + out).isalpha():
        return None
    groups = [set(left) & set(right) - set(out), set(left) - set(right), set(right) - set(left)]
    plain = all(len(set(term)) == len(term) for term in (left, right, out)) and set(out) <= set(left + right)
    kept = groups[1] | groups[2] <= set(out)
    return (left, right, out) if plain and kept and all(len(group) == 1 for group in groups) else None


def _as_products(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """An Einsum as Transposes and a MatMul: ONNX has no Einsum in bfloat16."""
    terms = _terms(node)
    assert terms is not None
    left, right, out = terms
    (summed,), (rows,), (columns,) = set(left) & set(right) - set(out), set(left) - set(right), set(right) - set(left)
    batch = "".join(label for label in out if label in left and label in right)
    name = node.output[0]

    def transpose(value: str, source: str, target: str, result: str) -> onnx.NodeProto:
        perm = [source.index(label) for label in target]
        return onnx.helper.make_node("Transpose", [value], [result], name=f"{node.name}_{result}", perm=perm)

    return [
        transpose(node.input[0], left, batch + rows + summed, f"{name}_left"),
        transpose(node.input[1], right, batch + summed + columns, f"{name}_right"),
        onnx.helper.make_node("MatMul", [f"{name}_left", f"{name}_right"], [f"{name}_product"], name=node.name),
        transpose(f"{name}_product", batch + rows + columns, out, name),
    ]


def _constant(node: onnx.NodeProto) -> TensorProto | None:
    """What a Constant node holds when that is floats."""
    if node.op_type != "Constant" or node.domain:
        return None
    (attribute,) = node.attribute
    if attribute.name in ("value_float", "value_floats"):
        values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
        return numpy_helper.from_array(np.asarray(values, dtype=np.float32))
    floats = attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT
    return attribute.t if floats else None


def _narrow_attributes(node: onnx.NodeProto, low: int) -> None:
    """Constants and casts inside a node that computes in the low precision, bodies of control flow included."""
    if node.domain == DOMAIN:
        return  # the operator follows the type of its inputs, and computes in float32 inside
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            _narrow(attribute.t, low, label(node))
        elif (node.op_type, attribute.name) in (("Cast", "to"), ("EyeLike", "dtype")):
            attribute.i = low if attribute.i == TensorProto.FLOAT else attribute.i
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            tensor = _constant(node)
            assert tensor is not None
            _narrow(tensor, low, label(node))
            attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
    for body in subgraphs(node):
        for tensor in body.initializer:
            _narrow(tensor, low, tensor.name)
        for inner in body.node:
            _narrow_attributes(inner, low)


def _narrow(tensor: TensorProto, low: int, name: str) -> None:
    """Give a float32 tensor the type `low`, and its contents too where they are in the model."""
    if tensor.data_type != TensorProto.FLOAT:
        return
    if _has_contents(tensor):
        cast = cast_weight(name, numpy_helper.to_array(tensor), low)
        tensor.CopyFrom(numpy_helper.from_array(cast, tensor.name))
    else:
        tensor.data_type = low


def _has_contents(tensor: TensorProto) -> bool:
    return tensor.data_location != TensorProto.EXTERNAL and bool(tensor.raw_data or tensor.float_data)
