"""Cut a request graph by dataflow into a user encoder, whose outputs are the cacheable user state, and a target scorer.

`stca.export.analysis.cut` decides where; this module builds the halves, proves what a cut must guarantee, and reports.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnx.inliner

from stca.errors import SplitError, said
from stca.export.analysis.cost import DEFAULT_WORKLOAD, Measured, NominalSizes, Shown, without_weights
from stca.export.analysis.cut import DEFAULT_FLOPS_PER_BYTE, Cut, RequestDependency
from stca.export.analysis.reasons import reasons
from stca.export.analysis.scope import Dataflow, Scope, infer_scopes, input_scopes, label, walk
from stca.plugins.spec import DOMAIN
from stca.specs import TOKENS, Reason


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the user state: an output of the encoder and, under the same name, an input of the scorer.

    Attributes:
        name: its name in both halves: the value's own, or `state_<value>` where the whole graph has it as an input or
            output, which ONNX does not allow to be both in one graph.
        value: its name in the whole graph.
        dtype: numpy's name of the element type.
        shape: sizes; a string is symbolic.
        bytes: at the nominal workload.
        bytes_per_token: for each history token; 0 when no axis is the history's.
        verbatim: whether it is a user input stored as it came.
    """

    name: str
    value: str
    dtype: str
    shape: tuple[int | str, ...]
    bytes: int
    bytes_per_token: int
    verbatim: bool


