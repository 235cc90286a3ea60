"""A float32 graph as a typed bfloat16 or float16 graph, for engines that compute what the graph says and nothing else.

Weights and activations get the low precision; what would lose more than a rounding stays in float32, with casts around:

* normalizations keep their float32 stash, softmax and other exponentials compute in float32;
* the score head, from the last matrix product to the output, computes in float32: a probability in bfloat16 has
  steps of 1/256 near 1, and the best targets would tie;
* inputs and outputs keep their type, except the user state, which has the low precision in both halves. That halves
  the state's bytes, and it means that the two halves' engines must have the same precision.

Integers, and the bucket and segment arithmetic done with them, are not touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, numpy_helper

from stca.errors import ExportError
from stca.export.cost import Sizes
from stca.export.scope import label, reads, subgraphs
from stca.plugins.spec import DOMAIN

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
# Exponentials and squares: their range, not their rounding, is what float16 lacks.
_WIDE = {"Softmax", "LogSoftmax", "Exp", "Log", "Pow", "ReduceL2", "ReduceLogSumExp", "ReduceSumSquare", "Resize"}
# What may lie between the last matrix product and an output.
_HEAD = {
    "Add", "Sub", "Mul", "Div", "Neg", "Sigmoid", "Tanh", "Softmax", "LogSoftmax", "Clip", "Identity", "Reshape",
    "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Concat", "Split", "Slice",
}  # fmt: skip
_PRODUCT = {"MatMul", "Gemm"}


def to_precision(model: onnx.ModelProto, precision: Precision, state: Collection[str]) -> onnx.ModelProto:
    """A copy of `model` that computes in `precision`.

    Args:
        model: float32; its large weights may be left out (external data is not read). A weight's type changes here, its
            contents only when they are inside the model: `cast_weight` converts the rest.
        precision: fp32 gives an unchanged copy.
        state: names of the inputs and outputs that carry the user state.

    Raises:
        ExportError: when a value's type cannot be inferred, or a constant or weight is beyond float16.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if precision != "fp32":
        _Conversion(copy, PRECISIONS[precision], state).run()
    return copy


def cast_weight(name: str, values: NDArray[Any], element_type: int) -> NDArray[Any]:
    """A weight's contents in the type `to_precision` gave it; unchanged when it has that type.

    Raises:
        ExportError: when a finite value would become infinite.
    """
    wanted = _NUMPY.get(element_type)
    if wanted is None or values.dtype == wanted:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(wanted)
    if element_type == TensorProto.FLOAT16 and np.isinf(cast).any() and np.isfinite(values).all():
        raise ExportError(f"weight {name!r} reaches {float(np.abs(values).max()):.3g}, beyond float16; use bf16")
    return cast


