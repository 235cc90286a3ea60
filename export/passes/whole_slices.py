"""Slices that take all there is: what torch's newer exporter writes for each `:` in `x[:, :, None]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx

from stca.arrays import Array
from stca.export.analysis.integers import integers_of
from stca.export.passes.nodes import rename

# An end from here on is no place in an axis.
_BEYOND: Final = (1 << 31) - 1


def drop_whole_slices(model: onnx.ModelProto) -> None:
    """Let readers of such a Slice read its input, in place; one that makes an output of the graph stays."""
    graph = model.graph
    if not any(_has_ends(node) for node in graph.node):
        return
    known = integers_of(model)
    outputs = {o.name for o in graph.output}
    source: dict[str, str] = {}
    kept = []
    for node in graph.node:
        rename(node, source)
        if _has_ends(node) and node.output[0] not in outputs and _is_whole(node, known):
            source[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _has_ends(node: onnx.NodeProto) -> bool:
    return node.op_type == "Slice" and not node.domain and len(node.input) >= 3


def _is_whole(node: onnx.NodeProto, known: Mapping[str, Array]) -> bool:
    starts, ends = (known.get(name) for name in node.input[1:3])
    step = node.input[4] if len(node.input) > 4 else ""
    single = not step or (step in known and bool((known[step] == 1).all()))
    return starts is not None and ends is not None and not starts.any() and bool((ends >= _BEYOND).all()) and single