@dataclass(frozen=True)
class SplitReport:
    """What the cut decided, at the nominal workload; work in floating-point operations per request.

    `user_work` is all that could be cached, `recomputed_work` the part of it the scorer does again each time.
    `recomputed_nodes` are the user-scope nodes of the scorer; some of them the encoder may compute for itself too.
    `reasons` tell of each node why it is where it is.
    """

    workload: Mapping[str, int]
    flops_per_byte: float
    state_bytes: int
    bytes_per_token: int
    user_work: int
    recomputed_work: int
    request_work: int
    target_work: int
    encoder_nodes: tuple[str, ...]
    scorer_nodes: tuple[str, ...]
    recomputed_nodes: tuple[str, ...]
    reasons: tuple[Reason, ...]
    request_dependencies: tuple[RequestDependency, ...]
    notes: tuple[str, ...]

    @property
    def hit_work(self) -> int:
        """What a request does that finds a state."""
        return self.recomputed_work + self.request_work + self.target_work

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; a dependency has its sentence as `text`."""
        plain = dataclasses.asdict(self)
        plain["workload"] = dict(self.workload)
        for entry, dependency in zip(plain["request_dependencies"], self.request_dependencies, strict=True):
            entry["text"] = str(dependency)
        return plain


@dataclass(frozen=True)
class Split:
    """A graph in two halves. `user_encoder` outputs exactly `state`; `target_scorer` reads it and outputs the rest."""

    user_encoder: onnx.ModelProto
    target_scorer: onnx.ModelProto
    state: tuple[StateTensor, ...]
    report: SplitReport


def split(
    model: onnx.ModelProto,
    scopes: Mapping[str, Scope | str],
    *,
    workload: Mapping[str, int] = DEFAULT_WORKLOAD,
    flops_per_byte: float = DEFAULT_FLOPS_PER_BYTE,
    history_dim: str = TOKENS,
    never: Callable[[onnx.ModelProto, Mapping[str, Scope]], Collection[str]] = lambda *_: (),
    measured: Measured | None = None,
    per_row: Mapping[str, float] | None = None,
    shown: Shown | None = None,
    verbatim: bool = False,
) -> Split:
    """Cut `model` into its two halves and prove the cut's postconditions.

    Functions other than the operator's are inlined first, so that the cut can go through them. Node names, value names
    and order stay; each half keeps the initializers, functions and inputs that it reads. An input that nothing reads
    is in neither half.

    Args:
        model: a valid model with its weights inline; not changed.
        scopes: scope of each graph input.
        workload: nominal size of each symbolic dimension of the inputs, at least 1.
        flops_per_byte: work worth recomputing per request to save one byte of state; raise it for a smaller state.
        history_dim: the symbolic dimension that counts history tokens.
        never: asked, of the model and of the scope of every value, which values may not be in the state.
        measured: shapes of values as runs showed them, for the cost of those that inference does not know.
        per_row: operations that looking up a row takes, by table, of those outside the graphs.
        shown: shapes at the workload as runs showed them.
        verbatim: whether user inputs as they came are state enough.

    Raises:
        SplitError: when the model is invalid, a scope or size is missing, nothing can be cached, no output depends on
            a target, what must be cached cannot be, or a postcondition fails.
    """
    if not 0 < flops_per_byte < math.inf:
        raise SplitError(f"flops_per_byte is {flops_per_byte}; it must be a positive number")
    for name, size in workload.items():
        if size < 1:
            raise SplitError(f"workload: {name} is {size}; a nominal size must be at least 1")
    _check("the model", model, weights=True)
    model = inlined(model)
    marked = input_scopes(model.graph, scopes)
    inferred = infer_scopes(model, scopes)
    cut = Cut(model, inferred, NominalSizes(model, workload, measured, per_row, shown))
    cut.refuse_hopeless(verbatim)
    cut.never = never(model, inferred)
    recomputed = cut.recomputed(Fraction(flops_per_byte))
    crossing = cut.crossing(recomputed)
    state = tuple(_state_tensor(name, cut, history_dim) for name in crossing)
    encoder, scorer = _user_encoder(model, cut, state), _target_scorer(model, cut, state)
    report = _report(cut, scopes, flops_per_byte, state, recomputed, encoder, scorer)
    result = Split(encoder, scorer, state, report)
    check_postconditions(model, marked, result)
    return result


def _report(
    cut: Cut,
    scopes: Mapping[str, Scope | str],
    flops_per_byte: float,
    state: tuple[StateTensor, ...],
    recomputed: set[int],
    encoder: onnx.ModelProto,
    scorer: onnx.ModelProto,
) -> SplitReport:
    return SplitReport(
        workload=dict(cut.sizes.workload),
        flops_per_byte=flops_per_byte,
        state_bytes=sum(t.bytes for t in state),
        bytes_per_token=sum(t.bytes_per_token for t in state),
        user_work=cut.work(Scope.USER),
        recomputed_work=sum(cut.sizes.work(cut.nodes[i]) for i in recomputed),
        request_work=cut.work(Scope.REQUEST),
        target_work=cut.work(Scope.TARGET),
        encoder_nodes=tuple(label(node) for node in encoder.graph.node),
        scorer_nodes=tuple(label(node) for node in scorer.graph.node),
        recomputed_nodes=tuple(label(cut.nodes[i]) for i in sorted(recomputed)),
        reasons=reasons(cut, [t.value for t in state], recomputed),
        request_dependencies=cut.request_dependencies(scopes),
        notes=_notes(cut, state),
    )


def _state_tensor(value: str, cut: Cut, history_dim: str) -> StateTensor:
    name = value
    if value in cut.inputs or value in cut.outputs:
        name = f"state_{value}"
        while name in cut.scopes:
            name += "_"
    dims = cut.sizes.dims(value) or ()
    shape = tuple(f"{name}_{axis}" if dim is None else dim for axis, dim in enumerate(dims))
    size = cut.sizes.bytes(value) or 0
    tokens = cut.sizes.workload.get(history_dim)
    return StateTensor(
        name=name,
        value=value,
        dtype=np.dtype(onnx.helper.tensor_dtype_to_np_dtype(cut.sizes.element_type(value))).name,
        shape=shape,
        bytes=size,
        bytes_per_token=math.ceil(size / tokens) if tokens and history_dim in shape else 0,
        verbatim=value in cut.inputs,
    )


def _notes(cut: Cut, state: tuple[StateTensor, ...]) -> tuple[str, ...]:
    """What a reader of the report should know and would not see."""
    notes = [f"input {name!r} is not used" for name in cut.inputs if not cut.readers(name)]
    dead = len(cut.nodes) - len(cut.live)
    if dead:
        notes.append(f"nodes left out because they reach no output: {dead}")
    if all(tensor.verbatim for tensor in state):
        notes.append("the state is user inputs as they came: at this price no user work is worth caching")
    guessed = [n for n in cut.sizes.guesses if cut.scopes.get(n) == Scope.USER]
    if guessed:
        notes.append(f"sizes guessed where the shape is unknown: {', '.join(map(repr, guessed))}")
    return tuple(notes)


def _named(state: StateTensor, cut: Cut) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(state.name, cut.sizes.element_type(state.value), state.shape)


def _user_encoder(model: onnx.ModelProto, cut: Cut, state: tuple[StateTensor, ...]) -> onnx.ModelProto:
    """User inputs → state. Ends in one Identity for each state tensor that cannot have its value's own name."""
    nodes, leaves = cut.flow.needed(tensor.value for tensor in state)
    half = _half(model, "user_encoder", cut, nodes, leaves, [_named(tensor, cut) for tensor in state])
    for tensor in state:
        if tensor.name != tensor.value:
            half.graph.node.append(onnx.helper.make_node("Identity", [tensor.value], [tensor.name], tensor.name))
    return half


def _target_scorer(model: onnx.ModelProto, cut: Cut, state: tuple[StateTensor, ...]) -> onnx.ModelProto:
    """State, then request and target inputs → the outputs of the whole. Starts with the encoder's Identities undone."""
    nodes, leaves = cut.flow.needed(cut.outputs, given=[tensor.value for tensor in state])
    half = _half(model, "target_scorer", cut, nodes, leaves - {tensor.value for tensor in state}, model.graph.output)
    body, inputs = list(half.graph.node), list(half.graph.input)
    del half.graph.node[:], half.graph.input[:]
    for tensor in state:
        if tensor.name != tensor.value:
            half.graph.node.append(onnx.helper.make_node("Identity", [tensor.name], [tensor.value], tensor.name))
    half.graph.node.extend(body)
    half.graph.input.extend(_named(tensor, cut) for tensor in state)
    half.graph.input.extend(inputs)
    return half


