"""What may be in a user state of a ragged batch: it must be its user's alone.

The values of several users together are those of each, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from stca import probe
from stca.arrays import Array
from stca.export.analysis.onnx_reference import reference_of
from stca.export.analysis.scope import Dataflow, Scope
from stca.specs import TensorSpec, packable

Feeds = dict[str, Array]

# Histories of the users whose values are computed together and apart.
_TOGETHER = (3, 1, 5)


def not_one_users(model: onnx.ModelProto, scopes: Mapping[str, Scope], inputs: Sequence[TensorSpec]) -> frozenset[str]:
    """User-scope values of a ragged batch that are not each user's own, one after the other: no state may hold them.

    Places and counts in the batch, such as the number of a row's request: kept with a state of one user they would be
    wrong in the next batch. Shown by computing three users together and apart. What follows from offsets alone is
    among them too: it costs nothing to make again, and a state that holds it could not be appended to.

    Args:
        model: valid; its functions but the operator's are inlined.
        scopes: of every value at its top level.
        inputs: of the graph.
    """
    if not packable(inputs):
        return frozenset()
    flow = Dataflow(model.graph)
    values = [n for node in model.graph.node for n in node.output if scopes.get(n) == Scope.USER]
    rng = np.random.default_rng(0)
    users = [probe.single(inputs, tokens, 1, rng) for tokens in _TOGETHER]
    user_side = _part(model, flow, values)
    evaluator = reference_of(user_side)
    wanted = [i.name for i in user_side.graph.input]

    def compute(batch: list[Feeds]) -> dict[str, Any]:
        feeds = probe.pack(inputs, batch)
        return dict(zip(values, evaluator.run(None, {n: feeds[n] for n in wanted}), strict=True))

    together, apart = compute(users), [compute([user]) for user in users]
    offsets = offsets_of(inputs)
    from_offsets: set[str] = set()
    for node, names in zip(model.graph.node, flow.reads, strict=True):
        sources = {n for n in names if scopes[n] != Scope.CONSTANT}
        if sources and sources <= offsets | from_offsets:
            from_offsets.update(node.output)
    return frozenset(n for n in values if n in from_offsets or not _joins(together[n], [one[n] for one in apart]))


def offsets_of(inputs: Sequence[TensorSpec]) -> set[str]:
    """Names of the inputs that say where each request's rows begin."""
    return {s.name for s in inputs if s.is_offsets}


def _part(model: onnx.ModelProto, flow: Dataflow, values: Sequence[str]) -> onnx.ModelProto:
    """What of a model computes `values`, its only outputs."""
    nodes, leaves = flow.needed(values)
    graph = model.graph
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    part.graph.name = "user"
    part.graph.node.extend(graph.node[i] for i in sorted(nodes))
    part.graph.input.extend(i for i in graph.input if i.name in leaves)
    part.graph.initializer.extend(t for t in graph.initializer if t.name in leaves)
    part.graph.sparse_initializer.extend(t for t in graph.sparse_initializer if t.values.name in leaves)
    part.graph.output.extend(onnx.ValueInfoProto(name=n) for n in values)
    return part


def _joins(whole: Any, parts: Sequence[Any]) -> bool:
    """Whether `whole` is `parts` one after the other, each with a row per token or one row."""
    if not all(isinstance(x, np.ndarray) and x.ndim and x.shape[1:] == whole.shape[1:] for x in (whole, *parts)):
        return False
    if tuple(map(len, parts)) not in (_TOGETHER, (1,) * len(parts)):
        return False
    return len(whole) == sum(map(len, parts)) and equal_but_for_roundings(whole, np.concatenate(parts))


def equal_but_for_roundings(a: Array, b: Array) -> bool:
    """Whether two values are the same: a matrix product of fewer rows may sum in another order."""
    if a.dtype.kind not in "fV":
        return np.array_equal(a, b)
    a, b, eps = a.astype(np.float64), b.astype(np.float64), float(np.finfo(np.float32).eps)
    scale = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
    return np.allclose(a, b, rtol=0, atol=64 * eps * scale, equal_nan=True)