class _Conversion:
    """One conversion in place. A float value is `wide` (float32) or low; casts go in where a reader wants the other."""

    def __init__(self, model: onnx.ModelProto, low: int, state: Collection[str]) -> None:
        self.graph, self.low = model.graph, low
        self.type_of = Sizes(model, any_sizes(model.graph)).element_type
        self.outputs = {o.name for o in self.graph.output}
        self.keep = {t.name for t in (*self.graph.input, *self.graph.output)} - set(state)
        self.wide_nodes = self._wide_nodes()
        self.wide = set(self.keep)
        self.casts: dict[tuple[str, int], str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def is_float(self, name: str) -> bool:
        return self.type_of(name) == TensorProto.FLOAT

    def run(self) -> None:
        graph = self.graph
        self.wide.update(name for i in self.wide_nodes for name in graph.node[i].input if name in _weights(graph))
        for tensor in graph.initializer:
            if tensor.name not in self.wide:
                _narrow(tensor, self.low)
        for i, node in enumerate(graph.node):
            self._convert(node, TensorProto.FLOAT if i in self.wide_nodes else self.low)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        for value in (*graph.input, *graph.output):
            if value.name not in self.keep and value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = self.low

    def _convert(self, node: onnx.NodeProto, kind: int) -> None:
        captured = [
            name for name in reads(node) if name not in node.input and name in self.wide and self.is_float(name)
        ]
        if captured:
            raise ExportError(
                f"node {label(node)!r} reads float32 value {captured[0]!r} inside its body; pass it as input"
            )
        for i, name in enumerate(node.input):
            if name and self.is_float(name):
                node.input[i] = self._as(name, kind)
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
            if name not in self.outputs:
                self.wide.update([name] if kind == TensorProto.FLOAT else [])
            elif (declared := TensorProto.FLOAT if name in self.wide else self.low) != kind:
                node.output[i] = self.casts[name, kind] = f"{name}_computed"
                self.nodes.append(onnx.helper.make_node("Cast", [node.output[i]], [name], to=declared))

    def _as(self, name: str, kind: int) -> str:
        """The name of `name` as a value of type `kind`."""
        if (TensorProto.FLOAT if name in self.wide else self.low) == kind:
            return name
        if (name, kind) not in self.casts:
            cast = self.casts[name, kind] = f"{name}_{'wide' if kind == TensorProto.FLOAT else 'low'}"
            self.nodes.append(onnx.helper.make_node("Cast", [name], [cast], to=kind))
        return self.casts[name, kind]

    def _wide_nodes(self) -> set[int]:
        nodes = self.graph.node
        wide = {i for i, node in enumerate(nodes) if node.op_type in _WIDE and not node.domain}
        if self.low == TensorProto.BFLOAT16:
            wide |= {i for i, node in enumerate(nodes) if node.op_type == "Einsum" and not _terms(node)}
        writer = {name: i for i, node in enumerate(nodes) for name in node.output}
        pending = [o.name for o in self.graph.output if o.name in self.keep]
        head: set[int] = set()
        while pending:
            i = writer.get(pending.pop(), -1)
            if i < 0 or i in head or nodes[i].domain or not any(map(self.is_float, nodes[i].output)):
                continue
            if nodes[i].op_type in _HEAD | _PRODUCT:
                head.add(i)
                pending.extend(nodes[i].input if nodes[i].op_type in _HEAD else ())
        return wide | head


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


def _weights(graph: onnx.GraphProto) -> set[str]:
    return {t.name for t in graph.initializer}


def _narrow_attributes(node: onnx.NodeProto, low: int) -> None:
    """Constants and casts inside a node that computes in the low precision, bodies of control flow included."""
    if node.domain == DOMAIN:
        return  # the operator follows the type of its inputs, and computes in float32 inside
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            _narrow(attribute.t, low)
        elif (node.op_type, attribute.name) in (("Cast", "to"), ("EyeLike", "dtype")):
            attribute.i = low if attribute.i == TensorProto.FLOAT else attribute.i
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            tensor = numpy_helper.from_array(np.asarray(values, dtype=np.float32))
            _narrow(tensor, low)
            attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
    for body in subgraphs(node):
        for tensor in body.initializer:
            _narrow(tensor, low)
        for inner in body.node:
            _narrow_attributes(inner, low)


def _narrow(tensor: TensorProto, low: int) -> None:
    """Give a float32 tensor the type `low`, and its contents too where they are in the model."""
    if tensor.data_type != TensorProto.FLOAT:
        return
    if tensor.data_location == TensorProto.EXTERNAL or not (tensor.raw_data or tensor.float_data):
        tensor.data_type = low
        return
    values = numpy_helper.to_array(tensor)
    if low == TensorProto.FLOAT16 and values.size == 1 and np.isfinite(values).all():
        values = np.clip(values, -65504, 65504)  # "minus a lot", as masks have it, must stay finite
    cast = cast_weight(tensor.name, values, low)
    tensor.CopyFrom(numpy_helper.from_array(cast, tensor.name))


def any_sizes(graph: onnx.GraphProto) -> dict[str, int]:
    """A size for every symbolic dimension of the inputs: only types are wanted of the inference."""
    dims = ((v.name, a, d) for v in graph.input for a, d in enumerate(v.type.tensor_type.shape.dim))
    return {d.dim_param or f"{name}.{axis}": 2 for name, axis, d in dims if not d.HasField("dim_value")}
