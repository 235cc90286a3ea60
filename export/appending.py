"""Whether new events can be appended to a user state: that of a history must follow from those of its parts.

Two things make it so. A tensor with a row per token, each made of its own token, is that of the parts one after the
other. A sum over all tokens is that of the parts, added: it is kept beside what the target scorer reads, and a graph of
its own, the user grower, makes a longer history's state of new events and the kept sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from stca import probe
from stca.arrays import Array
from stca.export.analysis.cost import NominalSizes, any_sizes
from stca.export.analysis.onnx_reference import reference_of
from stca.export.analysis.scope import Dataflow
from stca.export.analysis.tokenwise import Tokenwise
from stca.export.histories import event_inputs, unpacked
from stca.export.split import Split, StateTensor
from stca.export.state import equal_but_for_roundings, offsets_of
from stca.specs import ITEM_BYTES, TOKENS, TensorSpec

Feeds = dict[str, Array]

# Events on which appending is tried.
_EVENTS = 480


@dataclass(frozen=True)
class Appending:
    """How a state is appended to.

    Attributes:
        halves: the cut; its state holds the sums, too.
        why_not: what is in the way, or not shown; None where nothing is.
        sums: tensors of the state that are sums over all tokens.
        grower: new events and the kept sums → the state, but for rows per token, which are the new events'. None
            where there are no sums.
    """

    halves: Split
    why_not: str | None
    sums: Collection[str] = ()
    grower: onnx.ModelProto | None = None


def appending(halves: Split, inputs: Sequence[TensorSpec]) -> Appending:
    """How the state of a cut is appended to.

    Shown twice: from the operators on the way to it (`tokenwise`), and on random events cut at several places.

    Args:
        halves: the cut.
        inputs: of the request graph.
    """
    user = tuple(s for s in inputs if s.scope == "user")
    events = {s.name: s.shape.index(TOKENS) for s in user if TOKENS in s.shape}
    shown = Tokenwise(halves.user_encoder, events)
    why_not = _why_not_joined(halves, user, shown)
    if why_not is None:
        why_not = _why_parts_differ(halves, user, events)
    if why_not is None or offsets_of(user) or not (names := _sums_behind(halves, shown, events)):
        return Appending(halves, why_not)
    if counts := next((s.name for s in user if s.length_of is not None), None):
        return Appending(halves, counts_all(counts))
    kept, sums = _with_sums(halves, names)
    if len(sums) < len(names):
        return Appending(halves, why_not)
    grower = _grower(kept, sums)
    if (differ := _why_parts_differ(kept, user, events, sums, grower)) is not None:
        return Appending(halves, differ)
    return Appending(kept, None, [t.name for t in sums], grower)


def counts_all(name: str) -> str:
    """Why nothing is appended where an input says how many events there are: of new ones alone it would be wrong."""
    return f"input {name!r} counts the events of the whole history"


def _why_not_joined(halves: Split, user: Sequence[TensorSpec], shown: Tokenwise) -> str | None:
    """Why the state of a history is not that of its parts, one after the other."""
    offsets, flow = offsets_of(user), Dataflow(halves.user_encoder.graph)
    if not offsets and not event_inputs(user):
        return "the model has no history"
    if not offsets and (other := next((s.name for s in user if TOKENS in s.shape[1:]), None)):
        return f"input {other!r} has its events on another axis than the first"
    if not any(TOKENS in s.shape for s in user) and (histories := unpacked(user)):
        fixed = max(n for s in user for e in histories[0] if s.name == e.name and isinstance(n := s.shape[e.axis], int))
        return (
            f"the model's history is padded to {fixed} events; declare its length as a varying size (a name in place "
            f"of {fixed}), and export again"
        )
    if not any(t.shape[:1] == (TOKENS,) for t in halves.state):
        return "no part of it has a row per history token"
    of_events = offsets | {s.name for s in user if s.shape[:1] == (TOKENS,)}
    for tensor in halves.state:
        if tensor.shape[:1] == (TOKENS,):
            if tensor.name not in shown.rows:
                return f"{tensor.name!r} depends on {shown.why_not.get(tensor.name, 'the number of tokens')}"
        elif not tensor.verbatim and (found := flow.needed([tensor.name])[1] & of_events):
            return f"{tensor.name!r} has no row per token and depends on input {min(found)!r}"
    return None


def _sums_behind(halves: Split, shown: Tokenwise, events: Collection[str]) -> list[str]:
    """The sums through which alone, but for rows per token, a state follows from events; none where that is not so."""
    flow, found = Dataflow(halves.user_encoder.graph), set[str]()
    open_values = [t.name for t in halves.state if t.shape[:1] != (TOKENS,) or t.name not in shown.rows]
    seen = set(open_values)
    while open_values:
        value = open_values.pop()
        if value in shown.sums:
            found.add(value)
        elif value in events:
            return []
        elif (writer := flow.writer.get(value)) is not None:
            new = set(flow.reads[writer]) - seen
            seen |= new
            open_values += new
    return [name for node in halves.user_encoder.graph.node for name in node.output if name in found]


def _with_sums(halves: Split, names: Sequence[str]) -> tuple[Split, list[StateTensor]]:
    """The halves with these values in the state too, and their tensors; of those alone that have one size and type."""
    encoder = onnx.ModelProto()
    encoder.CopyFrom(halves.user_encoder)
    sizes, there = NominalSizes(encoder, any_sizes(encoder.graph)), {t.value: t for t in halves.state}
    sums: list[StateTensor] = []
    for name in names:
        dims, dtype = sizes.dims(name), sizes.element_type(name)
        if dims is None or not all(isinstance(n, int) for n in dims) or dtype not in _ADDED_IN:
            continue
        shape = tuple(n for n in dims if isinstance(n, int))
        size = int(np.prod(shape)) * ITEM_BYTES[_ADDED_IN[dtype]]
        sums.append(there.get(name) or StateTensor(name, name, _ADDED_IN[dtype], shape, size, 0, False))
        if name not in there:
            encoder.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, shape))
    new = [t for t in sums if t.value not in there]
    report = dataclasses.replace(halves.report, state_bytes=halves.report.state_bytes + sum(t.bytes for t in new))
    return Split(encoder, halves.target_scorer, (*halves.state, *new), report), sums


# ONNX types of what is added up, by numpy's names.
_ADDED_IN: Mapping[int, str] = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.DOUBLE: "float64"}


def _grower(halves: Split, sums: Sequence[StateTensor]) -> onnx.ModelProto:
    """The user encoder, with a sum that is kept added to each of its own."""
    grower = onnx.ModelProto()
    grower.CopyFrom(halves.user_encoder)
    graph = grower.graph
    graph.name = "user_grower"
    for tensor in sums:
        value, kept, own = tensor.value, f"kept_{tensor.value}", f"new_{tensor.value}"
        place = next(i for i, node in enumerate(graph.node) if value in node.output)
        graph.node[place].output[list(graph.node[place].output).index(value)] = own
        graph.node.insert(place + 1, onnx.helper.make_node("Add", [kept, own], [value], f"add_{value}"))
        element = next(t for t, name in _ADDED_IN.items() if name == tensor.dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(kept, element, tensor.shape))
    return grower


def _why_parts_differ(
    halves: Split,
    user: Sequence[TensorSpec],
    events: Mapping[str, int],
    sums: Sequence[StateTensor] = (),
    grower: onnx.ModelProto | None = None,
) -> str | None:
    whole = probe.single(user, _EVENTS, 0, np.random.default_rng(0))
    others = {s.name: np.full_like(whole[s.name], (s.limit or 2) - 1) for s in user if s.name in whole.keys() - events}
    whole |= others
    models = (halves.user_encoder, grower or halves.user_encoder)
    evaluators = [reference_of(model) for model in models]

    def part(rows: slice) -> Feeds:
        return {n: x[(slice(None),) * events[n] + (rows,)] if n in events else x for n, x in whole.items()}

    def state(request: Feeds, after: Feeds | None = None) -> Feeds:
        which = 0 if after is None else 1
        feeds = probe.pack(user, [request]) | {f"kept_{t.value}": (after or {})[t.name] for t in sums if after}
        wanted = {i.name: feeds[i.name] for i in models[which].graph.input}
        return dict(zip((t.name for t in halves.state), evaluators[which].run(None, wanted), strict=True))

    full = state(whole)
    for cut in (1, _EVENTS * 2 // 3):
        first = state(part(slice(0, cut)))
        # Where no sum is kept, new events are encoded without the user's other inputs: no token may depend on them.
        without = {} if sums else {n: np.zeros_like(x) for n, x in others.items()}
        second = state(part(slice(cut, None)) | without, first)
        for tensor in halves.state:
            a, b = full[tensor.name], second[tensor.name] if sums else first[tensor.name]
            if tensor.shape[:1] == (TOKENS,):
                b = np.concatenate([first[tensor.name], second[tensor.name]])
            elif tensor.verbatim:
                continue
            if a.shape != b.shape or not equal_but_for_roundings(a, b):
                return f"{tensor.name!r} of {_EVENTS} random events is not that of the first {cut} and of the rest"
    return None
