"""Tables of positions: rows that a graph takes by the length of its history, so that no longer one can be served."""

from __future__ import annotations

import onnx
import onnx.inliner

from stca.export.analysis.cost import without_weights
from stca.export.analysis.scope import reads, walk

# These make sizes of whatever they are given.
_MEASURES = ("Shape", "Size")
_TAKES = ("Gather", "Slice")


def position_tables(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Tables that are looked up, or cut, by sizes alone, and their sizes: a history may be as long as one of these.

    Args:
        model: with its weights inline or hollow. Not changed.
    """
    graph = onnx.inliner.inline_local_functions(without_weights(model)).graph
    sizes = {t.name: tuple(t.dims) for t in model.graph.initializer if len(t.dims) > 1}
    of_values = {value.name for value in model.graph.input}
    found: dict[str, tuple[int, ...]] = {}
    for node in walk(graph.node):
        inputs = reads(node)
        if node.op_type in _MEASURES or of_values.isdisjoint(inputs):
            if node.op_type in _TAKES and node.input[0] in sizes and any(n not in sizes for n in node.input[1:]):
                found[node.input[0]] = sizes[node.input[0]]
        else:
            of_values.update(node.output)
    return found
