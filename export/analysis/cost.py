"""What a value weighs and what a node costs, at a nominal workload: the two currencies of the split.

Estimates, to compare one cut with another, and not predictions of time. Shapes come from ONNX shape inference with the
symbolic sizes replaced by nominal ones. Where a shape stays unknown, a value counts as large as the largest input of
its node, and an unknown inner size as the workload's largest: too much work rather than too little, because work
moved to the scorer by mistake is paid on every request. `NominalSizes.guesses` names those values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

import numpy as np
import onnx

from stca.errors import SplitError, said
from stca.export.analysis import operators
from stca.export.analysis.scope import attribute, opset_of, reads, subgraphs, walk
from stca.plugins.spec import DOMAIN, OP_NAME
from stca.specs import ITEM_BYTES, OFFSETS, TARGETS, TOKENS, USERS

DEFAULT_WORKLOAD: Final[Mapping[str, int]] = {TOKENS: 10_000, TARGETS: 300, USERS: 1, OFFSETS: 2}

_STANDARD_DOMAINS = {"", "ai.onnx", "ai.onnx.ml"}

# An initializer with more elements is data, not a shape: inference does without its contents.
_SMALL = 1024
_BITS_BELOW_A_BYTE = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}


def _dtype(element_type: int) -> str:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element_type)).name


def element_bits(element_type: int) -> int | None:
    """Size of one element of an ONNX type; None when it is not a number (strings, unknown)."""
    if element_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        return None
    name = onnx.TensorProto.DataType.Name(element_type)
    return _BITS_BELOW_A_BYTE.get(name) or 8 * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element_type)).itemsize


# Shapes by value: numbers, names of symbolic sizes, None for what is neither.
Measured: TypeAlias = Mapping[str, tuple[int | str | None, ...]]
# Shapes by value at the workload.
Shown: TypeAlias = Mapping[str, tuple[int, ...]]


class NominalSizes:
    """Types and nominal sizes of every value of `model`, bodies of control flow included.

    Args:
        model: with its weights inline or not; their contents are not read.
        workload: nominal size of each symbolic dimension of the inputs. An input's dimension that has neither name nor
            size goes by `<input>.<axis>`.
        measured: shapes of values as runs showed them, for those that inference does not know.
        per_row: operations that looking up a row takes, by table: of those outside the graphs.
        shown: shapes at the workload, for those that inference does not know; `analysis.growth` finds them.

    Attributes:
        workload: as given.
        guesses: values whose shape stayed unknown.

    Raises:
        SplitError: when an input's symbolic dimension has no nominal size, or inference finds the graph wrong.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        workload: Mapping[str, int],
        measured: Measured | None = None,
        per_row: Mapping[str, float] | None = None,
        shown: Shown | None = None,
    ) -> None:
        self.workload, self._measured, self._per_row = workload, measured or {}, per_row or {}
        skeleton = _skeleton(model)
        self._types = _types(_infer(skeleton).graph)
        if _unsqueeze_scalars(skeleton, self._types):
            self._types = _types(_infer(skeleton).graph)
        _make_nominal(skeleton, workload)
        inferred = _infer(skeleton)
        if shown and _set_shapes(inferred.graph, shown):
            inferred = _infer(inferred)
        self._shapes = {name: _sizes(kind.tensor_type) for name, kind in _types(inferred.graph).items()}
        self._shapes.update((t.name, tuple(t.dims)) for t in model.graph.initializer)
        for name, dims in self._measured.items():
            sizes = [n if isinstance(n, int) else workload.get(n or "") for n in dims]
            if self._shapes.get(name) is None and None not in sizes:
                self._shapes[name] = tuple(n for n in sizes if n is not None)
        self._elements: dict[str, int] = {}
        self.guesses: list[str] = []
        for node in walk(model.graph.node):
            largest = max((self.elements(name) for name in reads(node)), default=1)
            for name in filter(None, node.output):
                if self._shapes.get(name) is None:
                    self._elements[name] = largest
                    self.guesses.append(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Nominal shape, None when unknown."""
        return self._shapes.get(name)

    def elements(self, name: str) -> int:
        """Nominal number of elements."""
        shape = self._shapes.get(name)
        return self._elements.get(name, 1) if shape is None else math.prod(shape)

    def bytes(self, name: str) -> int | None:
        """Nominal bytes; None for what cannot be cached: strings, sequences, unknown ranks, types no bundle has."""
        kind = self.element_type(name)
        bits = element_bits(kind)
        if bits is None or self.dims(name) is None or _dtype(kind) not in ITEM_BYTES:
            return None
        return math.ceil(self.elements(name) * bits / 8)

    def element_type(self, name: str) -> int:
        """ONNX element type; UNDEFINED when unknown or not a tensor."""
        kind = self._types.get(name)
        return kind.tensor_type.elem_type if kind else onnx.TensorProto.UNDEFINED

    def dims(self, name: str) -> tuple[int | str | None, ...] | None:
        """Symbolic shape, with None where a size has no name; None when not even the rank is known."""
        kind, seen = self._types.get(name), self._measured.get(name)
        if kind and kind.tensor_type.HasField("shape"):
            dims = tuple(
                d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.tensor_type.shape.dim
            )
            if seen is None or len(seen) != len(dims):
                return dims
            # Inference makes up names for sizes that it cannot follow.
            return tuple(
                a if b is None or isinstance(a, int) or a in self.workload else b
                for a, b in zip(dims, seen, strict=True)
            )
        if seen is not None:
            return seen
        shape = self.shape(name)
        return None if shape is None else (None,) * len(shape)

    def work(self, node: onnx.NodeProto) -> int:
        """Nominal floating-point operations of one run of `node`; at least 1.

        Both branches of an If are counted, the body of a Scan as often as it scans, that of a Loop as often as its
        constant trip count says, else as the workload's largest size. An operator of an unknown domain counts as a
        dense product of its first input's last axis.
        """
        return max(1, self._work(node))

    def _work(self, node: onnx.NodeProto) -> int:
        op, out = node.op_type, sum(self.elements(name) for name in node.output if name)
        if bodies := tuple(subgraphs(node)):
            return self._trips(node) * sum(self.work(inner) for body in bodies for inner in body.node)
        if node.domain == DOMAIN and op == OP_NAME:
            return self._attention(node)
        if node.domain not in _STANDARD_DOMAINS or op in ("MatMul", "MatMulInteger", "QLinearMatMul"):
            return 2 * out * self._size(node.input[0] if node.input else "", -1)
        if op == "Gemm":
            return 2 * out * self._size(node.input[0], 0 if attribute(node, "transA", 0) else 1)
        if op == "Einsum":
            return 2 * self._einsum_space(node)
        if op in ("Conv", "ConvTranspose"):
            positions = out if op == "Conv" else self.elements(node.input[0])
            return 2 * positions * math.prod((self.shape(node.input[1]) or (1, 1))[1:])
        if op == "Attention":  # of opset 23: keys are the last axis but one of input 1, whatever the layout
            return 4 * self.elements(node.input[0]) * self._size(node.input[1], -2)
        if op in operators.RECURRENT:  # every step multiplies with all of W and R
            steps = self._size(node.input[0], 0) * self._size(node.input[0], 1)
            return 2 * steps * (self.elements(node.input[1]) + self.elements(node.input[2]))
        if op == "Gather" and node.input[0] in self._per_row:
            return round(self._per_row[node.input[0]] * self.elements(node.input[1]))
        if op in operators.COSTS_NOTHING:
            return 1
        if op in operators.OPERATIONS_PER_INPUT:
            return operators.OPERATIONS_PER_INPUT[op] * self.elements(node.input[0])
        return operators.OPERATIONS_PER_OUTPUT.get(op, 1) * out

    def _attention(self, node: onnx.NodeProto) -> int:
        """Logits and mix are 2 operations per multiply-add, the softmax 8 per logit, over an average history."""
        query, key, value, offsets = node.input[:4]
        history = self._size(key, 0) / max(1, self._size(offsets, 0) - 1)
        logits = self._size(query, 0) * self._size(query, 1) * history
        return round(logits * (2 * self._size(query, 2) + 2 * self._size(value, 2) + 8))

    def _einsum_space(self, node: onnx.NodeProto) -> int:
        """Size of the index space: the product over all labels."""
        terms = attribute(node, "equation", b"").decode().replace(" ", "").split("->")[0].split(",")
        sizes: dict[str, int] = {}
        for term, name in zip(terms, node.input, strict=False):
            shape = self.shape(name)
            if shape is None or "." in term or len(shape) != len(term):
                return max(self.elements(x) for x in node.input) * self._size(node.input[-1], -1)
            sizes.update(zip(term, shape, strict=True))
        return math.prod(sizes.values())

    def _trips(self, node: onnx.NodeProto) -> int:
        if node.op_type == "Scan":
            scanned = int(attribute(node, "num_scan_inputs", 1))
            return self._size(node.input[len(node.input) - scanned], 0)
        if node.op_type == "Loop":
            return max((*self.workload.values(), 1))
        return 1

    def _size(self, name: str, axis: int) -> int:
        shape = self.shape(name)
        if shape is None:
            return max((*self.workload.values(), 1))
        return shape[axis] if -len(shape) <= axis < len(shape) else 1


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large initializers are inputs of the same type: light, and alike to shape inference and checker."""
    graph = model.graph
    copy = onnx.ModelProto(ir_version=model.ir_version)
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    copy.graph.name = graph.name
    copy.graph.node.extend(graph.node)
    for field in ("input", "output", "value_info", "sparse_initializer"):
        getattr(copy.graph, field).extend(getattr(graph, field))
    inputs = {value.name for value in graph.input}
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _SMALL:
            copy.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            copy.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return copy


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for inference, with `TargetHistoryAttention` as an Einsum of the same type and shape.

    Inference cannot see the shape through the operator's function body; the contraction
    `[N_t, H, D], [N_h, H_k, D_v] → [N_t, H, D_v]` tells it.
    """
    copy = without_weights(model)
    for node in walk(copy.graph.node):
        if node.domain == DOMAIN and node.op_type == OP_NAME:
            query, _, value = node.input[:3]
            del node.input[:], node.attribute[:]
            node.domain, node.op_type = "", "Einsum"
            node.input.extend((query, value))
            node.attribute.append(onnx.helper.make_attribute("equation", "thd,lkv->thv"))
    return copy


def _unsqueeze_scalars(skeleton: onnx.ModelProto, types: Mapping[str, onnx.TypeProto]) -> bool:
    """Write each Reshape of one number to `[1]` as an Unsqueeze, in place: inference follows sizes through that alone.

    PyTorch's exporter makes the shape of every Expand to a history's size so.
    """
    ranks = {n: len(t.tensor_type.shape.dim) for n, t in types.items() if t.tensor_type.HasField("shape")}
    found = [
        node
        for node in skeleton.graph.node
        if node.op_type == "Reshape" and (ranks.get(node.input[0]), ranks.get(node.output[0])) == (0, 1)
    ]
    if opset_of(skeleton) < 13:  # before which it follows neither
        return False
    for node in found:
        del node.input[1:], node.attribute[:]
        node.op_type = "Unsqueeze"
        node.input.append(f"{node.output[0]}_axes")
        skeleton.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.int64), node.input[1]))
    return bool(found)


def _infer(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError as e:
        raise SplitError(f"shape inference fails: {said(e)}; check the model first") from e


def _make_nominal(model: onnx.ModelProto, workload: Mapping[str, int]) -> None:
    """Replace symbolic sizes by nominal ones, in place; those that no input has are left to inference."""
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                name = dim.dim_param or f"{value.name}.{axis}"
                if name not in workload:
                    raise SplitError(
                        f"dimension {axis} of input {value.name!r} has no nominal size; "
                        f"give one for {name!r}, as in --size {name}=300"
                    )
                dim.dim_value = workload[name]
    for value in _declared(model.graph):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in workload:
                dim.dim_value = workload[dim.dim_param]
            elif dim.dim_param:
                dim.Clear()


def _set_shapes(graph: onnx.GraphProto, shown: Shown) -> bool:
    """Give values whose shape is not known the one that is shown, in place; whether there were any."""
    unknown = [v for v in (*graph.value_info, *graph.output) if v.name in shown and _sizes(v.type.tensor_type) is None]
    for value in unknown:
        shape = onnx.helper.make_tensor_type_proto(value.type.tensor_type.elem_type, shown[value.name])
        value.type.CopyFrom(shape)
    return bool(unknown)


def _declared(graph: onnx.GraphProto) -> Iterable[onnx.ValueInfoProto]:
    """Values with a declared type, inputs and bodies included."""
    yield from (*graph.input, *graph.value_info, *graph.output)
    for node in graph.node:
        for body in subgraphs(node):
            yield from _declared(body)


def _types(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    return {value.name: value.type for value in _declared(graph)} | {
        t.name: onnx.helper.make_tensor_type_proto(t.data_type, list(t.dims)) for t in graph.initializer
    }


def _sizes(tensor: onnx.TypeProto.Tensor) -> tuple[int, ...] | None:
    if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None
    return tuple(dim.dim_value for dim in tensor.shape.dim)


def any_sizes(graph: onnx.GraphProto) -> dict[str, int]:
    """A size for every symbolic dimension of the inputs: only types are wanted of the inference."""
    dims = ((v.name, a, d) for v in graph.input for a, d in enumerate(v.type.tensor_type.shape.dim))
    return {d.dim_param or f"{name}.{axis}": 2 for name, axis, d in dims if not d.HasField("dim_value")}
