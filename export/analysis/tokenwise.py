"""Which values have one row per history token, made from that token's inputs and the weights alone: by dataflow.

Such a row does not change when tokens are added before or after it, whatever their number, and that is what a state
that can be appended to is made of. A check on random tokens cannot show it: a convolution that looks 500 tokens back
is unseen in any shorter history. So every operator on the way must be one of those below, used in one of the ways
below; what is not known does not count.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import numpy_helper

from stca.export.analysis import operators
from stca.export.analysis.cost import Sizes, any_sizes, without_weights
from stca.export.analysis.integers import fold_integers
from stca.export.analysis.scope import attribute, label, reads, subgraphs
from stca.manifest import TOKENS


class Tokenwise:
    """What is shown of each value of a graph.

    Args:
        model: the user encoder; its functions but the operator's are inlined.
        tokens: its inputs with one row per token.

    Attributes:
        rows: values with one row per token, each made of its own token.
        fixed: values that follow from weights and constants.
        sizes: values that follow from these and from the number of tokens, such as the shape that a Reshape is given.
        why_not: of any other value, what comes in first on its way that is not known to keep tokens apart.
    """

    def __init__(self, model: onnx.ModelProto, tokens: Collection[str]) -> None:
        self._inferred = Sizes(model, any_sizes(model.graph)).dims
        light = without_weights(model)
        fold_integers(light)
        self._known = {t.name: numpy_helper.to_array(t) for t in light.graph.initializer}
        self.rows = set(tokens)
        self.fixed = {t.name for t in (*model.graph.initializer, *light.graph.initializer)}
        self.sizes: set[str] = set()
        self.why_not = {i.name: f"input {i.name!r}, which has no row per token" for i in light.graph.input}
        for node in light.graph.node:
            self._visit(node)

    def _visit(self, node: onnx.NodeProto) -> None:
        names = reads(node)[: 1 if node.op_type == "CastLike" else None]  # of the other, it takes the type alone
        unknown = next((n for n in names if n not in self.rows | self.fixed | self.sizes), None)
        if unknown is not None:
            self.why_not.update(dict.fromkeys(node.output, self.why_not.get(unknown, f"value {unknown!r}")))
        elif self.fixed.issuperset(names):
            self.fixed.update(node.output)
        elif node.op_type in operators.SIZES or (self.rows.isdisjoint(names) and not self._is_repeated(node)):
            self.sizes.update(node.output)
        elif not node.domain and not any(subgraphs(node)) and self._keeps_tokens_apart(node):
            self.rows.update(node.output)
        else:
            reason = f"node {label(node)!r} ({node.op_type}), which is not known to keep tokens apart"
            self.why_not.update(dict.fromkeys(node.output, reason))

    def _keeps_tokens_apart(self, node: onnx.NodeProto) -> bool:
        """Whether row i of the outputs is made of row i of those inputs that have a row per token, and of no other."""
        op, given = node.op_type, [name for name in node.input if name]
        first, others, rank = given[0], given[1:], self._rank(given[0])
        here = [name in self.rows for name in given]
        if self.rows.isdisjoint(given):
            return self._is_repeated(node)
        if op == "CastLike":
            return True
        if op not in ("Reshape", "Expand") and not self.sizes.isdisjoint(given):
            return False  # a position, perhaps
        if op in operators.ELEMENTWISE:
            width = self._rank(node.output[0])
            return width > 0 and all(
                self._rank(n) == width if n in self.rows else self._is_shared(n, width) for n in given
            )
        if op == "MatMul":
            return here == [True, False] and rank >= 2 and 0 <= self._rank(others[0]) <= 2
        if op == "Gemm":
            shared = all(self._is_shared(name, 2) for name in others[1:])
            return here[0] and not any(here[1:]) and shared and not attribute(node, "transA", 0)
        if op == "Einsum":
            return self._einsum(attribute(node, "equation", b"").decode(), here)
        axis = attribute(node, "axis", 0)
        if op == "Gather":  # a row of a table for each token, or columns of each token's row
            return axis == 0 if here == [False, True] else here == [True, False] and axis % max(rank, 1) > 0
        if op == "GatherND":
            return here == [False, True] and not attribute(node, "batch_dims", 0)
        if op == "Concat":
            return all(here) and axis % max(self._rank(first), 1) > 0
        if not here[0] or any(here[1:]) or rank < 1:
            return False
        if op in operators.PER_SAMPLE:
            return rank >= 2 and not attribute(node, "training_mode", 0)
        if op in operators.ALONG_AXIS or op in ("OneHot", "Split"):
            axis = attribute(node, "axis", 0 if op == "Split" else -1)
            return bool(axis % (rank + (op == "OneHot")) > 0)
        if op in operators.REDUCTIONS or op in ("ArgMax", "ArgMin", "Squeeze", "Unsqueeze"):
            axes = self._axes(node, others[:1], rank + (op == "Unsqueeze"))
            return bool(axes) and 0 not in axes
        if op == "Slice":
            axes = self._axes(node, list(node.input[3:4]), rank)
            return bool(axes) and 0 not in axes
        if op == "Transpose":
            return bool(attribute(node, "perm", [-1])[0] == 0)
        if op == "Flatten":
            return bool(attribute(node, "axis", 1) == 1)
        if op == "Reshape":  # as many elements in a row as before, so as many rows
            return 0 < self._row_elements(first) == self._row_elements(node.output[0])
        if op == "Expand":
            out = self._dims(node.output[0]) or ()
            return len(out) == rank and out[0] == TOKENS
        return False

    def _is_repeated(self, node: onnx.NodeProto) -> bool:
        """Whether a node gives every token the same constant row."""
        out = self._dims(node.output[0]) or ()
        if node.domain or out[:1] != (TOKENS,):
            return False
        if node.op_type == "Expand":
            return node.input[0] in self.fixed and self._is_shared(node.input[0], len(out))
        return node.op_type == "ConstantOfShape"

    def _is_shared(self, name: str, rank: int) -> bool:
        """Whether broadcasting a constant to `rank` axes gives every row the same."""
        dims = self._dims(name)
        return name in self.fixed and dims is not None and (len(dims) < rank or dims[:1] == (1,))

    def _dims(self, name: str) -> tuple[int | str | None, ...] | None:
        return self._known[name].shape if name in self._known else self._inferred(name)

    def _rank(self, name: str) -> int:
        dims = self._dims(name)
        return -1 if dims is None else len(dims)

    def _row_elements(self, name: str) -> int:
        """Elements of one row; 0 where that is not a fixed number."""
        product = 1
        for n in (self._dims(name) or (0, 0))[1:]:
            product *= n if isinstance(n, int) else 0
        return product

    def _axes(self, node: onnx.NodeProto, given: list[str], rank: int) -> list[int]:
        """The axes a node works on; [0] where they are not known."""
        values = self._known.get(given[0]) if given else attribute(node, "axes", None)
        if values is None and node.op_type.startswith("Arg"):
            values = [attribute(node, "axis", 0)]
        if values is None:
            return [0]
        # An Unsqueeze of several axes counts them all in the rank that negative ones are taken from.
        rank += len(values) - 1 if node.op_type == "Unsqueeze" else 0
        return [int(n) % rank for n in values]

    def _einsum(self, equation: str, here: list[bool]) -> bool:
        """The tokens' label comes first in each operand that has them, and in the result, and nowhere else."""
        left, arrow, out = equation.replace(" ", "").partition("->")
        terms = left.split(",")
        if not arrow or not out or "." in equation:
            return False
        token = out[0]
        return all(t.count(token) == (t[:1] == token) == of for t, of in zip(terms, here, strict=True))
