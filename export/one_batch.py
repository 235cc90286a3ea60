"""The batch that users and targets share, whatever a graph calls it, and that of the requests a model takes at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from stca.arrays import Progress
from stca.errors import SplitError
from stca.export.analysis.cost import without_weights
from stca.export.analysis.integers import integers_of
from stca.export.analysis.rows import Everything, attempts, draw
from stca.export.analysis.scope import attribute
from stca.probe import shared_rows
from stca.specs import OFFSETS, TARGETS, USERS, TensorSpec

_NAME: Final = "batch"
_ROWS: Final = 3


def with_one_batch(model: onnx.ModelProto, inputs: Sequence[TensorSpec], progress: Progress) -> tuple[TensorSpec, ...]:
    """Call the batch of users and targets by one symbolic size, in place, where the graph runs with no other.

    An exporter that was told several names for it, or none, hides that all are the same rows.

    Args:
        model: with its weights inline.
        inputs: of it, with the integers that each takes.
        progress: told what was taken for one batch.

    Returns:
        The inputs, with that size in them if it was found.

    Raises:
        SplitError: when the graph scores a batch of users of one size alone.
    """
    users, targets = (
        dict.fromkeys(s.shape[0] for s in inputs if s.shape and (s.scope == "target") is of) for of in (False, True)
    )
    firsts = {**users, **targets}
    baked = len(firsts) == 1 and isinstance(next(iter(firsts)), int) and 1 not in firsts
    named = all(isinstance(n, str) for n in firsts) and not users.keys() & targets.keys()
    if not users or not targets or OFFSETS in firsts or shared_rows(inputs) or not (baked or named):
        return tuple(inputs)
    rows = dict.fromkeys(map(str, targets), _ROWS)
    # A first size may count events, and then two of them are fine; of a batch, one row may be broadcast to targets.
    events = [s for s in inputs if s.scope != "target" and [n for n in s.shape if isinstance(n, str)] == [*s.shape[:1]]]
    counts = (1, 2) if events else (1,)
    if named and all(_runs(model, inputs, dict.fromkeys(map(str, users), n) | rows) for n in counts):
        return tuple(inputs)  # it is at request level
    renamed = tuple(dataclasses.replace(s, shape=(_NAME, *s.shape[1:])) if s.shape else s for s in inputs)
    free = _with_shapes(model, renamed)
    if not all(_runs(free, renamed, {_NAME: rows}) for rows in (_ROWS, _ROWS + 2)):
        if baked and _rows_apart(model, inputs):
            (size,) = firsts
            raise SplitError(
                f"every input has {size} rows, the exporter's example batch, and the graph takes no other number; "
                "export it again with dynamic_shapes (dynamic_axes in the older exporter) that name each input's batch"
            )
        return tuple(inputs)
    model.CopyFrom(free)
    progress(f"taking the first sizes of the inputs, {', '.join(map(str, firsts))}, for one batch")
    return renamed


def _rows_apart(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> bool:
    """Whether another first row of the user's inputs changes the first target's scores alone: rows are users."""
    values = [o.name for o in model.graph.output]
    for integers, scale in attempts():
        if scale > 1:  # nothing varies
            break
        feeds = draw(inputs, {}, integers)
        other = dict(feeds)
        for spec in inputs:
            if spec.scope == "user" and spec.shape:
                other[spec.name] = np.concatenate([feeds[spec.name][-1:], feeds[spec.name][1:]])
        try:
            first, second = (Everything(model, values)(x) for x in (feeds, other))
        except SplitError:
            continue
        changed = [
            np.any(a != b, axis=tuple(range(1, a.ndim)))
            for a, b in zip(first.values(), second.values(), strict=True)
            if a.ndim
        ]
        return any(c[0] for c in changed) and not any(c[1:].any() for c in changed)
    return False


def of_one_request(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Fix the batch of a model of several requests, `[batch, events]` with `[batch, candidates]`, to 1, in place.

    Args:
        model: with the shapes of its inputs and outputs.
        inputs: of it.

    Returns:
        The inputs, with 1 in place of that size.
    """
    users, targets = ({s.shape[0] for s in inputs if s.shape and (s.scope == "target") is of} for of in (False, True))
    shared = {n for n in users & targets if isinstance(n, str)}
    if OFFSETS in users | targets or shared_rows(inputs) or len(shared) != 1:
        return tuple(inputs)
    (name,) = shared
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == name:
                dim.dim_value = 1
    _fold_known_sizes(model)
    return tuple(dataclasses.replace(s, shape=tuple(1 if n == name else n for n in s.shape)) for s in inputs)


def _fold_known_sizes(model: onnx.ModelProto) -> None:
    """Make constants, in place, of sizes that are read from a shape and known: the user's values follow from no target.

    A layer reads the batch's size from whichever input it meets, `nn.MultiheadAttention` from the query.
    """
    inferred = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    dims = {v.name: v.type.tensor_type.shape.dim for v in (*inferred.input, *inferred.value_info)}
    integers, shapes = integers_of(model), dict[str, list[int | None]]()
    for node in model.graph.node:
        if node.op_type == "Shape" and not node.domain and node.input[0] in dims:
            sizes = [d.dim_value if d.HasField("dim_value") else None for d in dims[node.input[0]]]
            found = sizes[attribute(node, "start", 0) : attribute(node, "end", len(sizes))]
            shapes[node.output[0]] = found
            _make_constant(node, found)
        elif node.op_type == "Gather" and node.input[0] in shapes and node.input[1] in integers:
            _make_constant(node, np.array(shapes[node.input[0]], object)[integers[node.input[1]]])


def _make_constant(node: onnx.NodeProto, sizes: Any) -> None:
    """Let a node make these sizes, where all of them are known."""
    if all(isinstance(n, int) for n in np.ravel(np.array(sizes, object))):
        value = numpy_helper.from_array(np.array(sizes, np.int64))
        node.CopyFrom(helper.make_node("Constant", [], list(node.output), node.name, value=value))


def _with_shapes(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> onnx.ModelProto:
    """A copy with these shapes of its inputs, and outputs with a row for each of the batch."""
    free = onnx.ModelProto()
    free.CopyFrom(model)
    del free.graph.value_info[:]
    shapes = {s.name: s.shape for s in inputs}
    for value in free.graph.input:
        if shapes.get(value.name):
            value.type.tensor_type.shape.dim[0].dim_param = _NAME
    for value in free.graph.output:
        for dim in value.type.tensor_type.shape.dim[:1]:
            dim.dim_param = _NAME
    return free


def _runs(model: onnx.ModelProto, inputs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> bool:
    """Whether the graph runs with these sizes and gives a score for each row of the largest."""
    names = {n for s in inputs for n in s.shape if isinstance(n, str)} - {TARGETS, USERS}
    run = Everything(model)
    for integers, scale in attempts():
        try:
            found = run(draw(inputs, {**dict.fromkeys(names, 2 * _ROWS * scale), **sizes}, integers))
        except SplitError:
            continue
        return all(max(sizes.values()) in found[o.name].shape[:1] for o in model.graph.output if o.name in found)
    return False
