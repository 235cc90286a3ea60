"""What may be in a user state, shown on the graph before it is cut and on the encoder after it.

In a ragged batch a state must be its user's alone: the values of several users together are those of each, one after
the other. And new events can be appended to it when the state of a history is the state of its parts, one after the
other.
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
from stca.export.analysis.tokenwise import Tokenwise
from stca.export.split import Split
from stca.manifest import OFFSETS, TOKENS, TensorSpec, packable

Feeds = dict[str, Array]

# Histories of the users whose values are computed together and apart, and events on which appending is tried.
_TOGETHER = (3, 1, 5)
_EVENTS = 480


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
    offsets = _offsets(inputs)
    from_offsets: set[str] = set()
    for node, names in zip(model.graph.node, flow.reads, strict=True):
        sources = {n for n in names if scopes[n] != Scope.CONSTANT}
        if sources and sources <= offsets | from_offsets:
            from_offsets.update(node.output)
    return frozenset(n for n in values if n in from_offsets or not _joins(together[n], [one[n] for one in apart]))


def _offsets(inputs: Sequence[TensorSpec]) -> set[str]:
    return {s.name for s in inputs if s.shape == (OFFSETS,)}


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
    return len(whole) == sum(map(len, parts)) and _equal(whole, np.concatenate(parts))


def _equal(a: Array, b: Array) -> bool:
    """But for roundings: a matrix product of fewer rows may sum in another order."""
    if a.dtype.kind not in "fV":
        return np.array_equal(a, b)
    a, b, eps = a.astype(np.float64), b.astype(np.float64), float(np.finfo(np.float32).eps)
    scale = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
    return np.allclose(a, b, rtol=0, atol=64 * eps * scale, equal_nan=True)


def why_not_appendable(halves: Split, inputs: Sequence[TensorSpec]) -> str | None:
    """Why the state of a history is not the state of its parts joined, or is not shown to be; None where it is.

    Shown twice: from the operators on the way to it (`tokenwise`), and on random events cut at several places.
    """
    user = tuple(s for s in inputs if s.scope == "user")
    per_token = [t for t in halves.state if t.shape[:1] == (TOKENS,)]
    if not _offsets(user):
        return "the model has no offsets input, so that a state is of one whole history"
    if not per_token:
        return "no part of it has a row per history token"
    tokens = {s.name for s in user if s.shape[:1] == (TOKENS,)}
    graph = halves.user_encoder.graph
    shown, flow = Tokenwise(halves.user_encoder, tokens), Dataflow(graph)
    for tensor in halves.state:
        if tensor in per_token:
            if tensor.name not in shown.rows:
                return f"{tensor.name!r} depends on {shown.why_not.get(tensor.name, 'the number of tokens')}"
        elif not tensor.verbatim and (found := flow.needed([tensor.name])[1] & (tokens | _offsets(user))):
            return f"{tensor.name!r} has no row per token and depends on input {min(found)!r}"
    return _why_parts_differ(halves, user, tokens)


def _why_parts_differ(halves: Split, user: Sequence[TensorSpec], tokens: set[str]) -> str | None:
    whole = probe.single(user, _EVENTS, 0, np.random.default_rng(0))
    once = {s.name: np.full_like(whole[s.name], (s.limit or 2) - 1) for s in user if s.name in whole.keys() - tokens}
    whole |= once
    evaluator = reference_of(halves.user_encoder)

    def part(rows: slice) -> Feeds:
        return {n: x[rows] if n in tokens else x for n, x in whole.items()}

    def state(request: Feeds) -> Feeds:
        feeds = probe.pack(user, [request])
        wanted = {i.name: feeds[i.name] for i in halves.user_encoder.graph.input}
        return dict(zip((t.name for t in halves.state), evaluator.run(None, wanted), strict=True))

    full = state(whole)
    for cut in (1, _EVENTS * 2 // 3):
        first = state(part(slice(0, cut)))
        # Appending encodes new events without the user's other inputs: no token may depend on them.
        second = state(part(slice(cut, None)) | {n: np.zeros_like(x) for n, x in once.items()})
        for tensor in halves.state:
            a, b = full[tensor.name], first[tensor.name]
            if tensor.shape[:1] == (TOKENS,):
                b = np.concatenate([b, second[tensor.name]])
            elif tensor.verbatim:
                continue
            if a.shape != b.shape or not _equal(a, b):
                return f"{tensor.name!r} of {_EVENTS} random events is not that of the first {cut} and of the rest"
    return None
