"""A batch normalization before a linear layer, in evaluation mode, as a part of that layer's weight and bias.

`BN(x) W + b = x (s W) + (t W + b)` with `s = scale / sqrt(variance + epsilon)` and `t = shift - mean s`: constants,
which the engine folds when it loads. The layer then reads what was normalized, a concatenation perhaps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from stca.export.analysis.scope import Scope, attribute
from stca.export.passes.channels import is_turn, undoes
from stca.export.passes.linear import Linear, linear_at
from stca.export.passes.nodes import NewNodes
from stca.export.passes.rules import Rewrite, View


@dataclass(frozen=True)
class Match:
    """`linear` reads what `norm` makes of `x`, whose last axis is normalized; `rank` is theirs."""

    linear: Linear
    norm: onnx.NodeProto
    x: str
    rank: int


class NormInLayer:
    """Take a batch normalization into the linear layer behind it."""

    name = "normalization in the layer"

    def pattern(self, view: View, node: onnx.NodeProto) -> Match | None:
        """A linear layer of a target's value `[N, K]` that was normalized by constants."""
        linear = linear_at(view, node)
        found = _normalized(view, linear.x) if linear and view.scopes[linear.x] > Scope.USER else None
        return Match(linear, *found) if linear and found else None

    def check(self, view: View, match: Match) -> str | None:
        """Only where nothing else reads what was normalized."""
        for name in {match.linear.x, match.norm.output[0]}:
            if len(view.readers(name)) > 1 or view.is_output(name):
                return f"{name!r} has other readers"
        return None

    def rewrite(self, view: View, match: Match) -> Rewrite:
        """The layer, its weight and bias from constants."""
        new, linear, out = NewNodes(view.taken), match.linear, match.linear.out
        _, scale, shift, mean, variance = match.norm.input
        kind = onnx.helper.tensor_dtype_to_np_dtype(view.sizes.element_type(variance))
        small = numpy_helper.from_array(np.array(attribute(match.norm, "epsilon", 1e-5), kind))
        epsilon = new.node("Constant", [], f"{out}_epsilon", value=small)  # initializers stay the model's own
        deviation = new.node("Sqrt", [new.node("Add", [variance, epsilon], f"{out}_variance")], f"{out}_deviation")
        factor = new.node("Div", [scale, deviation], f"{out}_factor")
        moved = new.node("Sub", [shift, new.node("Mul", [mean, factor], f"{out}_mean")], f"{out}_shift")
        weight = linear.weight
        if linear.turned:
            weight = new.node("Transpose", [weight], f"{out}_turned", perm=[1, 0])
        rows = new.node("Unsqueeze", [factor, new.integers([1])], f"{out}_rows")
        bias = new.node("MatMul", [moved, weight], f"{out}_moved")
        if linear.bias:
            bias = new.node("Add", [bias, linear.bias], f"{out}_bias")
        weight = new.node("Mul", [weight, rows], f"{out}_weight")
        if match.rank == 2:
            new.node("Gemm", [match.x, weight, bias], f"{out}_layer")
        else:
            new.node("Add", [new.node("MatMul", [match.x, weight], f"{out}_product"), bias], f"{out}_layer")
        new.last_makes(out)
        return Rewrite(new.nodes, new.weights)


def _normalized(view: View, name: str) -> tuple[onnx.NodeProto, str, int] | None:
    """What normalizes the last axis of which value to make `name`, and the rank: directly, or turned there and back."""
    norm, turn = view.writer(name), None
    if norm is not None and is_turn(norm):
        turn, norm = norm, view.writer(norm.input[0])
    if norm is None or norm.domain or norm.op_type != "BatchNormalization":
        return None
    trained = len(norm.output) == 1 and not attribute(norm, "training_mode", 0)
    if not trained or not all(view.scopes[n] == Scope.CONSTANT for n in norm.input[1:]):
        return None
    x, rank = str(norm.input[0]), len(view.sizes.shape(norm.input[0]) or ())
    if turn is None:
        return (norm, x, rank) if rank == 2 else None
    before, perm = view.writer(x), attribute(turn, "perm", ())
    if before is None or not is_turn(before) or not undoes(perm, before) or perm[-1] != 1:
        return None
    return norm, str(before.input[0]), rank
