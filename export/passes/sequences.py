"""Parts that an exporter takes out of a sequence, as tensors: of `torch.split`, `torch.unbind` and `torch.hstack`.

A sequence is no tensor, so nothing tells its rows apart and no state holds it. What is taken from it by number is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import onnx

from stca.arrays import Array
from stca.export.analysis.integers import integers_of
from stca.export.analysis.scope import Dataflow, attribute, subgraphs
from stca.export.passes.branches import take_branches
from stca.export.passes.nodes import NewNodes, inlined, names_in

_MAKERS: Final = ("SplitToSequence", "SequenceConstruct", "SequenceMap")


def without_sequences(model: onnx.ModelProto) -> None:
    """Take parts by number from what is split or put together and not from the sequence, in place; others stay.

    Branches that such a graph takes by the rank of a part are told from then on, and may read sequences themselves.
    """
    _part(model)
    if take_branches(model):
        _part(model)


def _part(model: onnx.ModelProto) -> None:
    graph = model.graph
    makers = {n.output[0]: n for n in graph.node if n.op_type in _MAKERS and not n.domain}
    if not makers:
        return
    splits = {name: n for name, n in makers.items() if n.op_type == "SplitToSequence"}
    known, new = integers_of(model), NewNodes(names_in(graph))
    listed: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type == "SequenceConstruct" and not node.domain:
            listed[node.output[0]] = list(node.input)
        elif node.op_type == "SequenceMap" and not node.domain and node.input[0] in listed and len(node.input) == 1:
            (body,) = subgraphs(node)
            if not body.initializer and len(body.output) == 1:  # `lift_weights` leaves none in a file's model
                of = body.input[0].name
                listed[node.output[0]] = [inlined(new, body, {of: part})[0] for part in listed[node.input[0]]]
        taken = node.op_type == "SequenceAt" and not node.domain
        if taken and (part := _listed_part(listed.get(node.input[0], []), known.get(node.input[1]))):
            new.node("Identity", [part], node.output[0], exact=True)
            continue
        if node.op_type == "ConcatFromSequence" and (parts := listed.get(node.input[0])):
            _joined(new, node, parts)
            continue
        split = splits.get(node.input[0]) if taken else None
        if split is None or not _taken(new, split, node, known):
            new.nodes.append(node)
    nodes = onnx.GraphProto(node=new.nodes)
    live, _ = Dataflow(nodes).needed(o.name for o in graph.output)
    del graph.node[:]
    graph.node.extend(node for i, node in enumerate(nodes.node) if i in live or node.output[0] not in makers)
    graph.initializer.extend(new.weights)


def _listed_part(parts: Sequence[str], place: Array | None) -> str | None:
    """The part at a place; None where that is no constant, or beyond the parts, where the model itself fails."""
    if place is None or not -len(parts) <= int(place) < len(parts):
        return None
    return parts[int(place)]


def _joined(new: NewNodes, node: onnx.NodeProto, parts: Sequence[str]) -> None:
    """Make what `node` joins, by a Concat of the parts."""
    axis, out = attribute(node, "axis", None), node.output[0]
    if attribute(node, "new_axis", 0):
        parts = [new.node("Unsqueeze", [part, new.integers([axis])], f"{out}_part") for part in parts]
    new.node("Concat", parts, out, exact=True, axis=axis)


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
