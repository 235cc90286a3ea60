"""Attention of targets over a history, in whatever spelling, as `stca::TargetHistoryAttention`.

What the operator lacks is made part of its inputs. A bias or a mask on the history becomes one more column of the key,
with a one in the query beside it: `[q, 1] · [k, bias] = q · k + bias`. A mask that puts a number in place of logits
makes the key zero there besides. So a history that is masked whole keeps the very scores it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from stca.export.analysis.layout import Atom, Layout
from stca.export.analysis.scope import label, opset_of
from stca.export.passes.attention import KEY, OUT, QUERY, VALUE, Attention, NoAttention, read
from stca.export.passes.nodes import NewNodes
from stca.export.passes.rules import Rewrite, View, rewritten
from stca.export.passes.softmax import mixes
from stca.export.passes.spell import is_attention, spelled
from stca.plugins.onnx_function import OLDEST_OPSET
from stca.plugins.spec import DOMAIN, OP_NAME, VALUE_TYPES

# A bias far below any logit. Lower ones are raised to it: a factor on them would make them infinite.
_LOWEST: Final = -1e30


@dataclass(frozen=True)
class Found:
    """What takes the place of an attention, or why it is left."""

    made: Rewrite | None
    why: str | None


class FuseAttention:
    """Rule: `mix(softmax(query · key), value)` of targets over a history → the operator."""

    name = "attention"

    def pattern(self, view: View, node: onnx.NodeProto) -> Found | None:
        """Every product that mixes by the weights of a softmax, and every `Attention` node."""
        if not is_attention(node) and not mixes(view, node):
            return None
        try:
            made = _fused(view, node, NewNodes(view.taken))
        except NoAttention:
            return None
        except Layout as e:
            return Found(None, str(e))
        return Found(made, None)

    def check(self, view: View, match: Found) -> str | None:
        """The reason that `pattern` met."""
        return match.why

    def rewrite(self, view: View, match: Found) -> Rewrite:
        """The operator, with what arranges its inputs and its result."""
        assert match.made is not None
        return match.made


def _fused(view: View, node: onnx.NodeProto, new: NewNodes) -> Rewrite:
    opset = opset_of(view.model)
    if opset < OLDEST_OPSET:
        raise Layout(f"the model is of opset {opset}; export it with {OLDEST_OPSET} or later")
    if is_attention(node):
        parts = spelled(view, node)
        view = rewritten(view, {view.flow.writer[node.output[0]]: parts})
        at, mix = next((i, w) for i, n in enumerate(parts.nodes) if (w := view.writer(n.output[0])) and mixes(view, w))
        made = _fused(view, mix, new)
        return Rewrite([*parts.nodes[:at], *made.nodes, *parts.nodes[at + 1 :]], [*parts.weights, *made.weights])
    found = read(view, node)
    kinds = {str(view.tried[0].values[name].dtype) for name in found.sources.values()}
    if odd := kinds - {"float32", "float16", "bfloat16"}:
        raise Layout(f"it computes in {min(odd)}; the operator knows {', '.join(VALUE_TYPES)}")
    return _Emitter(view, found, new).run()


class _Emitter:
    """Makes the nodes in place of the one that mixes the values."""

    def __init__(self, view: View, found: Attention, new: NewNodes) -> None:
        self.view, self.found, self.new = view, found, new
        self.first, self.second = (r.run for r in found.readings)
        self.stem = label(found.node)
        self.made: dict[str, str] = {}

    def run(self) -> Rewrite:
        t, h, history, depth, wide = (self.found.axes[role] for role in "thlde")
        of_history: list[Atom] = [] if self.found.shared else h
        query = self._arranged(QUERY, self.found.sources[QUERY], [t, h, depth])
        key = self._arranged(KEY, self.found.sources[KEY], [history, of_history, depth])
        value = self._arranged(VALUE, self.found.sources[VALUE], [history, of_history, wide])
        kind, out_kind = self._kind(), self._dtype(self.found.node.output[0])
        query, key, value = (
            self._cast(name, self._dtype(self.found.sources[role]), kind)
            for role, name in ((QUERY, query), (KEY, key), (VALUE, value))
        )
        scale, steps = self._scale()
        query, key, bias = self._with_steps(query, key, steps, kind)
        value = self._weighed(value, kind)
        offsets = self._segments(query, key, bias)
        out = self._node(
            OP_NAME, [query, key, value, *offsets], "attended", domain=DOMAIN, scale=scale, plugin_namespace=DOMAIN
        )
        out = self._cast(self._of_kept_heads(out, bias, kind), kind, out_kind)
        self._put_back(out, [t, h, wide])
        return Rewrite(self.new.nodes, self.new.weights)

    # Inputs and result in the operator's layout

    def _arranged(self, role: str, source: str, groups: Sequence[Sequence[Atom]], expand: bool = True) -> str:
        """`source` with one axis for each group of atoms; along atoms that it does not have it is repeated."""
        flat = [a for group in groups for a in group]
        own = [a for a in flat if a.strides.get(role, 0)]
        shape, total = self.first.shape(source), 1
        stem = "bias" if role.isdigit() else "weight" if role.startswith("factor") else role
        ordered = sorted(own, key=lambda a: -a.strides[role])
        for a in reversed(ordered):
            if a.strides[role] != total:
                raise Layout(f"its {stem} takes a part of {source!r}")
            total *= a.sizes[0]
        if total != int(np.prod(shape)):
            raise Layout(f"its {stem} takes a part of {source!r}")
        now = [self.first.shape(source), self.second.shape(source)]
        name = self._reshaped(source, [a.dim for a in ordered], now, stem)
        perm = [ordered.index(a) for a in own]
        if perm != list(range(len(perm))):
            name = self._node("Transpose", [name], stem, perm=perm)
        dims: list[int] = [a.dim if a in own else 1 for a in flat]
        if len(own) < len(flat) and expand:
            name = self._reshaped(name, dims, None, stem)
            name = self._node("Expand", [name, self.new.integers([a.dim if a not in own else 1 for a in flat])], stem)
            dims = [a.dim for a in flat]
        groups_dims, i = [], 0
        for group in groups:
            groups_dims.append(_merged(dims[i : i + len(group)]))
            i += len(group)
        return self._reshaped(name, groups_dims, [tuple(dims)] * 2 if expand or len(own) == len(flat) else None, stem)

    def _reshaped(self, name: str, dims: Sequence[int], now: Sequence[tuple[int, ...]] | None, stem: str) -> str:
        if dims.count(-1) > 1:
            raise Layout(f"{name!r} has more than one size that is free")
        if now is not None:
            same = all(len(n) == len(dims) for n in now)
            if same and all(
                d == a == b or (d == -1 and (a != b or a == -1)) for d, a, b in zip(dims, *now, strict=True)
            ):
                return name
        return self._node("Reshape", [name, self.new.integers(dims)], stem)

    def _put_back(self, out: str, groups: Sequence[Sequence[Atom]]) -> None:
        """The operator's result in the shape that the mix had, under its name."""
        flat = [a for group in groups for a in group]
        name = self._reshaped(
            out, [a.dim for a in flat], [tuple(_merged([a.dim for a in g]) for g in groups)] * 2, "attended_by_head"
        )
        ordered = sorted(flat, key=lambda a: -a.strides[OUT])
        perm = [flat.index(a) for a in ordered]
        if perm != list(range(len(perm))):
            name = self._node("Transpose", [name], "attended_moved", perm=perm)
        target = self.found.node.output[0]
        shape = [a if a == b else -1 for a, b in zip(self.first.shape(target), self.second.shape(target), strict=True)]
        if shape.count(-1) > 1:
            raise Layout("its result has more than one size that is free")
        self.new.node("Reshape", [name, self.new.integers(shape)], target, exact=True)

    # What is done to the logits

    def _scale(self) -> tuple[float, list[int]]:
        """The operator's factor, and the steps that are left, from the product on."""
        steps = self.found.readings[0].steps
        order = list(range(len(steps)))[::-1]
        if not all(steps[i].is_number and steps[i].op in ("Mul", "Div") for i in order):
            return 1.0, order
        total = 1.0
        for i in order:
            factor = self.view.constant(steps[i].other)
            if factor is None:
                return 1.0, order
            number = float(factor.ravel()[0])
            total = total * number if steps[i].op == "Mul" else total / number
        exact = float(np.float32(total)) == total  # else its rounding would be one more than the model's
        return (total, []) if exact else (1.0, order)

    def _with_steps(self, query: str, key: str, order: Sequence[int], kind: np.dtype[Any]) -> tuple[str, str, str]:
        bias = ""
        history, heads = self.found.axes["l"], [] if self.found.shared else self.found.axes["h"]
        for i in order:
            step = self.found.readings[0].steps[i]
            if step.is_number and step.op in ("Mul", "Div"):
                number = self._cast(self._number(step.other), self._dtype(step.other), kind)
                query = self._node(step.op, [query, number], "query_scaled")
                bias = bias and self._node(step.op, [bias, number], "bias_scaled")
                continue
            other = self._arranged(str(i), step.other, [history, heads, []], expand=False)
            if step.op == "Where":
                zero, fill = self._constant(0.0, kind), self._fill(step.fill, kind)
                sides = ([key, zero], [bias or zero, fill])
                key, bias = (
                    self._node("Where", [other, *(pair if step.keeps else pair[::-1])], name)
                    for pair, name in zip(sides, ("key_masked", "mask"), strict=True)
                )
                continue
            other = self._cast(other, self._dtype(step.other), kind)
            if step.op in ("Mul", "Div"):
                key = self._node(step.op, [key, other], "key_scaled")
                bias = bias and self._node(step.op, [bias, other], "bias_scaled")
            elif bias:
                bias = self._node(step.op, [bias, other], "bias")
            else:
                bias = other if step.op == "Add" else self._node("Neg", [other], "bias")
        if not bias:
            return query, key, ""
        pads, one = self.new.integers([0, 0, 0, 0, 0, 1]), self._constant(1.0, kind)
        query = self._node("Pad", [query, pads, one], "query_and_one")
        column = self._column(bias, key, order)
        return query, self._node("Concat", [key, column], "key_and_bias", axis=2), bias

    def _column(self, bias: str, key: str, order: Sequence[int]) -> str:
        """The bias with a row for each token and head of the key."""
        steps = [str(i) for i in order]
        along = {role: any(a.strides[s] for a in self.found.axes[role] for s in steps) for role in "lh"}
        heads = int(np.prod([a.dim for a in ([] if self.found.shared else self.found.axes["h"])], dtype=np.int64))
        if not along["l"]:
            rows = self._node("Shape", [key], "key_rows", start=0, end=2)
            shape = self._node("Concat", [rows, self.new.integers([1])], "column_shape", axis=0)
        elif heads == 1 or (along["h"] and not self.found.shared and len(self.found.axes["h"]) == 1):
            return bias
        else:
            shape = self.new.integers([1, heads, 1])
        return self._node("Expand", [bias, shape], "bias_column")

    def _weighed(self, value: str, kind: np.dtype[Any]) -> str:
        """The value times what its weights are multiplied by."""
        groups = [self.found.axes["l"], [] if self.found.shared else self.found.axes["h"], []]
        for factor in self.found.readings[0].weights.factors:
            other = self._arranged(factor.role, factor.other, groups, expand=False)
            if factor.op == "Mul":
                value = self._node("Mul", [value, self._cast(other, self._dtype(factor.other), kind)], "value_weighed")
            else:
                pair = [value, self._constant(0.0, kind)]
                value = self._node("Where", [other, *(pair if factor.keeps else pair[::-1])], "value_masked")
        return value

    def _fill(self, name: str, kind: np.dtype[Any]) -> str:
        (number,) = np.unique(self.first.values[name])
        return self._constant(number if np.isinf(number) else max(float(number), _LOWEST), kind)

    def _segments(self, query: str, key: str, bias: str) -> tuple[str, str, str]:
        """Offsets of the only request, and how much of its history counts."""
        zero = self._constant(0, np.dtype(np.int32), 1)
        counts = []
        for name in (query, key):
            size = self._node("Shape", [name], "rows", start=0, end=1)
            counts.append(self._node("Cast", [size], "rows_32", to=onnx.TensorProto.INT32))
        targets, history = (self._node("Concat", [zero, n], "offsets", axis=0) for n in counts)
        lengths = counts[1]
        if bias and self.found.readings[0].weights.safe and not self._masks_heads():
            kept32 = self._node("Cast", [self._kept(bias)], "any_kept_32", to=onnx.TensorProto.INT32)
            lengths = self._node("Mul", [lengths, kept32], "lengths")  # one that is masked whole counts for nothing
        return targets, history, lengths

    def _of_kept_heads(self, out: str, bias: str, kind: np.dtype[Any]) -> str:
        """Zeros for heads whose history is masked whole, where each head has a mask of its own."""
        if not bias or not self.found.readings[0].weights.safe or not self._masks_heads():
            return out
        kept = self._kept(bias, axes=[0])
        return self._node("Where", [kept, out, self._constant(0.0, kind)], "attended_or_zero")

    def _masks_heads(self) -> bool:
        return any(a.strides[s] for a in self.found.axes["h"] for s in a.strides if s.isdigit())

    def _kept(self, bias: str, axes: Sequence[int] | None = None) -> str:
        """Whether a history has events that count: at all, or over the first axis for each head."""
        opset = opset_of(self.view.model)
        inputs = [self.new.integers(axes)] if axes and opset >= 18 else []
        given: dict[str, Any] = {"axes": list(axes)} if axes and opset < 18 else {}
        highest = self._node("ReduceMax", [bias, *inputs], "highest_bias", keepdims=int(axes is not None), **given)
        return self._node("Greater", [highest, self._constant(float("-inf"), self._kind())], "any_kept")

    # Nodes

    def _kind(self) -> np.dtype[Any]:
        """The operator's type: the query's, or that of the logits where these take a bias in another."""
        steps = self.found.readings[0].steps
        biased = any(not s.is_number or s.op == "Where" for s in steps)
        return self._dtype(self.found.readings[0].weights.softmax.input[0] if biased else self.found.sources[QUERY])

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind: np.dtype[Any] = self.first.values[name].dtype
        return kind

    def _cast(self, name: str, of: np.dtype[Any], to: np.dtype[Any]) -> str:
        if of == to:
            return name
        return self._node("Cast", [name], f"as_{to}", to=helper.np_dtype_to_tensor_dtype(to))

    def _number(self, name: str) -> str:
        """A value of one element without its axes, which would be more than the operator's."""
        return (
            name
            if len(self.first.shape(name)) <= 3
            else self._node("Reshape", [name, self.new.integers([1])], "number")
        )

    def _node(self, op: str, inputs: Sequence[str], name: str, domain: str = "", **attributes: Any) -> str:
        return self.new.node(op, inputs, f"{self.stem}_{name}", domain=domain, **attributes)

    def _constant(self, number: float, kind: np.dtype[Any], axes: int = 0) -> str:
        """A number in the graph; an initializer would be one of the model's weights."""
        name = f"{number:g}_{kind}"
        if name not in self.made:
            value = numpy_helper.from_array(np.full((1,) * axes, number, kind))
            self.made[name] = self._node("Constant", [], name, value=value)
        return self.made[name]


def _merged(dims: Sequence[int]) -> int:
    return -1 if -1 in dims else int(np.prod(dims, dtype=np.int64))
