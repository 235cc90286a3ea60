"""Linear layers as exporters write them: a Gemm, MatMul or Einsum with a constant matrix, and a bias behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import onnx

from stca.export.analysis.scope import Scope, attribute
from stca.export.passes.nodes import NewNodes
from stca.export.passes.rules import View

# Operations of a product in the time that one more element takes to be added or moved, or one more node to be started,
# about, on a CPU: what a rule weighs against the work that it saves.
MOVED: Final = 32
STARTED: Final = 50_000


@dataclass(frozen=True)
class Linear:
    """`x W + bias`, with `W [K, n]`, or `[n, K]` where it is `turned`; `bias` is empty where there is none."""

    x: str
    weight: str
    turned: bool
    bias: str
    out: str

    def sizes(self, view: View) -> tuple[int, int]:
        """`K` and `n`."""
        first, second = view.sizes.shape(self.weight) or (0, 0)
        return (second, first) if self.turned else (first, second)

    def upright(self, new: NewNodes) -> str:
        """The weight as `[K, n]`."""
        return new.node("Transpose", [self.weight], f"{self.out}_turned", perm=[1, 0]) if self.turned else self.weight


def linear_at(view: View, node: onnx.NodeProto) -> Linear | None:
    """The linear layer that ends at `node`: a Gemm, a product, or the sum of one with its bias."""
    if node.op_type == "Add" and not node.domain:
        for product, bias in (node.input, reversed(node.input)):
            made = view.writer(product)
            found = product_at(view, made) if made is not None else None
            alone = found and view.readers(product) == [node] and not view.is_output(product)
            if found and alone and is_bias(view, bias) and not _widens(view, node, product):
                return replace(found, bias=bias, out=node.output[0])
        return None
    found = product_at(view, node)
    readers = view.readers(node.output[0])
    if found and not found.bias and len(readers) == 1 and _linear_bias(view, readers[0], node.output[0]):
        return None  # the sum with its bias is the match
    return found


def _widens(view: View, node: onnx.NodeProto, product: str) -> bool:
    """Whether a sum has more columns than the product: one column is broadcast to those of the other value."""
    return (view.sizes.shape(node.output[0]) or ())[-1:] != (view.sizes.shape(product) or ())[-1:]


def _linear_bias(view: View, node: onnx.NodeProto, product: str) -> bool:
    if node.op_type != "Add" or node.domain or view.is_output(product) or _widens(view, node, product):
        return False
    return any(is_bias(view, n) for n in node.input if n != product)


def is_bias(view: View, name: str) -> bool:
    """Whether a value is constant and the same for all rows."""
    shape = view.sizes.shape(name)
    return view.scopes[name] == Scope.CONSTANT and shape is not None and math.prod(shape[:-1]) == 1 and len(shape) < 3


def product_at(view: View, node: onnx.NodeProto) -> Linear | None:
    """The product with a constant matrix that `node` is, without a bias that is added later."""
    if node.domain or node.op_type not in ("MatMul", "Gemm", "Einsum") or len(node.input) < 2:
        return None
    x, weight, *bias = node.input
    if view.scopes[weight] != Scope.CONSTANT or len(view.sizes.shape(weight) or ()) != 2:
        return None
    turned = False
    if node.op_type == "Gemm":
        scaled = any(attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta"))
        if scaled or attribute(node, "transA", 0) or (bias and bias[0] and not is_bias(view, bias[0])):
            return None
        turned = bool(attribute(node, "transB", 0))
    if node.op_type == "Einsum":
        left, _, out = attribute(node, "equation", b"").decode().replace(" ", "").partition("->")
        of_x, _, of_weight = left.partition(",")
        if len(node.input) != 2 or len(of_weight) != 2 or not out or out[:-1] != of_x[:-1]:
            return None
        turned = of_weight == out[-1] + of_x[-1]
        if not turned and of_weight != of_x[-1] + out[-1]:
            return None
    return Linear(x, weight, turned, bias[0] if bias else "", node.output[0])
