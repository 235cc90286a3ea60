"""Tables of positions: rows that a graph takes by the length of its history, so that no longer one can be served."""

from __future__ import annotations

import onnx
import onnx.inliner

from stca.export.analysis.cost import without_weights
from stca.export.analysis.scope import reads, walk

# These make sizes of whatever they are given.
_MEASURES = ("Shape", "Size")
_TAKES = ("Gather", "Slice")


def position_tables(model: onnx.ModelProto) -> tuple[int, ...]:
    """Rows of the tables that are looked up, or cut, by sizes alone; smallest first.

    Args:
        model: with its weights inline. Not changed.
    """
    graph = onnx.inliner.inline_local_functions(without_weights(model)).graph
    rows = {t.name: t.dims[0] for t in model.graph.initializer if len(t.dims) > 1}
    of_values = {value.name for value in model.graph.input}
    found = set[int]()
    for node in walk(graph.node):
        inputs = reads(node)
        if node.op_type in _MEASURES or of_values.isdisjoint(inputs):
            if node.op_type in _TAKES and node.input[0] in rows and any(n not in rows for n in node.input[1:]):
                found.add(rows[node.input[0]])
        else:
            of_values.update(node.output)
    return tuple(sorted(found))