def _half(
    model: onnx.ModelProto,
    name: str,
    cut: Cut,
    nodes: set[int],
    leaves: set[str],
    outputs: Iterable[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """The part of `model` with these nodes, leaf values and outputs."""
    source = model.graph
    half = onnx.ModelProto(
        ir_version=max(model.ir_version, 4),  # before 4, every initializer had to be an input too
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
    )
    half.metadata_props.extend(model.metadata_props)
    graph = half.graph
    graph.name, graph.doc_string = name, source.doc_string
    graph.node.extend(source.node[i] for i in sorted(nodes))
    graph.metadata_props.extend(source.metadata_props)
    weights = {leaf for leaf in leaves if cut.scopes[leaf] == Scope.CONSTANT}
    graph.input.extend(value for value in source.input if value.name in leaves - weights)
    graph.initializer.extend(tensor for tensor in source.initializer if tensor.name in weights)
    graph.sparse_initializer.extend(t for t in source.sparse_initializer if t.values.name in weights)
    graph.output.extend(outputs)
    made = {value for node in graph.node for value in node.output}
    inner = made - {value.name for value in graph.output}
    graph.value_info.extend(value for value in source.value_info if value.name in inner)
    graph.quantization_annotation.extend(a for a in source.quantization_annotation if a.tensor_name in made | leaves)

    half.functions.extend(_functions(model, graph.node))
    used = {n.domain for n in walk([*graph.node, *(n for f in half.functions for n in f.node)])}
    half.opset_import.extend(o for o in model.opset_import if o.domain in ("", "ai.onnx") or o.domain in used)
    return half


def _functions(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> list[onnx.FunctionProto]:
    """The model's functions that `nodes` call, directly or through one another, in the model's order."""
    known = {(f.domain, f.name, f.overload): f for f in model.functions}
    called: set[tuple[str, str, str]] = set()
    open_nodes = list(walk(nodes))
    while open_nodes:
        node = open_nodes.pop()
        key = (node.domain, node.op_type, node.overload)
        if key in known and key not in called:
            called.add(key)
            open_nodes.extend(walk(known[key].node))
    return [f for key, f in known.items() if key in called]


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its functions inlined but the operator's, so that a cut can go through them."""
    foreign = [(f.domain, f.name) for f in model.functions if f.domain != DOMAIN]
    return onnx.inliner.inline_selected_functions(model, foreign) if foreign else model


def _check(what: str, model: onnx.ModelProto, *, weights: bool = False) -> None:
    """ONNX's full checker and strict shape inference, on a copy without the large weights: they may exceed 2 GB."""
    light = without_weights(model)
    try:
        onnx.checker.check_model(light, full_check=True)
        onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True, data_prop=True)
        for tensor in model.graph.initializer if weights else ():
            onnx.checker.check_tensor(tensor)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise SplitError(f"{what} is not valid ONNX: {said(e)}") from e


def check_postconditions(model: onnx.ModelProto, scopes: Mapping[str, Scope], result: Split) -> None:
    """Prove what a cut of `model` must guarantee, from the halves themselves and the inputs' marks alone.

    No request or target input reaches the encoder; its outputs are the state; the scorer reads only state, request
    and target inputs; its outputs are the whole's; together they compute every value the whole's outputs need;
    both are valid ONNX.

    Raises:
        SplitError: naming the first that fails.
    """
    names = [tensor.name for tensor in result.state]
    by_scope = {s: {name for name, scope in scopes.items() if scope == s} for s in Scope}
    halves = (
        ("the user encoder", result.user_encoder, by_scope[Scope.USER], names),
        (
            "the target scorer",
            result.target_scorer,
            {*names, *by_scope[Scope.REQUEST], *by_scope[Scope.TARGET]},
            [value.name for value in model.graph.output],
        ),
    )
    computed: set[str] = set()
    for what, half, allowed, outputs in halves:
        flow = Dataflow(half.graph)
        _, leaves = flow.needed(value.name for value in half.graph.output)
        read = ({value.name for value in half.graph.input} | leaves) - flow.constants
        if read - allowed:
            raise SplitError(f"postcondition: {what} reads {min(read - allowed)!r}; it may not")
        if [value.name for value in half.graph.output] != outputs:
            raise SplitError(f"postcondition: the outputs of {what} are not {', '.join(outputs)}")
        computed |= flow.writer.keys()
    flow = Dataflow(model.graph)
    live, _ = flow.needed(value.name for value in model.graph.output)
    missing = {name for name, i in flow.writer.items() if i in live} - computed
    if missing:
        raise SplitError(f"postcondition: neither half computes {min(missing)!r}")
    for what, half, _, _ in halves:
        _check(what, half)
