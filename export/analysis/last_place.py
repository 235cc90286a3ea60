"""Histories of which a graph reads the last place, whatever it holds: it must be an event, so padding goes before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import onnx
import onnx.inliner

from stca.arrays import Array
from stca.export.analysis import operators
from stca.export.analysis.cost import without_weights
from stca.export.analysis.integers import integers_of
from stca.export.analysis.scope import Dataflow, attribute, reads

_RECURRENT = ("GRU", "LSTM", "RNN")
_KEEPS_AXES = frozenset(("Concat", "CumSum", "Dropout", "Expand", "Pad", "Slice", "Split", "Trilu"))


def read_at_last(model: onnx.ModelProto) -> frozenset[tuple[str, int]]:
    """Inputs and their axes: those that lie along an axis of which the last place is read, and no other by its number.

    Args:
        model: not changed.
    """
    light = onnx.inliner.inline_local_functions(without_weights(model))
    known = integers_of(light)
    inferred = onnx.shape_inference.infer_shapes(light)
    values = (*inferred.graph.input, *inferred.graph.value_info)
    tensors = {v.name: v.type.tensor_type for v in values if v.type.tensor_type.HasField("shape")}
    shapes = {name: [d.dim_value for d in t.shape.dim] for name, t in tensors.items()}
    shapes |= {t.name: list(t.dims) for t in light.graph.initializer}
    read: dict[tuple[str, int], set[int]] = {}  # places, by value and axis
    found = set[tuple[str, int]]()
    for node in light.graph.node:
        shape = shapes.get(node.input[0], []) if node.input else []
        if node.op_type in _RECURRENT and shape and shape[0] > 1 and _ends_forward(node):
            found.add((node.input[0], 0))
        for axis, place in _places(node, known):
            if -len(shape) <= axis < len(shape) and shape[axis] > 1:
                read.setdefault((node.input[0], axis % len(shape)), set()).add(place % shape[axis])
    for (name, axis), places in read.items():
        if places == {shapes[name][axis] - 1}:
            found.add((name, axis))
    inputs = {i.name for i in model.graph.input} - {t.name for t in model.graph.initializer}
    return frozenset(at for at in _origins(light.graph, shapes, found) if at[0] in inputs)


def _origins(
    graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]], axes: Iterable[tuple[str, int]]
) -> set[tuple[str, int]]:
    """These axes of values, and those of other values that may lie along them: all that may, at an unknown operator.

    A vector's own axis, a target's and that of a hidden layer may be as long as a history, and are none.
    """
    flow = Dataflow(graph)
    seen, waiting = set[tuple[str, int]](), list(axes)
    while waiting:
        name, axis = at = waiting.pop()
        if at in seen or name not in shapes or not 0 <= axis < len(shapes[name]):
            continue
        seen.add(at)
        if name in flow.writer:
            node = graph.node[flow.writer[name]]
            waiting += _before(node, shapes, name, axis)
            unknown = flow.needed(n for n in reads(node) if n not in shapes)[1] & shapes.keys()
            waiting += _as_long(unknown, shapes, shapes[name][axis])
    return seen


def _before(
    node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]], name: str, axis: int
) -> Sequence[tuple[str, int]]:
    """Of what a node reads, the axes along which its result's may lie."""
    op, rank, size = node.op_type, len(shapes[name]), shapes[name][axis]
    given = [n for n in reads(node) if n in shapes]
    ranks = [len(shapes[n]) for n in given]
    from_end = [(n, axis - rank + r) for n, r in zip(given, ranks, strict=True)]
    if op in operators.ELEMENTWISE:
        return [(n, at) for n, at in from_end if at >= 0 and shapes[n][at] != 1]
    if op in operators.ALONG_AXIS | operators.PER_SAMPLE:
        return from_end[:1]
    if op == "Transpose":
        return [(node.input[0], attribute(node, "perm", range(rank)[::-1])[axis])]
    if op == "Gather" and len(given) == 2:
        first = attribute(node, "axis", 0) % ranks[0]
        if first <= axis < first + ranks[1]:
            return [(given[1], axis - first)]
        return [(given[0], axis if axis < first else axis - ranks[1] + 1)]
    if op == "MatMul" and len(given) == 2 and min(ranks) >= 2:
        kept = {rank - 1: from_end[1:], rank - 2: from_end[:1]}.get(axis, from_end)
        return [(n, at) for n, at in kept if at >= 0]
    if op == "Gemm":
        turned = attribute(node, "transB" if axis else "transA", 0)
        return [(node.input[axis], 1 - axis if turned else axis)]
    alike = _as_long(given, shapes, size)
    if op in _KEEPS_AXES:
        return [at for at in alike if at in from_end]
    if op in operators.VIEWS:
        return [at for at in alike if _same_steps(shapes[at[0]], at[1], shapes[name], axis)] or alike
    return alike


def _as_long(names: Iterable[str], shapes: Mapping[str, Sequence[int]], size: int) -> list[tuple[str, int]]:
    return [(name, axis) for name in names for axis, n in enumerate(shapes[name]) if n == size]


def _same_steps(shape: Sequence[int], at: int, other: Sequence[int], axis: int) -> bool:
    """Whether an axis of a view has as many elements after it, or before it, as that of its source; 0 is not known."""
    after, before = math.prod(shape[at + 1 :]), math.prod(shape[:at])
    return 0 < after == math.prod(other[axis + 1 :]) or 0 < before == math.prod(other[:axis])


def _ends_forward(node: onnx.NodeProto) -> bool:
    """Whether a recurrent node hands on the state after its last step, and does not know the lengths."""
    lengths = node.input[4:5]
    return (
        attribute(node, "direction", b"forward") == b"forward"
        and not any(lengths)
        and any(node.output[1:2])
        and not any(node.output[:1])
    )


def _places(node: onnx.NodeProto, known: dict[str, Array]) -> Sequence[tuple[int, int]]:
    """The axis and the place that a node reads, where it reads one by its number."""
    if node.op_type == "Gather":
        index = known.get(node.input[1])
        return [] if index is None or index.size != 1 else [(attribute(node, "axis", 0), int(index.reshape(())))]
    if node.op_type != "Slice":
        return []
    begin, end, axes, steps = ([*node.input, "", ""][i] for i in (1, 2, 3, 4))
    if any(n and n not in known for n in (begin, end, axes, steps)) or known[begin].size != 1:
        return []
    if steps and int(known[steps].reshape(())) != 1:
        return []
    first, last = int(known[begin].reshape(())), int(known[end].reshape(()))
    return [(int(known[axes].reshape(())) if axes else 0, first)] if first == -1 or last == first + 1 else []
