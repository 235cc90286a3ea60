"""A target scorer that reads a history in several pieces, each where it lies: no rows of keys or values are joined.

What there is per history token comes as so many inputs, one for each piece, and stays apart up to the attention, which
goes from piece to piece (`stca.plugins.onnx_pieces`). So a request that reads several users' kept states copies none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from stca.export.analysis.cost import NominalSizes, any_sizes
from stca.export.analysis.scope import Dataflow, attribute, label, opset_of, reads
from stca.export.analysis.tokenwise import Tokenwise
from stca.export.appending import Appending
from stca.export.passes.lower import one_segment, uses_all_tokens
from stca.pieces import PIECES, piece_of
from stca.plugins import onnx_pieces
from stca.plugins.spec import DOMAIN, OP_NAME, PLAIN
from stca.specs import OFFSETS, TOKENS

_KEY, _VALUE = 1, 2
# What goes from piece to piece.
_FOUND = ("mixed", "most", "total")


def add_pieces(models: dict[str, onnx.ModelProto], appends: Appending, pieces: int) -> tuple[str, ...]:
    """Add to a bundle's graphs the scorer that reads so many pieces where they lie; a note where there is none.

    Args:
        models: by name.
        appends: how the state is appended to.
        pieces: how many; 1 for no such graph.
    """
    if pieces == 1:
        return ()
    why_not = appends.why_not or ("states hold sums over their events" if appends.sums else None)
    if why_not is None:
        offsets = {t.name for t in appends.halves.state if t.shape == (OFFSETS,)}
        why_not = why_joined(models["target_scorer"], offsets)
        if why_not is None:
            models[PIECES] = in_pieces(models["target_scorer"], offsets, pieces)
            return ()
    return (f"neighbours' states are not read where they lie: {why_not}",)


def in_pieces(scorer: onnx.ModelProto, offsets: Collection[str], pieces: int) -> onnx.ModelProto:
    """The target scorer for a history in `pieces` pieces, any of which may be without rows.

    The first piece has the scorer's own inputs, the others have inputs of their own behind all of them, piece after
    piece (`stca.pieces.piece_of`). Offsets of the history are those of all pieces together, if anything but attention
    reads them. Only for one request.

    Args:
        scorer: with its functions but the operator's inlined, for which there is no `why_joined`; not changed.
        offsets: its inputs that say where each request's history begins.
        pieces: how many, at least 1.
    """
    graph = scorer.graph
    apart = [i for i in graph.input if _dims(i)[:1] == [TOKENS]]
    made = onnx.ModelProto()
    made.CopyFrom(scorer)
    made.graph.name = PIECES
    del made.graph.node[:], made.graph.value_info[:]
    inputs = {i.name for i in apart}
    names: list[dict[str, str]] = [{} for _ in range(pieces)]
    columns = _parted_keys(scorer)
    for piece in range(1, pieces):
        for value in apart:
            own = made.graph.input.add()
            own.CopyFrom(value)
            own.name = names[piece][value.name] = piece_of(value.name, piece)
            own.type.tensor_type.shape.dim[0].dim_param = piece_of(TOKENS, piece)
    for node in graph.node:
        if _attends(node) and node.input[_KEY] in inputs:
            apart_columns = columns.get(node.input[_KEY], ())
            for view in (v for part in apart_columns for v in part.views if v.output[0] not in inputs):
                inputs.update(view.output)
                made.graph.node.extend(_copy(view, own, piece) for piece, own in enumerate(names))
            made.graph.node.extend(_piece_by_piece(node, names, apart_columns))
        elif inputs.isdisjoint(reads(node)):
            made.graph.node.append(node)
        else:
            inputs.update(node.output)
            made.graph.node.extend(_copy(node, own, piece) for piece, own in enumerate(names))
    needed, _ = Dataflow(made.graph).needed(o.name for o in made.graph.output)
    kept = [made.graph.node[i] for i in sorted(needed)]
    del made.graph.node[:]
    made.graph.node.extend(kept)
    read = {name for node in kept for name in reads(node)}
    unread = [i for i in made.graph.input if i.name in offsets and i.name not in read]
    for one in unread:
        made.graph.input.remove(one)
    made.functions.extend(onnx_pieces.functions(opset_of(scorer)))
    return made


def why_joined(scorer: onnx.ModelProto, offsets: Collection[str]) -> str | None:
    """Why a history must be one piece: rows of tokens do not stay apart up to an attention over all of each piece.

    Args:
        scorer, offsets: as of `in_pieces`.
    """
    if opset_of(scorer) < onnx_pieces.OLDEST_OPSET:
        return f"the model is of ONNX's opset {opset_of(scorer)}; save it in {onnx_pieces.OLDEST_OPSET} or newer"
    apart = {i.name for i in scorer.graph.input if _dims(i)[:1] == [TOKENS]}
    shown = Tokenwise(scorer, dict.fromkeys(apart, 0))
    of_tokens, attends = set(apart), False
    for node in scorer.graph.node:
        names = reads(node)
        if _attends(node) and node.input[_KEY] in of_tokens:
            attends = True
            key, value = node.input[_KEY], node.input[_VALUE]
            if any(node.input[len(PLAIN) :]):
                return f"node {label(node)!r} reads lists of segments"
            if not shown.rows.issuperset((key, value)) or not of_tokens.isdisjoint((node.input[0], node.input[3])):
                return f"node {label(node)!r} reads what is not a row of one token's own"
            if not _reads_all(scorer, node, offsets):
                return f"node {label(node)!r} does not read the whole history"
        elif not of_tokens.isdisjoint(names):
            of_tokens.update(node.output)
    if found := of_tokens.intersection(o.name for o in scorer.graph.output):
        return f"output {min(found)!r} depends on history tokens without attention"
    return None if attends else "no attention reads the history"


def _reads_all(scorer: onnx.ModelProto, node: onnx.NodeProto, offsets: Collection[str]) -> bool:
    """Whether an attention's history is all rows of its key, as far as its offsets and lengths can be computed."""
    flow, (begins, lengths) = Dataflow(scorer.graph), node.input[4:6]
    source = begins
    while (at := flow.writer.get(source)) is not None and scorer.graph.node[at].op_type in ("Cast", "Identity"):
        source = scorer.graph.node[at].input[0]
    try:
        if source in offsets:
            return uses_all_tokens(scorer, node)
        return one_segment(scorer, node.input[_KEY], begins, lengths)
    except Exception:  # an operator that takes one request alone, perhaps: not shown
        return False


