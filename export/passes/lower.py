"""`TargetHistoryAttention` as standard operators, for engines without the plugin: one request per run, no control flow.

The operator's function body walks a ragged batch with Loop and If, which TensorRT-RTX does not parse. With one request
per run the walk is gone, and what is left is one attention. Two bodies can take its place:

* `fused`: an `Attention` node of opset 23, which TensorRT keeps as one fused kernel or refuses to build. Tried with
  TensorRT-RTX 1.7.1: it has such kernels for float16 and bfloat16, and for head sizes from 16 to 256 in steps of 8, so
  neither for float32 nor for an absorbed state wider than 256. Other sizes are widened to those by zeros.
* `decomposed`: MatMul, Softmax in float32, MatMul. The logits `(H, N_t, N_h)` then exist in memory.

`B` becomes 1 and `B_plus_1` becomes 2 in the graph's inputs, so an engine cannot be given a batch by mistake. An empty
history is given as one token of zeros with offsets `[0, 0]`, and the attention's result is zeros.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper, parser, version_converter
from onnx.reference import ReferenceEvaluator

from stca.errors import ExportError, said
from stca.export.analysis.cost import NominalSizes, any_sizes
from stca.export.analysis.integers import INTEGERS, fold_integers, known_integers
from stca.export.analysis.scope import Dataflow, drop_unread, label, opset_of, walk
from stca.export.passes.nodes import NewNodes, names_in
from stca.plugins import onnx_function
from stca.plugins.spec import DOMAIN, OP_NAME, PLAIN

Form = Literal["fused", "decomposed"]
ATTENTION_OPSET: Final = 23
_SINGLE: Final = {"B": 1, "B_plus_1": 2}
# Rows of a history that offsets and lengths are computed for; so many that a bound on what is read would show.
_MANY: Final = 1_000_000
_ROWS: Final = (0, 7, _MANY)
# Head sizes of TensorRT's fused attention, as tried.
_LEAST_HEAD: Final = 16
_HEAD_STEP: Final = 8

# Positions that a target may look at, (N_t, N_h) bool, where the segment is not used to its end. ONNX Runtime's
# Attention does not broadcast a mask over the targets.
_MASK = """
    tokens = Shape <start: int = 0, end: int = 1> (key)
    last = Squeeze (tokens, axis0)
    first = Constant <value: tensor = int64 {0}> ()
    step = Constant <value: tensor = int64 {1}> ()
    position = Range (first, last, step)
    position_row = Unsqueeze (position, axis0)
    used_row = Less (position_row, lengths64)
    targets = Shape <start: int = 0, end: int = 1> (query)
    used_shape = Concat <axis: int = 0> (targets, tokens)
    used = Expand (used_row, used_shape)
"""

_FUSED = """
    query4 = Unsqueeze (scaled, axis0)
    key4 = Unsqueeze (key, axis0)
    value4 = Unsqueeze (value, axis0)
    query_by_head = Transpose <perm: ints = [0, 2, 1, 3]> (query4)
    key_by_head = Transpose <perm: ints = [0, 2, 1, 3]> (key4)
    value_by_head = Transpose <perm: ints = [0, 2, 1, 3]> (value4)
    mixed = Attention <scale: float = 1.0> (query_by_head, key_by_head, value_by_head{used})
    mixed_by_target = Transpose <perm: ints = [0, 2, 1, 3]> (mixed)
    attended = Squeeze (mixed_by_target, axis0)
"""

# Key and value with one head are broadcast over the query's.
_DECOMPOSED = """
    query_by_head = Transpose <perm: ints = [1, 0, 2]> (scaled)
    key_by_head = Transpose <perm: ints = [1, 2, 0]> (key)
    value_by_head = Transpose <perm: ints = [1, 0, 2]> (value)
    logits = MatMul (query_by_head, key_by_head)
    logits32 = Cast <to: int = 1> (logits)
{masked}
    weights32 = Softmax <axis: int = -1> ({logits})
    weights = CastLike (weights32, query)
    mixed = MatMul (weights, value_by_head)
    attended = Transpose <perm: ints = [1, 0, 2]> (mixed)
"""

_MASK_LOGITS = """
    never32 = Constant <value_float: float = -3.0e38> ()
    masked = Where (used, logits32, never32)
