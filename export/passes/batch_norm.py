"""A batch normalization before or behind a linear layer, in evaluation mode, as a part of its weight and bias.

`BN(x) W + b = x (s W) + (t W + b)` with `s = scale / sqrt(variance + epsilon)` and `t = shift - mean s`: constants,
which the engine folds when it loads. The layer then reads what was normalized, a concatenation perhaps. One behind the
layer is a pass over all that the layer makes.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from stca.export.analysis.scope import Scope, attribute
from stca.export.passes.channels import is_turn, undoes
from stca.export.passes.linear import Linear, linear_at
from stca.export.passes.nodes import NewNodes
from stca.export.passes.norms import factor_and_shift, is_evaluated
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
        return view.others_read(match.linear.x, match.norm.output[0])

    def rewrite(self, view: View, match: Match) -> Rewrite:
        """The layer, its weight and bias from constants."""
        new, linear, out = NewNodes(view.taken), match.linear, match.linear.out
        factor, moved = factor_and_shift(view, new, match.norm, out)
        weight = linear.upright(new)
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


class NormOfLayer:
    """Take a batch normalization into the linear layer before it."""

    name = "normalization of the layer"

    def pattern(self, view: View, node: onnx.NodeProto) -> NormOf | None:
        """A normalization by constants of what a linear layer makes of a target's value `[N, K]`."""
        if not is_evaluated(view, node) or view.scopes[node.input[0]] <= Scope.USER:
            return None
        made = view.writer(node.input[0])
        linear = linear_at(view, made) if made is not None else None
        rank2 = len(view.sizes.shape(node.input[0]) or ()) == 2
        return NormOf(linear, node) if linear is not None and rank2 else None

    def check(self, view: View, match: NormOf) -> str | None:
        """Only where nothing else reads what the layer makes."""
        return view.others_read(match.linear.out)

    def rewrite(self, view: View, match: NormOf) -> Rewrite:
        """One Gemm: `(x W + b) factor + shift = x (W factor) + (b factor + shift)`."""
        new, out = NewNodes(view.taken), match.norm.output[0]
        factor, bias = factor_and_shift(view, new, match.norm, out)
        if match.linear.bias:
            scaled = new.node("Mul", [match.linear.bias, factor], f"{out}_scaled")
            bias = new.node("Add", [scaled, bias], f"{out}_bias")
        weight = new.node("Mul", [match.linear.upright(new), factor], f"{out}_weight")
        new.node("Gemm", [match.linear.x, weight, bias], out, exact=True)
        return Rewrite(new.nodes, new.weights)


@dataclass(frozen=True)
class NormOf:
    """`norm` normalizes what `linear` makes."""

    linear: Linear
    norm: onnx.NodeProto


def _normalized(view: View, name: str) -> tuple[onnx.NodeProto, str, int] | None:
    """What normalizes the last axis of which value to make `name`, and the rank: directly, or turned there and back."""
    norm, turn = view.writer(name), None
    if norm is not None and is_turn(norm):
        turn, norm = norm, view.writer(norm.input[0])
    if norm is None or not is_evaluated(view, norm):
        return None
    x, rank = str(norm.input[0]), len(view.sizes.shape(norm.input[0]) or ())
    if turn is None:
        return (norm, x, rank) if rank == 2 else None
    before, perm = view.writer(x), attribute(turn, "perm", ())
    if before is None or not is_turn(before) or not undoes(perm, before) or perm[-1] != 1:
        return None
    return norm, str(before.input[0]), rank
