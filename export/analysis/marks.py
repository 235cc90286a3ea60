"""Ids that stand for no event: those that a graph compares its input with, or whose row in the table is zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx.inliner
from onnx import numpy_helper

from stca.export.analysis import operators
from stca.export.analysis.cost import without_weights
from stca.export.analysis.integers import fold_integers, known_integers
from stca.export.analysis.scope import attribute, is_stand_in, walk

_HANDS_ON = (operators.VIEWS | operators.MOVES | {"Identity", "Cast"}) - {"Concat"}
_COMPARES = {"Equal": 0, "Greater": 0, "GreaterOrEqual": -1, "Less": 0, "LessOrEqual": 0}


def marks(model: onnx.ModelProto) -> dict[str, int]:
    """By input, the id that means no event, where the graph tells.

    `ids != 0` and `ids > 0` tell; so does a table whose row 0 is zero, as `padding_idx=0` makes it.

    Args:
        model: with its weights inline. Not changed.
    """
    light = onnx.inliner.inline_local_functions(without_weights(model))
    fold_integers(light)
    known, weights = known_integers(light.graph), {t.name: t for t in model.graph.initializer}
    nodes = list(walk(light.graph.node))
    found: dict[str, int] = {}
    for given in light.graph.input:
        compared, tables = _followed(nodes, given.name, known)
        rows = [numpy_helper.to_array(weights[n]) for n in tables if n in weights]
        if compared is not None:
            found[given.name] = compared
        elif rows and all(len(table) and not table[0].any() for table in rows):
            found[given.name] = 0
    return found


def _followed(
    nodes: Sequence[onnx.NodeProto], name: str, known: Mapping[str, onnx.TensorProto]
) -> tuple[int | None, list[str]]:
    """The id that an input's values are compared with, if any, and the tables in which they are looked up."""
    names, tables = {name}, []
    compared: int | None = None
    for node in nodes:
        read = [n for n in node.input if n in names]
        if is_stand_in(node) and node.input[0] in names:
            names.update(node.output)
        elif node.op_type in _HANDS_ON and node.input and node.input[0] in names:
            names.update(node.output)
            if node.op_type == "Cast" and attribute(node, "to", 0) == onnx.TensorProto.BOOL and compared is None:
                compared = 0
        elif node.op_type in _COMPARES and len(read) == 1 and compared is None:
            constants = [numpy_helper.to_array(known[n]) for n in node.input if n in known]
            if len(constants) == 1 and constants[0].size == 1:
                compared = int(constants[0].reshape(())) + _COMPARES[node.op_type]
        elif node.op_type == "Gather" and node.input[1] in names:
            tables.append(node.input[0])
    return compared, tables