"""

# The query takes the scale, as its smallest operand. Whether there is a history is asked of the offsets' values and not
# of the axis: kernels differ on an empty axis (ONNX Runtime's refuses it), so an engine is given one token of zeros.
_BODY = """
<domain: "stca", opset_import: ["" : {opset}]>
TargetHistoryAttention <scale>
    (query, key, value, target_offsets, history_offsets, history_lengths) => (out)
{{
    axis0 = Constant <value: tensor = int64[1] {{0}}> ()
    factor32 = Constant <value_float: float = @scale> ()
    factor = CastLike (factor32, query)
    scaled = Mul (query, factor)
    lengths64 = Cast <to: int = 7> (history_lengths)
{attention}
    some = Greater (lengths64, axis0)
    zero32 = Constant <value_float: float = 0.0> ()
    zero = CastLike (zero32, query)
    out = Where (some, attended, zero)
}}
"""


def is_operator(node: onnx.NodeProto) -> bool:
    """Whether a node is `stca::TargetHistoryAttention`."""
    return (node.domain, node.op_type) == (DOMAIN, OP_NAME)


def for_one_request(model: onnx.ModelProto, form: Form) -> onnx.ModelProto:
    """A copy of `model` that serves one request per run, written in standard operators of opset 23 or later.

    Args:
        model: typed; large weights may be left out (external data is not read).
        form: how the attention is written; a model without the operator only has its sizes fixed.

    Returns:
        A model without local functions, without nodes whose result is not used and without inputs that nothing reads.

    Raises:
        ExportError: when the operator is inside a body of control flow, or ONNX cannot convert the model's opset.
    """
    onnx_function.register_schema()
    operators = [node for node in model.graph.node if is_operator(node)]
    inside = [node for node in walk(model.graph.node) if is_operator(node)][len(operators) :]
    if inside:
        raise ExportError(f"node {label(inside[0])!r} is inside a control-flow body; move it to the graph's top level")
    if joining := [node for node in operators if len(node.input) > len(PLAIN)]:
        raise ExportError(
            f"node {label(joining[0])!r} joins several segments of a history, which standard operators of one fused "
            "attention cannot; build it with --lowering plugin"
        )
    all_tokens = all(uses_all_tokens(model, node) for node in operators)
    if form == "fused":
        model = _with_kernels(model)
    copy = inliner.inline_selected_functions(
        model, [(f.domain, f.name) for f in onnx_function.functions()], exclude=True
    )
    try:
        if opset_of(copy) < ATTENTION_OPSET:
            copy = version_converter.convert_version(copy, ATTENTION_OPSET)
    except Exception as e:  # onnx raises RuntimeError and its own ConvertError, whose message is the useful part
        raise ExportError(f"the model cannot be converted to opset {ATTENTION_OPSET}: {said(e)}") from e
    del copy.functions[:]
    copy.functions.append(parser.parse_function(_body(form, all_tokens, opset_of(copy))))
    copy = inliner.inline_local_functions(copy)
    fix_to_one_request(copy)
    fold_integers(copy)
    drop_unread(copy.graph)
    return copy


def _with_kernels(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with operators of head sizes that fused kernels have: the others are widened by zeros.

    A key with a column for a bias is one wider than its value, and kernels want both of one size.
    """
    sizes, copy = NominalSizes(model, any_sizes(model.graph)), onnx.ModelProto()
    copy.CopyFrom(model)
    new, nodes = NewNodes(names_in(model.graph)), list(copy.graph.node)
    del copy.graph.node[:]
    for node in nodes:
        depths = [(sizes.dims(name) or (None,))[-1] for name in node.input[:3]] if is_operator(node) else [None]
        known = [d for d in depths if isinstance(d, int)]
        wide = max(_LEAST_HEAD, -(-max(known, default=0) // _HEAD_STEP) * _HEAD_STEP)
        if len(known) == 3 and set(known) != {wide}:
            for i, depth in enumerate(known):
                if depth < wide:
                    pads = new.integers([0, 0, 0, 0, 0, wide - depth])
                    node.input[i] = new.node("Pad", [node.input[i], pads], f"{node.input[i]}_wide")
            out, node.output[0] = node.output[0], new.name(f"{node.output[0]}_wide")
            ends = [new.integers([n]) for n in (0, known[2], 2)]
            new.nodes.append(node)
            new.node("Slice", [node.output[0], *ends], out, exact=True)
        else:
            new.nodes.append(node)
    copy.graph.node.extend(new.nodes)
    copy.graph.initializer.extend(new.weights)
    return copy


def fix_to_one_request(model: onnx.ModelProto) -> None:
    """Give `B` and `B_plus_1` their sizes for one request, in place, and drop what then need not be computed."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in _SINGLE:
                dim.dim_value = _SINGLE[dim.dim_param]
    del model.graph.value_info[:]
    _take_the_only_row(model)
    drop_unread(model.graph)


def uses_all_tokens(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether `history_lengths` of an operator are the segments' own, shown by computing them for a few batches.

    False also where they depend on anything but `history_offsets`: then some tokens of a segment may be left out.
    Where offsets and lengths follow from the key's rows alone, there is one segment, of all of them.
    """
    key, offsets, lengths = node.input[1], node.input[4], node.input[5]
    if one_segment(model, key, offsets, lengths):
        return True
    nodes, leaves = Dataflow(model.graph).needed([lengths], given=[offsets])
    constants = known_integers(model.graph)
    if not leaves <= {offsets, *constants}:
        return False
    int32 = onnx.TensorProto.INT32
    graph = helper.make_graph(
        [model.graph.node[i] for i in sorted(nodes)],
        "lengths",
        [helper.make_tensor_value_info(offsets, int32, [None])],
        [helper.make_tensor_value_info(lengths, int32, [None])],
        [constants[name] for name in sorted(leaves - {offsets})],
    )
    evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=model.opset_import))
    for batch in ([0, 7], [0, 0, 5], [0, 3, 3, 11], [0, _MANY]):
        computed: Any = evaluator.run(None, {offsets: np.array(batch, dtype=np.int32)})
        if not np.array_equal(computed[0], np.diff(batch)):
            return False
    return True


