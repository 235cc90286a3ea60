"""Which values have one row per history token, made from that token's inputs and the weights alone: by dataflow.

Such a row does not change when tokens are added before or after it, whatever their number, and that is what a state
that can be appended to is made of. A sum of such rows over all tokens is the other thing that it can be made of: that
of a longer history is the old sum and the new tokens'. A check on random tokens cannot show either: a convolution that
looks 500 tokens back is unseen in any shorter history. So every operator on the way must be one of those below, used in
one of the ways below; what is not known does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import onnx
from onnx import numpy_helper

from stca.export.analysis import operators
from stca.export.analysis.cost import NominalSizes, any_sizes, without_weights
from stca.export.analysis.integers import fold_integers
from stca.export.analysis.scope import attribute, label, opset_of, reads, subgraphs
from stca.specs import TOKENS

# Operators along one axis alone, from this opset on; others, and older ones, work from their axis on to the last.
_ONE_AXIS: Final = frozenset(("Hardmax", "LogSoftmax", "LpNormalization", "Softmax"))
_ONE_AXIS_SINCE: Final = 13


class Tokenwise:
    """What is shown of each value of a graph.

    Args:
        model: the graph; its functions but the operator's are inlined.
        tokens: its inputs with an entry for each token, and the axis along which these lie.

    Attributes:
        axes: values with an entry per token, each made of its own token, and the axis along which they lie.
        sums: values that are sums over all tokens of such entries.
        fixed: values that follow from weights and constants.
        sizes: values that follow from these and from the number of tokens, such as the shape that a Reshape is given.
        why_not: of any other value, what comes in first on its way that is not known to keep tokens apart.
    """

    def __init__(self, model: onnx.ModelProto, tokens: Mapping[str, int]) -> None:
        self._inferred = NominalSizes(model, any_sizes(model.graph)).dims
        self._opset = opset_of(model)
        light = without_weights(model)
        fold_integers(light)
        self._known = {t.name: numpy_helper.to_array(t) for t in light.graph.initializer}
        self.axes, self.sums = dict(tokens), set[str]()
        self.fixed = {t.name for t in (*model.graph.initializer, *light.graph.initializer)}
        self.sizes: set[str] = set()
        self.why_not = {i.name: f"input {i.name!r}, which has no row per token" for i in light.graph.input}
        for node in light.graph.node:
            self._visit(node)

    @property
    def rows(self) -> set[str]:
        """Values whose first axis is the tokens'."""
        return {name for name, axis in self.axes.items() if axis == 0}

    def _visit(self, node: onnx.NodeProto) -> None:
        names = reads(node)[: 1 if node.op_type == "CastLike" else None]  # of the other, it takes the type alone
        unknown = next((n for n in names if n not in self.axes.keys() | self.fixed | self.sizes), None)
        known = not node.domain and not any(subgraphs(node))
        if node.op_type in operators.SIZES and self._is_one_size(node):
            self.fixed.update(node.output)
        elif unknown is not None:
            self.why_not.update(dict.fromkeys(node.output, self.why_not.get(unknown, f"value {unknown!r}")))
        elif self.fixed.issuperset(names):
            self.fixed.update(node.output)
        elif node.op_type in operators.SIZES or (self.axes.keys().isdisjoint(names) and self._repeated(node) is None):
            self.sizes.update(node.output)
        elif known and (axis := self._axis_after(node)) is not None:
            self.axes.update(dict.fromkeys(node.output, axis))
        elif known and self._adds_up_tokens(node):
            self.sums.update(node.output)
            self.why_not[node.output[0]] = f"{node.output[0]!r}, a sum over all tokens"
        else:
            reason = f"node {label(node)!r} ({node.op_type}), which is not known to keep tokens apart"
            self.why_not.update(dict.fromkeys(node.output, reason))

    def _axis_after(self, node: onnx.NodeProto) -> int | None:
        """The tokens' axis in a node's outputs, where each entry there is made of that of the same token in those
        inputs that have one, and of no other; None where that is not known.
        """
        op, given = node.op_type, [name for name in node.input if name]
        at = [self.axes.get(name) for name in given]
        if self.axes.keys().isdisjoint(given):
            return self._repeated(node)
        if op == "CastLike":
            return at[0]
        if op not in ("Reshape", "Expand") and not self.sizes.isdisjoint(given):
            return None  # a position, perhaps
        if op in operators.ELEMENTWISE:
            return self._elementwise(given, self._rank(node.output[0]))
        if op == "MatMul":
            return self._matmul(given)
        if op == "Gemm":
            return self._gemm(node, given)
        if op == "Einsum":
            return self._einsum(node, given)[0]
        if op == "Gather":
            return self._gather(node, given)
        if op == "GatherND":
            kept = at[0] is None and at[1] is not None and at[1] < self._rank(given[1]) - 1
            return at[1] if kept and not attribute(node, "batch_dims", 0) else None
        if op == "Concat":
            return at[0] if len(set(at)) == 1 and not self._works_on(node, given[0], 0, at[0]) else None
        if at[0] is None or any(other is not None for other in at[1:]) or self._rank(given[0]) < 1:
            return None
        return self._of_one(node, given, at[0])

    def _of_one(self, node: onnx.NodeProto, given: Sequence[str], at: int) -> int | None:
        """As `_axis_after`, of operators whose first input alone has tokens, along `at`."""
        op, first, others, rank = node.op_type, given[0], list(given[1:2]), self._rank(given[0])
        if op in operators.PER_SAMPLE:
            return 0 if at == 0 and rank >= 2 and not attribute(node, "training_mode", 0) else None
        if op in operators.ALONG_AXIS:
            axis = attribute(node, "axis", -1) % rank
            single = op in _ONE_AXIS and self._opset >= _ONE_AXIS_SINCE
            return at if (at != axis if single else at < axis) else None
        if op == "OneHot":
            axis = attribute(node, "axis", -1) % (rank + 1)
            return at if at < axis else at + 1
        if op == "Split":
            return None if self._works_on(node, first, 0, at) else at
        if op == "Transpose":
            return list(attribute(node, "perm", range(rank - 1, -1, -1))).index(at)
        if op == "Flatten":
            return 0 if at == 0 and attribute(node, "axis", 1) == 1 else None
        if op == "Reshape":
            return self._reshape(first, at, node.output[0])
        if op == "Expand":
            out = self._dims(node.output[0]) or ()
            to = len(out) - rank + at
            return to if 0 <= to < len(out) and out[to] == TOKENS else None
        if op == "Slice":
            axes = self._axes(node, list(node.input[3:4]), rank)
            return at if axes is not None and at not in axes else None
        if op == "Unsqueeze":
            axes = self._axes(node, others, rank + 1)
            return None if axes is None else [i for i in range(rank + len(axes)) if i not in axes][at]
        if op in operators.REDUCTIONS or op in ("ArgMax", "ArgMin", "Squeeze"):
            axes = self._axes(node, others, rank)
            if not axes or at in axes:
                return None
            dropped = op == "Squeeze" or not attribute(node, "keepdims", 1)
            return at - sum(axis < at for axis in axes) * dropped
        return None

    def _adds_up_tokens(self, node: onnx.NodeProto) -> bool:
        """Whether a node's result is a sum over all tokens, with nothing added to it besides."""
        op, given = node.op_type, [name for name in node.input if name]
        if not self.sizes.isdisjoint(given):
            return False  # as a factor, the number of tokens changes what the old ones gave
        at, ranks = [self.axes.get(name) for name in given], [self._rank(name) for name in given]
        if op == "ReduceSum":
            axes = self._axes(node, given[1:2], ranks[0])
            return at[0] is not None and all(n is None for n in at[1:]) and axes is not None and at[0] in axes
        if op == "Einsum":
            return self._einsum(node, given)[1]
        if None in at or len(given) != 2 or min(ranks) < 1:
            return False
        if op == "MatMul":
            return at == [ranks[0] - 1, max(ranks[1] - 2, 0)]
        if op == "Gemm":
            return at == [1 - attribute(node, "transA", 0), attribute(node, "transB", 0)]
        return False

    def _elementwise(self, given: Sequence[str], width: int) -> int | None:
        from_end = {self._rank(n) - self.axes[n] if self._rank(n) > 0 else 0 for n in given if n in self.axes}
        (place, *others) = from_end
        shared = all(n in self.axes or self._is_shared(n, place) for n in given)
        return width - place if not others and 0 < place <= width and shared else None

    def _matmul(self, given: Sequence[str]) -> int | None:
        """Tokens are rows of the left matrix, columns of the right one, or among the matrices of a batch."""
        ranks = [self._rank(n) for n in given]
        if min(ranks) < 0 or all(n in self.axes for n in given):
            return None
        tokens, fixed = (0, 1) if given[0] in self.axes else (1, 0)
        rank, other, at = ranks[tokens], given[fixed], self.axes[given[tokens]]
        place = rank - at
        if ranks[fixed] < 2:  # its axis goes away, and that of the tokens' value beside it
            summed = 1 if tokens == 0 else min(2, rank)
            return None if rank < 2 or place == summed else at - (tokens == 1 and place == 1)
        kept = 2 if tokens == 0 else 1
        if rank < 2 or not (place == kept or (place > 2 and self._is_shared(other, place))):
            return None
        return max(ranks) - place

    def _gemm(self, node: onnx.NodeProto, given: Sequence[str]) -> int | None:
        turned = [attribute(node, "transA", 0), attribute(node, "transB", 0)]
        at = [self.axes.get(n) for n in given]
        if len([n for n in at if n is not None]) != 1:
            return None
        if at[0] is not None:
            return 0 if at[0] == turned[0] and all(self._is_shared(n, 2) for n in given[2:]) else None
        return 1 if at[1] == 1 - turned[1] and all(self._is_shared(n, 1) for n in given[2:]) else None

    def _einsum(self, node: onnx.NodeProto, given: Sequence[str]) -> tuple[int | None, bool]:
        """The tokens' axis in the result, and whether it sums over them instead: one label has them all."""
        left, arrow, out = attribute(node, "equation", b"").decode().replace(" ", "").partition("->")
        terms = left.split(",")
        if not arrow or "." in left + out or any(len(t) != self._rank(n) for t, n in zip(terms, given, strict=True)):
            return None, False
        labels = {term[self.axes[n]] for term, n in zip(terms, given, strict=True) if n in self.axes}
        token = min(labels, default="")
        apart = all(term.count(token) == (n in self.axes) for term, n in zip(terms, given, strict=True))
        if len(labels) != 1 or not apart:
            return None, False
        return (out.index(token), False) if out.count(token) == 1 else (None, token not in out)

    def _gather(self, node: onnx.NodeProto, given: Sequence[str]) -> int | None:
        """A row of a table for each token, or columns of each token's row."""
        data, ids = (self.axes.get(n) for n in given)
        rank, wide = self._rank(given[0]), self._rank(given[1])
        if min(rank, wide) < 0 or (data is None) == (ids is None):
            return None
        axis = attribute(node, "axis", 0) % max(rank, 1)
        if ids is not None:
            return int(axis) + ids
        return None if data is None or data == axis else data if data < axis else data + wide - 1

    def _reshape(self, name: str, at: int, made: str) -> int | None:
        """Where as many elements lie before and after a place as lay before and after the tokens' axis."""
        given, out = self._dims(name) or (), self._dims(made) or ()
        wanted = _elements(given[:at]), _elements(given[at + 1 :])
        places = [i for i in range(len(out)) if (_elements(out[:i]), _elements(out[i + 1 :])) == wanted]
        return next((i for i in places if not isinstance(out[i], int)), None) if 0 not in wanted else None

    def _is_one_size(self, node: onnx.NodeProto) -> bool:
        """Whether what a Shape or Size tells of a value, whatever that is made of, are fixed numbers."""
        dims = self._dims(node.input[0])
        told = slice(attribute(node, "start", 0), attribute(node, "end", None))
        return dims is not None and all(isinstance(n, int) for n in dims[told])

    def _repeated(self, node: onnx.NodeProto) -> int | None:
        """The tokens' axis, where a node gives every token the same constants."""
        out = self._dims(node.output[0]) or ()
        if node.domain or out.count(TOKENS) != 1:
            return None
        at = out.index(TOKENS)
        if node.op_type == "Expand":
            shared = node.input[0] in self.fixed and self._is_shared(node.input[0], len(out) - at)
            return at if shared else None
        return at if node.op_type == "ConstantOfShape" else None

    def _is_shared(self, name: str, place: int) -> bool:
        """Whether broadcasting a constant gives every entry of an axis, counted from the last as 1, the same."""
        dims = self._dims(name)
        return name in self.fixed and dims is not None and (len(dims) < place or dims[-place] == 1)

    def _dims(self, name: str) -> tuple[int | str | None, ...] | None:
        return self._known[name].shape if name in self._known else self._inferred(name)

    def _rank(self, name: str) -> int:
        dims = self._dims(name)
        return -1 if dims is None else len(dims)

    def _works_on(self, node: onnx.NodeProto, name: str, default: int, at: int | None) -> bool:
        """Whether a node's one axis is the tokens', or not known."""
        rank = self._rank(name)
        return at is None or rank < 1 or bool(attribute(node, "axis", default) % rank == at)

    def _axes(self, node: onnx.NodeProto, given: list[str], rank: int) -> list[int] | None:
        """The axes a node works on; None where they are not known."""
        values = self._known.get(given[0]) if given else attribute(node, "axes", None)
        if values is None and node.op_type.startswith("Arg"):
            values = [attribute(node, "axis", 0)]
        if values is None:
            return None
        # An Unsqueeze of several axes counts them all in the rank that negative ones are taken from.
        rank += len(values) - 1 if node.op_type == "Unsqueeze" else 0
        return [int(n) % rank for n in values]


def _elements(dims: Sequence[int | str | None]) -> int:
    """Elements of these sizes; 0 where that is not a fixed number."""
    return math.prod(n if isinstance(n, int) else 0 for n in dims)
