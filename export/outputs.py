"""Scores as rows: each output of a request graph has a row for each target, whatever way the model lays them out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx
from onnx import helper
from torch import Tensor, nn

from stca.export.passes.nodes import NewNodes, names_in, rename
from stca.specs import OFFSETS, TensorSpec


def name_rows(graph: onnx.GraphProto, inputs: Sequence[TensorSpec]) -> None:
    """Call the outputs' first open size as the targets are called, in place, where no output's size is an input's.

    An exporter that is not told what outputs share names the size of each by itself.
    """
    known = {n for s in inputs for n in s.shape}
    rows = {s.shape[0] for s in inputs if s.scope == "target" and s.shape} - {OFFSETS}
    if len(rows) != 1 or not isinstance(name := rows.pop(), str):
        return
    for out in graph.output:
        open_ = [d for d in out.type.tensor_type.shape.dim if not d.HasField("dim_value")]
        if open_ and known.isdisjoint(d.dim_param for d in open_):
            open_[0].dim_param = name


def score_axes(graph: onnx.GraphProto, inputs: Sequence[TensorSpec]) -> tuple[int, ...]:
    """Along which axis of each output the targets lie: the first that has a size of the targets' own, or else 0.

    Args:
        graph: with the shapes of its outputs.
        inputs: of it; the sizes that only target inputs have count targets.
    """
    of_targets, of_others = (
        {n for s in inputs if (s.scope == "target") is targets for n in s.shape if isinstance(n, str)} - {OFFSETS}
        for targets in (True, False)
    )
    own = of_targets - of_others or of_targets
    shapes = ([d.dim_param for d in out.type.tensor_type.shape.dim] for out in graph.output)
    return tuple(next((axis for axis, n in enumerate(shape) if n in own), 0) for shape in shapes)


def lay_out_by_target(model: onnx.ModelProto, axes: Sequence[int]) -> bool:
    """Make every output `[targets, tasks]`, in place; one that is a scalar stays so, and is refused later.

    Args:
        model: a request graph.
        axes: of the targets in each output.

    Returns:
        Whether any was laid out otherwise.
    """
    graph = model.graph
    new = NewNodes(names_in(graph))
    for out, axis in zip(graph.output, axes, strict=True):
        dims = list(out.type.tensor_type.shape.dim)
        if not dims or (axis == 0 and len(dims) == 2):
            continue
        name, inner = out.name, new.name(f"{out.name}_as_made")
        for node in graph.node:
            rename(node, {name: inner})
            node.output[:] = [inner if n == name else n for n in node.output]
        if axis:
            order = [axis, *(i for i in range(len(dims)) if i != axis)]
            inner = new.node("Transpose", [inner], f"{name}_by_target", perm=order)
        if len(dims) == 1:
            new.node("Unsqueeze", [inner, new.integers([1])], name, exact=True)
        else:
            new.node("Flatten", [inner], name, exact=True, axis=1)
        out.CopyFrom(_row_per_target(out, axis))
    graph.node.extend(new.nodes)
    graph.initializer.extend(new.weights)
    return bool(new.nodes)


def _row_per_target(out: onnx.ValueInfoProto, axis: int) -> onnx.ValueInfoProto:
    dims = list(out.type.tensor_type.shape.dim)
    row, rest = dims.pop(axis), [d.dim_value if d.HasField("dim_value") else None for d in dims]
    tasks = None if None in rest else math.prod(n for n in rest if n is not None)
    rows = row.dim_value if row.HasField("dim_value") else row.dim_param or None
    return helper.make_tensor_value_info(out.name, out.type.tensor_type.elem_type, [rows, tasks])


class ByTarget(nn.Module):
    """A module whose outputs are laid out as `lay_out_by_target` lays out those of its graph.

    Args:
        module: takes inputs by name, returns a tensor or a sequence of them.
        axes: of the targets in each output.
    """

    def __init__(self, module: nn.Module, axes: Sequence[int]) -> None:
        super().__init__()
        self.module, self.axes = module, tuple(axes)

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Every output as `[targets, tasks]`; a single target's that was squeezed of every axis, too."""
        found = self.module(inputs)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        return tuple(
            y.movedim(axis, 0).flatten(1) if y.ndim > 1 else y.reshape(-1, 1)
            for y, axis in zip(outputs, self.axes, strict=True)
        )
