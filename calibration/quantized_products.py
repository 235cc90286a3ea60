"""Products of matrices with weights of 8 bits, and with activations of 8 bits where that is asked for.

    y = x · dequantized(W)                                       weights alone: a step for each column
    y = step · (round(x / step) · dequantized(W))                `token`: step = largest magnitude of x's row / levels
    y = dequantized(quantized(x)) · dequantized(W)               `tensor`: one step, from the trace

All of it is `QuantizeLinear`, `DequantizeLinear` and `MatMul`. ONNX Runtime makes integer products of the last two. Of
float8 (E4M3) there are weights alone.
A row's step comes from the row alone, or from the trace: so neither what is appended to a state nor what is packed with
a request changes its scores. ONNX's own `DynamicQuantizeLinear` has one step for all rows that come together.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stca.calibration.quantized_state import Kind, levels, require_opset
from stca.calibration.quantized_weights import finish, replaced
from stca.export.analysis.scope import Dataflow, attribute
from stca.export.passes.nodes import NewNodes, names_in
from stca.export.passes.zero_points import name_zero_points

Activations = Literal["none", "token", "tensor"]
_PRODUCTS: Final = ("MatMul", "Gemm")
# What changes no number of a weight, and gives it another place.
WEIGHT_MOVES: Final = ("Transpose", "Split", "Slice")
# A matrix of fewer rows saves little beside its steps.
_NARROWEST: Final = 8
# The least magnitude of a row of activations: zeros have a step, too.
_LEAST: Final = 1e-30


@dataclass(frozen=True)
class ProductFormat:
    """A matrix of 8-bit numbers, with a step for each column; of several matrices in one tensor, for their columns.

    Attributes:
        activations: what it is multiplied with: float32, or int8 with a step for each row or for all.
        largest: of each activation that it is multiplied with, the largest magnitude of the trace; for `tensor`.
    """

    activations: Activations = "none"
    largest: Mapping[str, float] = field(default_factory=dict)
    kind: Kind = "int8"


def quantizable_products(models: Iterable[onnx.ModelProto]) -> tuple[str, ...]:
    """Names of the float32 matrices of which all graphs make a product's second factor alone, with the same columns."""
    found: dict[str, set[int | None]] = {}
    for model in models:
        flow = Dataflow(model.graph)
        for tensor in model.graph.initializer:
            fits = tensor.data_type == TensorProto.FLOAT and len(tensor.dims) in (2, 3)
            axes = list(_columns(flow, tensor.name, range(len(tensor.dims)))) if fits else []
            rows = [0 if a is None else math.prod(tensor.dims) // max(1, tensor.dims[a]) for a in axes]
            found.setdefault(tensor.name, set()).update(axes if min(rows, default=0) >= _NARROWEST else [None])
    return tuple(name for name, axes in found.items() if len(axes) == 1 and None not in axes)


def _columns(flow: Dataflow, value: str, axes: Sequence[int]) -> Iterator[int | None]:
    """Which axes of a weight become columns of products; None where it is read otherwise.

    Args:
        flow: of the graph.
        value: the weight, or what it was turned or parted into.
        axes: of the weight, which the value's axes are.
    """
    if any(o.name == value for o in flow.graph.output):
        yield None
    for node in (flow.graph.node[i] for i in flow.readers.get(value, ())):
        if node.domain or list(node.input).count(value) != 1:
            yield None
        elif node.op_type in _PRODUCTS and node.input[1] == value:
            yield axes[0 if attribute(node, "transB", 0) else -1]
        elif node.op_type in WEIGHT_MOVES and node.input[0] == value:
            order = (
                list(attribute(node, "perm", range(len(axes))[::-1]))
                if node.op_type == "Transpose"
                else range(len(axes))
            )
            for made in node.output:
                yield from _columns(flow, made, [axes[i] for i in order])
        else:
            yield None


def factors(model: onnx.ModelProto, names: Collection[str]) -> dict[str, list[str]]:
    """What each matrix of a graph is multiplied with, where that can be rounded."""
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        if len(node.input) > 1 and node.input[1] in names and _plain(node):
            found.setdefault(node.input[1], []).append(node.input[0])
    return found


def _plain(node: onnx.NodeProto) -> bool:
    """Whether a node is a product of its first two inputs and at most a sum besides."""
    whole = all(attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta")) and not attribute(node, "transA", 0)
    return not node.domain and (node.op_type == "MatMul" or (node.op_type == "Gemm" and whole))


def quantize_products(model: onnx.ModelProto, formats: Mapping[str, ProductFormat], *, half: bool) -> None:
    """Give products of a graph matrices of 8 bits, in place.

    What is multiplied with several matrices in one tensor, or with one that is first turned or parted, stays as it is:
    ONNX Runtime makes no integer product of that.

    Args:
        model: with its weights.
        formats: by name of the matrix, from `quantizable_products`.
        half: whether activations change, too; they do not in the graph that the halves are held against.

    Raises:
        StcaError: when the graph is of an ONNX version that is too old.
        UsageError: when a weight has values that are not finite.
    """
    graph = model.graph
    matrices = {t.name: t for t in list(graph.initializer) if t.name in formats}
    if not matrices:
        return
    require_opset(model)
    flow = Dataflow(graph)
    columns = {name: next(_columns(flow, name, range(len(t.dims)))) for name, t in matrices.items()}
    new = _Activations(names_in(graph))
    for name, tensor in matrices.items():
        shared = tuple(i for i in range(len(tensor.dims)) if i != columns[name])
        numbers, steps = replaced(graph, tensor, formats[name].kind, shared, flat=True)
        new.node("DequantizeLinear", [numbers, steps], name, exact=True, axis=columns[name])
    rounding = {
        n: f
        for n, f in formats.items()
        if n in matrices and half and f.activations != "none" and len(matrices[n].dims) == 2
    }
    for node in graph.node:
        format = rounding.get(node.input[1]) if len(node.input) > 1 else None
        if format is None or not _plain(node):
            new.nodes.append(node)
        else:
            new.multiply(node, format)
    finish(graph, new, ())
    name_zero_points(model)


class _Activations(NewNodes):
    """Adds products of int8 activations.

    Each product has a scale of its own, a rounding from the last one's: ONNX Runtime merges equal nodes, and makes no
    integer product where two read one quantized value.
    """

    def __init__(self, taken: set[str]) -> None:
        super().__init__(taken)
        self._rows: dict[str, tuple[str, str]] = {}
        self._used: dict[str, int] = {}
        self._numbers: dict[tuple[float, str], str] = {}

    def multiply(self, node: onnx.NodeProto, format: ProductFormat) -> None:
        """Add `node`, a product, with its first factor in 8 bits."""
        (x, matrix, *bias), made = [n for n in node.input if n], node.output[0]
        turned: dict[str, Any] = {"transB": 1} if attribute(node, "transB", 0) else {}
        if format.activations == "tensor":
            scale = max(np.float32(format.largest[x] / levels("int8")), np.float32(_LEAST))
            self.node(node.op_type, [self._rounded(x, scale), matrix, *bias], made, exact=True, **turned)
            return
        units, step = self._by_row(x)
        product = self.node(node.op_type, [self._rounded(units, np.float32(1)), matrix], f"{made}_units", **turned)
        scaled = self.node("Mul", [product, step], f"{made}_scaled" if bias else made, exact=not bias)
        if bias:
            self.node("Add", [scaled, *bias], made, exact=True)

    def _by_row(self, x: str) -> tuple[str, str]:
        """Values in steps of their row, and the rows' steps."""
        if x not in self._rows:
            magnitude = self.node("Abs", [x], f"{x}_magnitude")
            largest = self.node("ReduceMax", [magnitude, self._constant(-1, "int64")], f"{x}_largest", keepdims=1)
            some = self.node("Max", [largest, self._constant(_LEAST)], f"{x}_range")
            step = self.node("Div", [some, self._constant(levels("int8"))], f"{x}_step")
            self._rows[x] = self.node("Div", [x, step], f"{x}_units"), step
        return self._rows[x]

    def _rounded(self, x: str, scale: np.float32) -> str:
        for _ in range(self._used.setdefault(x, 0)):
            scale = np.nextafter(scale, np.float32(np.inf))
        self._used[x] += 1
        given = [self._constant(scale), self._constant(0, "int8")]
        kept = self.node("QuantizeLinear", [x, *given], f"{x}_int8")
        return self.node("DequantizeLinear", [kept, *given], f"{x}_rounded")

    def _constant(self, value: float | np.float32, dtype: str = "float32") -> str:
        key = float(value), dtype
        if key not in self._numbers:
            shape = (1,) if dtype == "int64" else ()
            tensor = numpy_helper.from_array(np.full(shape, value, dtype))
            self._numbers[key] = self.node("Constant", [], "product_constant", value=tensor)
        return self._numbers[key]


def watch(model: onnx.ModelProto, names: Collection[str]) -> tuple[str, ...]:
    """Let a graph give activations besides its outputs, in place; those that it has."""
    graph = model.graph
    has = {n for node in graph.node for n in node.output} | {i.name for i in graph.input}
    given = {o.name for o in graph.output}
    found = tuple(n for n in names if n in has)
    graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in found if n not in given)
    return found