def one_segment(model: onnx.ModelProto, key: str, offsets: str, lengths: str) -> bool:
    """Whether offsets and lengths follow from the key's rows alone, and are those of one segment of all of them."""
    nodes, leaves = Dataflow(model.graph).needed([offsets, lengths], given=[key])
    constants = known_integers(model.graph)
    if key not in leaves or not leaves <= {key, *constants}:
        return False
    graph = helper.make_graph(
        [model.graph.node[i] for i in sorted(nodes)],
        "segment",
        [helper.make_tensor_value_info(key, onnx.TensorProto.FLOAT, [None, None, None])],
        [helper.make_tensor_value_info(name, onnx.TensorProto.INT32, [None]) for name in (offsets, lengths)],
        [constants[name] for name in sorted(leaves - {key})],
    )
    evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=model.opset_import))
    computed: Any = [evaluator.run(None, {key: np.zeros((n, 1, 1), np.float32)}) for n in _ROWS]
    return all(o.tolist() == [0, n] and used.tolist() == [n] for n, (o, used) in zip(_ROWS, computed, strict=True))


def _take_the_only_row(model: onnx.ModelProto) -> None:
    """Let every Gather from a value of one row take row 0, whatever its index says, in place.

    Tokens find their request by their place among the offsets. The one that stands for an empty history is beyond them.
    Where the index has a row for each row of an input, only their number is asked of that input, and what computed the
    index, a dozen small kernels, is no longer needed.
    """
    sizes = NominalSizes(model, any_sizes(model.graph))
    rows_like = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if node.op_type == "Gather" and not node.domain and axis == 0 and (sizes.dims(node.input[0]) or (0,))[0] == 1:
            index, first = node.input[1], f"{node.output[0]}_first"
            zero = np.zeros(1, helper.tensor_dtype_to_np_dtype(sizes.element_type(index)))
            if index not in rows_like:
                rows_like[index] = _as_many_rows(model, index)
            if (source := rows_like[index]) is not None:
                nodes.append(helper.make_node("Shape", [source], [f"{first}_rows"], start=0, end=1))
                value = numpy_helper.from_array(zero)
                nodes.append(helper.make_node("ConstantOfShape", [f"{first}_rows"], [first], value=value))
            else:
                value = numpy_helper.from_array(zero.reshape(()))
                nodes.append(helper.make_node("Constant", [], [f"{first}_zero"], value=value))
                nodes.append(helper.make_node("Mul", [index, f"{first}_zero"], [first]))
            node.input[1] = first
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _as_many_rows(model: onnx.ModelProto, index: str) -> str | None:
    """An input with as many rows as `index`, shown by computing it for two numbers of rows; None when there is none."""
    nodes, leaves = Dataflow(model.graph).needed([index])
    inputs = [v for v in model.graph.input if v.name in leaves]
    constants = [t for name, t in known_integers(model.graph).items() if name in leaves]
    if len(inputs) + len(constants) < len(leaves) or any(v.type.tensor_type.elem_type not in INTEGERS for v in inputs):
        return None
    symbols = {d.dim_param for v in inputs for d in v.type.tensor_type.shape.dim if not d.HasField("dim_value")}
    long: list[str] = [v.name for v in inputs if {d.dim_param for d in v.type.tensor_type.shape.dim[:1]} == symbols]
    if len(symbols) != 1 or not long:
        return None
    asked = helper.make_graph(
        [model.graph.node[i] for i in sorted(nodes)], "index", inputs, [onnx.ValueInfoProto(name=index)], constants
    )
    evaluator = ReferenceEvaluator(helper.make_model(asked, opset_imports=model.opset_import))
    for rows in (1, 5):
        feeds = {}
        for v in inputs:
            kind = v.type.tensor_type
            shape = [d.dim_value if d.HasField("dim_value") else rows for d in kind.shape.dim]
            feeds[v.name] = np.zeros(shape, helper.tensor_dtype_to_np_dtype(kind.elem_type))
        computed: Any = evaluator.run(None, feeds)
        if computed[0].shape != (rows,):
            return None
    return long[0]


def _body(form: Form, all_tokens: bool, opset: int) -> str:
    if form == "fused":
        attention = _FUSED.format(used="" if all_tokens else ", used")
    elif all_tokens:
        attention = _DECOMPOSED.format(masked="", logits="logits32")
    else:
        attention = _DECOMPOSED.format(masked=_MASK_LOGITS, logits="masked")
    if not all_tokens:
        attention = _MASK + attention
    return _BODY.format(attention=attention, opset=opset)