def _attends(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, OP_NAME)


def _dims(value: onnx.ValueInfoProto) -> list[str]:
    return [d.dim_param for d in value.type.tensor_type.shape.dim]


def _copy(node: onnx.NodeProto, own: dict[str, str], piece: int) -> onnx.NodeProto:
    """A node for one piece, whose values have names of their own; the first piece keeps the node's."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    if piece:
        own.update({name: piece_of(name, piece) for name in node.output if name})
        copy.name = piece_of(label(node), piece)
        for names in (copy.input, copy.output):
            names[:] = [own.get(name, name) for name in names]
    return copy


@dataclass(frozen=True)
class _Columns:
    """Some columns of a key: how many, the value that they are, and the views that make it of what was concatenated."""

    width: int
    value: str
    views: tuple[onnx.NodeProto, ...]


def _parted_keys(scorer: onnx.ModelProto) -> dict[str, tuple[_Columns, ...]]:
    """Keys that are put together of two ranges of columns, a state's and a bias perhaps, and these ranges."""
    flow, sizes = Dataflow(scorer.graph), NominalSizes(scorer, any_sizes(scorer.graph))
    found: dict[str, tuple[_Columns, ...]] = {}
    for key in {n.input[_KEY] for n in scorer.graph.node if _attends(n)}:
        source, views = key, list[onnx.NodeProto]()
        while (at := flow.writer.get(source)) is not None and scorer.graph.node[at].op_type == "Unsqueeze":
            views.insert(0, scorer.graph.node[at])
            source = views[0].input[0]
        concat = None if at is None else scorer.graph.node[at]
        if concat is None or concat.op_type != "Concat" or len(concat.input) != 2:
            continue
        widths = [(sizes.dims(name) or (None,))[-1] for name in (*concat.input, source, key)]
        rank = len(sizes.dims(source) or ())
        last = attribute(concat, "axis", 0) % max(rank, 1) == rank - 1
        if last and all(isinstance(n, int) for n in widths) and widths[2] == widths[3]:
            found[key] = tuple(_columns(n, int(w or 0), views) for n, w in zip(concat.input, widths, strict=False))
    return found


def _columns(source: str, width: int, views: Sequence[onnx.NodeProto]) -> _Columns:
    made: list[onnx.NodeProto] = []
    for view in views:
        own = onnx.NodeProto()
        own.CopyFrom(view)
        own.input[0], own.output[0], own.name = source, f"{view.output[0]}_{source}", f"{label(view)}_{source}"
        made.append(own)
        source = own.output[0]
    return _Columns(width, source, tuple(made))


def _piece_by_piece(
    node: onnx.NodeProto, names: Sequence[Mapping[str, str]], columns: Sequence[_Columns]
) -> list[onnx.NodeProto]:
    """An attention node as one that begins, one for each piece, and one that ends.

    Args:
        node: the attention.
        names: values of each piece, by those of the scorer.
        columns: of the key, where they come apart.
    """
    query, value = node.input[0], node.input[_VALUE]
    (out,), name = node.output, label(node)
    stacked, *state = (f"{out}_{part}" for part in ("stacked", *_FOUND))
    op, keys, queries = onnx_pieces.ATTEND, [node.input[_KEY]], [stacked]
    made: list[onnx.NodeProto] = []
    if columns:
        op, keys = onnx_pieces.ATTEND_BIASED, [c.value for c in columns]
        queries = [f"{stacked}_{i}" for i in range(len(columns))]
        widths = helper.make_tensor("value", onnx.TensorProto.INT64, [len(columns)], [c.width for c in columns])
        made.append(helper.make_node("Constant", [], [f"{stacked}_widths"], f"{name}_widths", value=widths))
        made.append(helper.make_node("Split", [stacked, f"{stacked}_widths"], queries, f"{name}_split", axis=2))
        if columns[0].width < columns[1].width:
            queries, keys = queries[::-1], keys[::-1]
    begin = helper.make_node(
        onnx_pieces.BEGIN, [query, keys[0], value], [stacked, *state], f"{name}_begin", domain=DOMAIN,
        scale=attribute(node, "scale", 1.0),
    )  # fmt: skip
    made.insert(0, begin)
    for piece, own in enumerate(names):
        after = [piece_of(f"{out}_{part}", piece + 1) for part in _FOUND]
        given = [*queries, *(own.get(one, one) for one in (*keys, value)), *state]
        made.append(helper.make_node(op, given, after, piece_of(name, piece), domain=DOMAIN))
        state = after
    mixed, _, total = state
    made.append(helper.make_node(onnx_pieces.END, [query, mixed, total], [out], f"{name}_end", domain=DOMAIN))
    return made
