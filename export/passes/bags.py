"""Bags of ids as torch's newer exporter writes `nn.EmbeddingBag`, a loop over a sequence, without the loop.

The loop's text differs from release to release, so it is not read: what it may mean is tried on ids of each kind, and a
look-up with a sum, mean or maximum takes its place only where both are equal.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import helper

from stca.arrays import Array
from stca.export.analysis.integers import integers_of
from stca.export.analysis.onnx_reference import reference_of
from stca.export.analysis.scope import Dataflow, attribute, reads
from stca.export.passes.nodes import NewNodes, names_in

_MODES: tuple[Literal["Sum", "Mean", "Max"], ...] = ("Sum", "Mean", "Max")
_BATCHES, _IDS, _MOST = (1, 2, 5), 4, 1 << 12


@dataclass(frozen=True)
class _Bag:
    """What a loop may mean: rows of `table` by `ids` [bags, ids], all but those of `pad`, brought together."""

    table: str
    ids: str
    mode: Literal["Sum", "Mean", "Max"]
    pad: int | None

    def of(self, rows: Array, ids: Array) -> Array:
        """`[bags, width]` of rows `[bags, ids, width]`."""
        kept = np.ones((*ids.shape, 1), bool) if self.pad is None else (ids != self.pad)[..., None]
        if self.mode == "Max":
            return np.asarray(rows.max(1))
        total = np.asarray((rows * kept).sum(1))
        return total / np.maximum(kept.sum(1), 1) if self.mode == "Mean" else total

    def add(self, new: NewNodes, out: str, dtype: int) -> None:
        """The same in nodes, the last of which makes `out`."""
        rows, axis = new.node("Gather", [self.table, self.ids], f"{out}_rows"), new.integers([1])
        if self.pad is None:
            new.node(f"Reduce{self.mode}", [rows, axis], out, exact=True, keepdims=0)
            return
        pad = new.node("Equal", [self.ids, new.weight(f"{out}_none", np.int64(self.pad))], f"{out}_is_none")
        kept = new.node("Cast", [new.node("Not", [pad], f"{out}_is_some")], f"{out}_kept", to=dtype)
        column = new.node("Unsqueeze", [kept, new.integers([2])], f"{out}_column")
        some = new.node("Mul", [rows, column], f"{out}_some")
        total = new.node("ReduceSum", [some, axis], out, exact=self.mode == "Sum", keepdims=0)
        if self.mode == "Mean":
            count = new.node("ReduceSum", [kept, axis], f"{out}_count", keepdims=1)
            one = new.weight(f"{out}_one", np.ones(1, helper.tensor_dtype_to_np_dtype(dtype)))
            new.node("Div", [total, new.node("Max", [count, one], f"{out}_least")], out, exact=True)


def without_loops_of_bags(model: onnx.ModelProto) -> None:
    """Take the place of each such loop, in place; others stay. What the loop alone needed stays too, unread."""
    graph = model.graph
    if not any(n.op_type == "ConcatFromSequence" for n in graph.node):
        return
    flow, weights = Dataflow(graph), {t.name: t for t in graph.initializer}
    known, new = integers_of(model), NewNodes(names_in(graph))
    for node in graph.node:
        bag = _bag(model, node, flow, weights, known) if node.op_type == "ConcatFromSequence" else None
        if bag is None:
            new.nodes.append(node)
        else:
            bag.add(new, node.output[0], weights[bag.table].data_type)
    del graph.node[:]
    graph.node.extend(new.nodes)
    graph.initializer.extend(new.weights)


def _bag(
    model: onnx.ModelProto,
    out: onnx.NodeProto,
    flow: Dataflow,
    weights: Mapping[str, onnx.TensorProto],
    known: Mapping[str, Array],
) -> _Bag | None:
    """What `out` joins, where that is shown."""
    nodes = model.graph.node
    loop = nodes[flow.writer[out.input[0]]] if out.input[0] in flow.writer else None
    if loop is None or loop.op_type != "Loop" or attribute(out, "axis", None) != 0 or attribute(out, "new_axis", 0):
        return None
    gather = next((g for name in reads(loop) if (g := _looked_up(name, model, flow)) and g.input[0] in weights), None)
    if gather is None or len(weights[gather.input[0]].dims) != 2:
        return None
    ids = gather.input[1]
    while ids in flow.writer and nodes[flow.writer[ids]].op_type == "Reshape":
        ids = nodes[flow.writer[ids]].input[0]
    shapes = (v.type.tensor_type.shape for v in (*model.graph.input, *model.graph.value_info) if v.name == ids)
    shape = next(shapes, onnx.TensorShapeProto()).dim
    if len(shape) != 2:  # of others, bags are not rows
        return None
    rows, width = weights[gather.input[0]].dims
    alone = _alone(model, out.output[0], gather.output[0], ids, flow, weights)
    if alone is None:
        return None
    read = {n for node in alone.graph.node for n in reads(node)}
    numbers = sorted({int(v.item()) for n in read if (v := known.get(n)) is not None and v.size == 1})
    pads = sorted({n % rows for n in numbers})
    each = [_IDS, *(n for n in numbers if 0 < n < _MOST and n != _IDS)]  # of a fixed number of ids it is one of them
    if (fixed := shape[1].dim_value) > 0:
        each = [fixed]
    for ids_each in each:
        runs = list(_runs(alone, ids_each, rows, width, pads))
        if len(runs) < len(_BATCHES) * (1 + len(pads)):
            continue
        for mode in _MODES:
            for pad in (None, *pads) if mode != "Max" else (None,):
                bag = _Bag(gather.input[0], ids, mode, pad)
                if all(np.allclose(bag.of(r, i), made, rtol=1e-6, atol=1e-6) for r, i, made in runs):
                    return bag
    return None


def _looked_up(name: str, model: onnx.ModelProto, flow: Dataflow) -> onnx.NodeProto | None:
    """The look-up whose rows a value holds, weighed perhaps."""
    while name in flow.writer:
        node: onnx.NodeProto = model.graph.node[flow.writer[name]]
        if node.op_type == "Gather" and attribute(node, "axis", 0) == 0:
            return node
        if node.op_type not in ("Identity", "Mul"):
            return None
        name = node.input[0]
    return None


def _alone(
    model: onnx.ModelProto, out: str, rows: str, ids: str, flow: Dataflow, weights: Mapping[str, onnx.TensorProto]
) -> onnx.ModelProto | None:
    """What makes `out` of the ids, the rows looked up and the number of bags; None where it needs more."""
    inputs = {i.name for i in model.graph.input}
    counts = {n.output[0] for n in model.graph.node if n.op_type == "Shape" and n.input[0] in inputs and _is_first(n)}
    needed, leaves = flow.needed([out], given=(rows, ids, *counts))
    given = [ids, rows, *sorted(counts & leaves)]
    if leaves - weights.keys() - set(given):
        return None
    made = helper.make_graph(
        [model.graph.node[i] for i in sorted(needed)],
        "bag",
        [onnx.ValueInfoProto(name=n) for n in given],
        [onnx.ValueInfoProto(name=out)],
        [weights[n] for n in leaves & weights.keys()],
    )
    return helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version)


def _is_first(shape: onnx.NodeProto) -> bool:
    return (attribute(shape, "start", 0), attribute(shape, "end", None)) == (0, 1)


def _runs(
    alone: onnx.ModelProto, each: int, count: int, width: int, pads: list[int]
) -> Iterator[tuple[Array, Array, Array]]:
    """Rows, their ids, and what was made of them; none where it does not run on bags of so many ids each."""
    rng = np.random.default_rng(0)
    run, (first, rows, *counts) = reference_of(alone), (i.name for i in alone.graph.input)
    for bags in _BATCHES:
        for fill in (None, *pads):
            ids = rng.choice([*pads, *rng.integers(0, count, 4)], (bags, each))
            if fill is not None:
                ids[0] = fill
            looked = np.sin(np.outer(ids.ravel(), np.arange(1, width + 1)) + 1.0).astype(np.float32)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    (made,) = run.run(None, {first: ids, rows: looked, **dict.fromkeys(counts, np.array([bags]))})
            except Exception:  # of another rank, or not of ids in order
                return
            if made.shape == (bags, width):
                yield looked.reshape(*ids.shape, width), ids, made
