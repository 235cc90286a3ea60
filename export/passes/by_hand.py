"""A softmax written by hand: exponentials over their sum, below the largest logit or not, guarded against zero or not.

e = exp(a - a.max(-1, keepdim=True).values)
weights = e / (e.sum(-1, keepdim=True) + 1e-9)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from stca.export.analysis.cost import any_sizes
from stca.export.analysis.operators import VIEWS
from stca.export.analysis.scope import attribute, label
from stca.export.passes.nodes import rename
from stca.export.passes.rules import View

_GUARDS = frozenset(("Add", "Clip", "Max"))
_PASSING = VIEWS | {"Cast", "Expand", "Identity", "Transpose"}
# Nodes above a value that are looked at.
_MOST = 40


@dataclass(frozen=True)
class _Reduced:
    """What a value was reduced from.

    Attributes:
        of: the value whose elements along `axis` became one.
        axis: counted from the first; None where it is not one axis, or its place is not kept.
        guards: nodes that add a number to the result, or keep it above one; the last is applied first.
    """

    of: str
    axis: int | None
    guards: tuple[onnx.NodeProto, ...]


@dataclass(frozen=True)
class _Share:
    """Exponentials over their sum along one axis.

    Attributes:
        exponents: what was raised.
        axis: of the sum, counted from the first.
        guards: of the sum, as in `_Reduced`.
        logits: what the exponents are below the largest of along that axis; None where they are not.
    """

    exponents: str
    axis: int
    guards: tuple[onnx.NodeProto, ...]
    logits: str | None


def softmax_by_hand(view: View, node: onnx.NodeProto) -> tuple[str, int] | None:
    """The logits and the axis of the softmax that a Div computes; None where it is none, or only nearly."""
    share = _share(view, node)
    if share is None or share.guards:
        return None
    return share.logits or share.exponents, share.axis


def why_no_softmax(view: View, node: onnx.NodeProto) -> str | None:
    """Why a node that weighs by exponentials computes no softmax; None where it does, or does no such thing."""
    if node.domain or node.op_type not in ("Div", "Exp") or softmax_by_hand(view, node) is not None:
        return None
    if node.op_type == "Exp":
        sums = any(r.op_type == "ReduceSum" and not r.domain for r in view.readers(node.output[0]))
        return f"its exponentials {node.output[0]!r} meet the values before their sum divides them" if sums else None
    total = _reduced(view, node.input[1], "ReduceSum")
    if total is None or total.of != node.input[0] or not any(n.op_type == "Exp" for n in _above(view, total.of)):
        return None
    advice = "write torch.softmax, with -inf as the logits of what is masked"
    if (last := view.writer(total.of)) is not None and last.op_type != "Exp":
        return f"its exponentials are changed before they are summed, by {label(last)!r} ({last.op_type}); {advice}"
    if total.guards:
        guard = total.guards[0]
        what = f"its sum of exponentials is guarded by {label(guard)!r} ({guard.op_type})"
        return f"{what}, which changes scores where the sum is small; {advice}"
    return f"its exponentials are divided by a sum over more, or other, than one axis; {advice}"


def drop_idle_guards(model: onnx.ModelProto) -> None:
    """Leave out what guards a sum of exponentials that is at least 1 anyway, in place.

    The largest logit was taken off, so one exponential is 1. A number that 1 swallows in the sum's own type changes no
    bit of it: s + 1e-9 is s. A sum that is no number, of logits that are all -inf, stays none.
    """
    kinds = {(n.op_type, n.domain) for n in model.graph.node}
    if not {("Exp", ""), ("ReduceMax", ""), ("ReduceSum", "")} <= kinds:
        return
    view, idle = View(model, {}, any_sizes(model.graph)), dict[str, str]()
    for node in model.graph.node:
        share = _share(view, node)
        if share is None or share.logits is None:
            continue
        kind = helper.tensor_dtype_to_np_dtype(view.sizes.element_type(node.input[0]))
        if all(_is_idle(view, guard, kind) for guard in share.guards):
            idle |= {guard.output[0]: _guarded(view, guard) for guard in share.guards}
    if not idle:
        return
    bare, kept = {guard: _last(idle, guard) for guard in idle}, []
    for node in model.graph.node:
        rename(node, bare)
        if node.output[0] not in idle or view.is_output(node.output[0]):
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _last(idle: dict[str, str], name: str) -> str:
    while name in idle:
        name = idle[name]
    return name


def _is_idle(view: View, guard: onnx.NodeProto, kind: np.dtype[Any]) -> bool:
    """Whether a guard leaves numbers from 1 on as they are, in every bit."""
    if any(guard.input[2:]) and guard.op_type == "Clip":  # it has a largest value, too
        return False
    numbers = [x for n in guard.input if (x := view.constant(n)) is not None]
    if len(numbers) != 1 or numbers[0].size != 1:
        return False
    number, one = numbers[0].ravel()[0].astype(kind), kind.type(1)
    return bool(number >= 0 and one + number == one if guard.op_type == "Add" else number <= one)


def _guarded(view: View, guard: onnx.NodeProto) -> str:
    return str(next(n for n in guard.input if view.constant(n) is None))


def _share(view: View, node: onnx.NodeProto) -> _Share | None:
    """The shares that a Div computes; None where it does not, or over more than one axis."""
    if node.domain or node.op_type != "Div":
        return None
    raised, total = _writer(view, node.input[0], "Exp"), _reduced(view, node.input[1], "ReduceSum")
    if raised is None or total is None or total.of != node.input[0] or total.axis is None:
        return None
    largest = _largest(view, raised)
    logits = largest.of if largest is not None and largest.axis == total.axis else None
    return _Share(raised.input[0], total.axis, total.guards, logits)


def _largest(view: View, raised: onnx.NodeProto) -> _Reduced | None:
    """What an Exp's logits are taken off from, where they are so by their largest one: it changes but the range."""
    shifted = _writer(view, raised.input[0], "Sub")
    found = None if shifted is None else _reduced(view, shifted.input[1], "ReduceMax")
    return found if found and shifted and found.of == shifted.input[0] and not found.guards else None


