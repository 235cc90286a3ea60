"""Parts of a tensor that an exporter takes out of a sequence, as Slices: `torch.split` and `torch.unbind`.

A sequence is no tensor, so nothing tells its rows apart and no state holds it. What is taken from it by number is one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from stca.arrays import Array
from stca.export.analysis.integers import integers_of
from stca.export.analysis.scope import Dataflow, attribute
from stca.export.passes.nodes import NewNodes, names_in


def without_sequences(model: onnx.ModelProto) -> None:
    """Take parts by number from what is split and not from the sequence of its parts, in place; others stay."""
    graph = model.graph
    made = {n.output[0]: n for n in graph.node if n.op_type == "SplitToSequence" and not n.domain}
    if not made:
        return
    known, new = integers_of(model), NewNodes(names_in(graph))
    for node in graph.node:
        split = made.get(node.input[0]) if node.op_type == "SequenceAt" and not node.domain else None
        if split is None or not _taken(new, split, node, known):
            new.nodes.append(node)
    nodes = onnx.GraphProto(node=new.nodes)
    live, _ = Dataflow(nodes).needed(o.name for o in graph.output)
    del graph.node[:]
    graph.node.extend(node for i, node in enumerate(nodes.node) if i in live or node.output[0] not in made)
    graph.initializer.extend(new.weights)


def _taken(new: NewNodes, split: onnx.NodeProto, at: onnx.NodeProto, known: Mapping[str, Array]) -> bool:
    """Make what `at` takes from what `split` splits; False where its place is no constant."""
    x, axis, out = split.input[0], attribute(split, "axis", 0), at.output[0]
    place = known.get(at.input[1])
    if place is None or (number := int(place)) < 0:
        return False
    if len(split.input) < 2:  # one by one
        if attribute(split, "keepdims", 1):
            new.node("Slice", [x, *(new.integers([n]) for n in (number, number + 1, axis))], out, exact=True)
        else:
            new.node("Gather", [x, at.input[1]], out, exact=True, axis=axis)
        return True
    sizes = known.get(split.input[1])
    if sizes is None or (sizes.ndim and number >= len(sizes)):
        return False
    ends = np.cumsum(sizes if sizes.ndim else np.repeat(sizes, number + 1))
    start = int(ends[number - 1]) if number else 0
    new.node("Slice", [x, *(new.integers([n]) for n in (start, int(ends[number]), axis))], out, exact=True)
    return True
