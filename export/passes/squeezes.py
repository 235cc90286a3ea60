"""Squeezes without axes, as of PyTorch's `x.squeeze()`: of a single row they would drop the axis of rows as well."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import count

import onnx
from onnx import helper

from stca.errors import SplitError
from stca.export.analysis.rows import Everything, attempts, draw
from stca.export.analysis.scope import opset_of
from stca.export.passes.nodes import NewNodes, names_in
from stca.specs import TensorSpec

# From this opset on, axes are an input and no attribute.
_AXES_ARE_AN_INPUT = 13


def name_squeezed_axes(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> None:
    """Give such nodes the axes that are 1 where every free size is more, in place; one that it cannot see stays."""
    graph = model.graph
    bare = [n for n in graph.node if _is_bare(n)]
    if not bare:
        return
    found = _shapes(model, inputs)
    opset = opset_of(model)
    new = NewNodes(names_in(graph))
    for node in bare:
        if node.input[0] not in found:
            continue
        axes = [axis for axis, n in enumerate(found[node.input[0]]) if n == 1]
        if opset < _AXES_ARE_AN_INPUT:
            node.attribute.append(helper.make_attribute("axes", axes))
        else:
            node.input[1:] = [new.integers(axes)]
    graph.initializer.extend(new.weights)


def _is_bare(node: onnx.NodeProto) -> bool:
    return (node.op_type, node.domain) == ("Squeeze", "") and not any(node.input[1:]) and not node.attribute


def _shapes(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Of every value, with free sizes that all differ and are more than 1; empty where the graph does not run."""
    run = Everything(model)
    names = dict.fromkeys(n for s in inputs for n in s.shape if isinstance(n, str))
    for integers, scale in attempts():
        sizes = {n: scale * i for n, i in zip(names, count(6), strict=False)}
        feeds = draw(inputs, sizes, integers)
        with contextlib.suppress(SplitError):
            return {n: x.shape for n, x in (feeds | run(feeds)).items() if hasattr(x, "shape")}
    return {}
