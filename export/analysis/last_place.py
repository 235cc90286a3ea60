"""Histories of which a graph reads the last place, whatever it holds: it must be an event, so padding goes before."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx.inliner

from stca.arrays import Array
from stca.export.analysis.cost import without_weights
from stca.export.analysis.integers import integers_of
from stca.export.analysis.scope import attribute

_RECURRENT = ("GRU", "LSTM", "RNN")


def read_at_last(model: onnx.ModelProto) -> frozenset[int]:
    """Fixed sizes of axes of which a value's last place is read, and no other by its number.

    Args:
        model: not changed.
    """
    light = onnx.inliner.inline_local_functions(without_weights(model))
    known = integers_of(light)
    inferred = onnx.shape_inference.infer_shapes(light)
    values = (*inferred.graph.input, *inferred.graph.value_info)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    read: dict[tuple[str, int], set[int]] = {}  # places, by value and axis
    found = set[int]()
    for node in light.graph.node:
        shape = shapes.get(node.input[0], []) if node.input else []
        if node.op_type in _RECURRENT and shape and shape[0] > 1 and _ends_forward(node):
            found.add(shape[0])
        for axis, place in _places(node, known):
            if axis < len(shape) and shape[axis] > 1:
                read.setdefault((node.input[0], axis % len(shape)), set()).add(place % shape[axis])
    for (name, axis), places in read.items():
        if places == {shapes[name][axis] - 1}:
            found.add(shapes[name][axis])
    return frozenset(found)


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
    first, last = int(known[begin].reshape(())), int(known[end].reshape(()))
    return [(int(known[axes].reshape(())) if axes else 0, first)] if first == -1 or last == first + 1 else []