def _reduced(view: View, name: str, by: str) -> _Reduced | None:
    """What `name` was reduced from by an operator, with its axis put back."""
    guards, back = list[onnx.NodeProto](), list[onnx.NodeProto]()
    for _ in range(_MOST):
        node = view.writer(name)
        if node is None or node.domain:
            return None
        if node.op_type == by:
            return _Reduced(node.input[0], _axis(view, node, back), tuple(guards))
        if node.op_type == "Unsqueeze":
            back.append(node)
            name = node.input[0]
        elif node.op_type in _GUARDS and sum(view.constant(n) is None for n in node.input if n) == 1:
            guards.append(node)
            name = _guarded(view, node)
        else:
            return None
    return None


def _axis(view: View, node: onnx.NodeProto, back: list[onnx.NodeProto]) -> int | None:
    """The only axis that a node reduces, if it is kept, or put back where it was."""
    shape, axes = view.sizes.dims(node.input[0]), _axes(view, node)
    if shape is None or len(axes) != 1:
        return None
    (axis,) = (a % len(shape) for a in axes)
    if attribute(node, "keepdims", 1):
        return axis if not back else None
    return axis if len(back) == 1 and [a % len(shape) for a in _axes(view, back[0])] == [axis] else None


def _axes(view: View, node: onnx.NodeProto) -> list[int]:
    axes = attribute(node, "axes", None)
    if axes is None and len(node.input) > 1 and (given := view.constant(node.input[1])) is not None:
        axes = given.ravel().tolist()
    return list(axes or ())


def _above(view: View, name: str) -> Iterator[onnx.NodeProto]:
    """The nearest nodes that a value is arranged, scaled or masked from, as far as the first Exp of each."""
    pending = [name]
    for _ in range(_MOST):
        node = view.writer(pending.pop()) if pending else None
        if node is None or node.domain:
            continue
        yield node
        if node.op_type in ("Mul", "Where"):
            pending += node.input
        elif node.op_type in _PASSING:
            pending += node.input[:1]


def _writer(view: View, name: str, op: str) -> onnx.NodeProto | None:
    node = view.writer(name)
    return node if node is not None and (node.op_type, node.domain) == (op, "") else None
