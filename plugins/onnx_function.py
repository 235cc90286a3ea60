"""The operator as ONNX functions in standard operators, so that one file runs in any ONNX runtime.

`AttendSegment` is one request's attention, `TargetHistoryAttention` walks the requests of a batch. A batch of one, the
usual case, skips the walk, what only that needs, and its copies of key and value. Everything inside is float32,
whatever the inputs are. An empty history takes the branch that returns zeros: a softmax over nothing would be NaN.

A node that gives `segment_offsets` and `segment_bias`, both of them, takes the body's overload `segments`. It copies
the segments' rows one behind the other, as standard operators must, with the bias as one more column of the key.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import onnx
from onnx import defs, parser
from onnx.defs import OpSchema

from stca.errors import ExportError
from stca.plugins.spec import (
    ARGUMENTS,
    DOMAIN,
    OP_NAME,
    OP_VERSION,
    PLAIN,
    QUALIFIED_NAME,
    RESULT,
    SCALE,
    VALUE_TYPES,
    Argument,
)

OPSET = 18
# The first that has all operators of the bodies as they are used here: ScatterND adds since then.
OLDEST_OPSET = 16

# `query` comes in scaled and in float32; key and value are converted here, request by request.
# Heads that share a key head are stacked as rows, so that the absorbed form (one key head) is one large product.
_ATTEND_SEGMENT = """
<domain: "stca", opset_import: ["" : 18]>
AttendSegment (query, key, value) => (out)
{
    heads = Shape <start: int = 1, end: int = 2> (query)
    depth = Shape <start: int = 2, end: int = 3> (query)
    key_heads = Shape <start: int = 1, end: int = 2> (key)
    value_depth = Shape <start: int = 2, end: int = 3> (value)
    rows = Constant <value: tensor = int64[1] {-1}> ()
    stacked_shape = Concat <axis: int = 0> (key_heads, rows, depth)
    by_head_shape = Concat <axis: int = 0> (heads, rows, value_depth)

    key32 = Cast <to: int = 1> (key)
    value32 = Cast <to: int = 1> (value)
    query_by_head = Transpose <perm: ints = [1, 0, 2]> (query)
    query_stacked = Reshape (query_by_head, stacked_shape)
    key_by_head = Transpose <perm: ints = [1, 2, 0]> (key32)
    value_by_head = Transpose <perm: ints = [1, 0, 2]> (value32)

    logits = MatMul (query_stacked, key_by_head)
    weights = Softmax <axis: int = -1> (logits)
    mixed = MatMul (weights, value_by_head)

    mixed_by_head = Reshape (mixed, by_head_shape)
    out = Transpose <perm: ints = [1, 0, 2]> (mixed_by_head)
}
"""

_TARGET_HISTORY_ATTENTION = """
<domain: "stca", opset_import: ["" : 18, "stca" : 1]>
TargetHistoryAttention <scale>
    (query, key, value, target_offsets, history_offsets, history_lengths) => (out)
{
    factor = Constant <value_float: float = @scale> ()
    query32 = Cast <to: int = 1> (query)
    scaled = Mul (query32, factor)

    zero = Constant <value: tensor = int64 {0}> ()
    one = Constant <value: tensor = int64 {1}> ()
    axis0 = Constant <value: tensor = int64[1] {0}> ()

    lengths64 = Cast <to: int = 7> (history_lengths)
    batch = Size (lengths64)
    tokens_used = ReduceSum <keepdims: int = 0> (lengths64)
    tokens_shape = Shape <start: int = 0, end: int = 1> (key)
    tokens_held = Squeeze (tokens_shape, axis0)
    is_one = Equal (batch, one)
    is_whole = Equal (tokens_used, tokens_held)
    has_tokens = Greater (tokens_held, zero)
    one_whole = And (is_one, is_whole)
    direct = And (one_whole, has_tokens)

    out32 = If (direct) <
        then_branch = one_request () => (direct_out) {
            direct_out = stca.AttendSegment (scaled, key, value)
        },
        else_branch = many_requests () => (walked) {
            from1 = Constant <value: tensor = int64[1] {1}> ()
            to_last = Constant <value: tensor = int64[1] {-1}> ()
            to_end = Constant <value: tensor = int64[1] {9223372036854775807}> ()
            targets64 = Cast <to: int = 7> (target_offsets)
            tokens64 = Cast <to: int = 7> (history_offsets)
            target_begin = Slice (targets64, axis0, to_last, axis0)
            target_end = Slice (targets64, from1, to_end, axis0)
            token_begin = Slice (tokens64, axis0, to_last, axis0)
            token_end = Add (token_begin, lengths64)
            heads = Shape <start: int = 1, end: int = 2> (query)
            value_depth = Shape <start: int = 2, end: int = 3> (value)
            none_shape = Concat <axis: int = 0> (axis0, heads, value_depth)
            none = ConstantOfShape <value: tensor = float[1] {0}> (none_shape)
            walk = Constant <value: tensor = bool {1}> ()
            walked = Loop (batch, walk, none) <
                body = each (int64 b, bool go_on, float[n, h, d] done) => (bool again, float[k, h, d] more) {
                    again = Identity (go_on)
                    b1 = Unsqueeze (b, axis0)
                    t0 = Gather <axis: int = 0> (target_begin, b1)
                    t1 = Gather <axis: int = 0> (target_end, b1)
                    l0 = Gather <axis: int = 0> (token_begin, b1)
                    l1 = Gather <axis: int = 0> (token_end, b1)
                    query_part = Slice (scaled, t0, t1, axis0)
                    count1 = Sub (l1, l0)
                    count = Squeeze (count1, axis0)
                    some = Greater (count, zero)
                    part = If (some) <
                        then_branch = attend () => (float[p, h, d] attended) {
                            key_part = Slice (key, l0, l1, axis0)
                            value_part = Slice (value, l0, l1, axis0)
                            attended = stca.AttendSegment (query_part, key_part, value_part)
                        },
                        else_branch = empty () => (float[p, h, d] zeros) {
                            m = Sub (t1, t0)
                            zeros_shape = Concat <axis: int = 0> (m, heads, value_depth)
                            zeros = ConstantOfShape <value: tensor = float[1] {0}> (zeros_shape)
                        }
                    >
                    more = Concat <axis: int = 0> (done, part)
                }
            >
        }
    >
    out = CastLike (out32, query)
}
"""

_SEGMENTS = "segments"
_OVERLOADS = 10  # the first version of ONNX's format that has them
# Row i of all segments, one behind the other, is row `shift + i` of the key, where `shift` is its segment's; segments
# are counted where they begin. A bias is a column of the key that meets a column of ones in the query: of halves, as
# ONNX Runtime warns of a factor that it can leave out, and a factor of two rounds nothing.
_OVER_SEGMENTS = """
<domain: "stca", opset_import: ["" : 18, "stca" : 1]>
TargetHistoryAttention <scale> (query, key, value, target_offsets, history_offsets, history_lengths,
                                segment_offsets, segment_bias) => (out)
{
    zero = Constant <value: tensor = int64 {0}> ()
    one = Constant <value: tensor = int64 {1}> ()
    axis0 = Constant <value: tensor = int64[1] {0}> ()
    axis1 = Constant <value: tensor = int64[1] {1}> ()
    last = Constant <value: tensor = int64[1] {-1}> ()
    end = Constant <value: tensor = int64[1] {9223372036854775807}> ()

    starts_and_end = Cast <to: int = 7> (history_offsets)
    starts = Slice (starts_and_end, axis0, last, axis0)
    lengths = Cast <to: int = 7> (history_lengths)
    ends = CumSum (lengths, zero)
    begins = Sub (ends, lengths)
    bounds = Concat <axis: int = 0> (axis0, ends)
    total = ReduceSum <keepdims: int = 0> (lengths)

    beyond = Add (total, one)
    marks_shape = Unsqueeze (beyond, axis0)
    unmarked = ConstantOfShape <value: tensor = int64[1] {0}> (marks_shape)
    begins_rows = Unsqueeze (begins, axis1)
    counted_shape = Shape (begins)
    counted = ConstantOfShape <value: tensor = int64[1] {1}> (counted_shape)
    marks = ScatterND <reduction: string = "add"> (unmarked, begins_rows, counted)
    numbers_and_end = CumSum (marks, zero)
    numbers = Slice (numbers_and_end, axis0, last, axis0)
    segment = Sub (numbers, one)

    shifts = Sub (starts, begins)
    shift = Gather <axis: int = 0> (shifts, segment)
    place = Range (zero, total, one)
    row = Add (shift, place)
    key_rows = Gather <axis: int = 0> (key, row)
    value_rows = Gather <axis: int = 0> (value, row)
    key32 = Cast <to: int = 1> (key_rows)
    value32 = Cast <to: int = 1> (value_rows)

    tokens = Shape <start: int = 0, end: int = 1> (row)
    key_heads = Shape <start: int = 1, end: int = 2> (key)
    bias_shape = Concat <axis: int = 0> (tokens, key_heads, axis1)
    bias = Gather <axis: int = 0> (segment_bias, segment)
    column = Constant <value: tensor = int64[2] {1, 2}> ()
    bias_column = Unsqueeze (bias, column)
    bias_columns = Expand (bias_column, bias_shape)
    key_biased = Concat <axis: int = 2> (key32, bias_columns)

    factor = Constant <value_float: float = @scale> ()
    half = Constant <value_float: float = 0.5> ()
    half_factor = Mul (factor, half)
    query32 = Cast <to: int = 1> (query)
    half_scaled = Mul (query32, half_factor)
    query_rows = Shape <start: int = 0, end: int = 2> (query)
    halves_shape = Concat <axis: int = 0> (query_rows, axis1)
    halves = ConstantOfShape <value: tensor = float[1] {0.5}> (halves_shape)
    query_biased = Concat <axis: int = 2> (half_scaled, halves)

    segments64 = Cast <to: int = 7> (segment_offsets)
    offsets64 = Gather <axis: int = 0> (bounds, segments64)
    offsets_begin = Slice (offsets64, axis0, last, axis0)
    offsets_end = Slice (offsets64, axis1, end, axis0)
    used64 = Sub (offsets_end, offsets_begin)
    offsets = Cast <to: int = 6> (offsets64)
    used = Cast <to: int = 6> (used64)
    out32 = stca.TargetHistoryAttention <scale: float = 2.0>
        (query_biased, key_biased, value32, target_offsets, offsets, used)
    out = CastLike (out32, query)
}
"""


def _infer(context: onnx.shape_inference.InferenceContext) -> None:
    """`(N_t, H, D_v)` of the query's type: the targets and heads are the query's, the depth is the value's."""
    query, value = context.get_input_type(0), context.get_input_type(2)
    if query is None or not query.tensor_type.HasField("shape"):
        return
    out = onnx.TypeProto()
    out.CopyFrom(query)
    if len(out.tensor_type.shape.dim) != 3:
        raise onnx.shape_inference.InferenceError(f"{OP_NAME}: query must have rank 3")
    depth = out.tensor_type.shape.dim[2]
    depth.Clear()
    if value is not None and len(value.tensor_type.shape.dim) == 3:
        depth.CopyFrom(value.tensor_type.shape.dim[2])
    context.set_output_type(0, out)


@functools.cache
def schema() -> OpSchema:
    """The operator's ONNX schema: names, types and shapes of its inputs, and shape inference for its output."""
    made = OpSchema(
        OP_NAME,
        DOMAIN,
        OP_VERSION,
        doc="Attention of each target over its own request's history; softmax and sums in float32, "
        "zeros where the history is empty.",
        inputs=[_parameter(a) for a in ARGUMENTS],
        outputs=[_parameter(RESULT)],
        type_constraints=[
            ("T", [f"tensor({t})" for t in VALUE_TYPES], "floating-point values"),
            ("I", ["tensor(int32)"], "offsets and lengths"),
            ("L", ["tensor(float)"], "what is added to logits"),
        ],
        attributes=[
            OpSchema.Attribute(SCALE, OpSchema.AttrType.FLOAT, "factor on the logits", required=True),
            OpSchema.Attribute(
                "plugin_namespace", OpSchema.AttrType.STRING, "where TensorRT looks for the plugin", required=False
            ),
        ],
    )
    made.set_type_and_shape_inference_function(_infer)
    return made


def _parameter(argument: Argument) -> OpSchema.FormalParameter:
    kind = {"values": "T", "structure": "I", "logits": "L"}[argument.kind]
    option = OpSchema.FormalParameterOption.Optional if argument.optional else OpSchema.FormalParameterOption.Single
    text = f"({', '.join(argument.shape)}), {argument.text}"
    return OpSchema.FormalParameter(argument.name, kind, text, param_option=option)


def register_schema() -> None:
    """Make the schema known to this process's `onnx`, once; the exporter and the checker look it up there."""
    if not defs.has(OP_NAME, DOMAIN):
        defs.register_schema(schema())


@functools.cache
def functions(segments: bool = False) -> tuple[onnx.FunctionProto, ...]:
    """The function bodies an ONNX model with the operator must carry in `model.functions`, each behind what it calls.

    Args:
        segments: whether a node gives `segment_offsets`; the last body is then the overload for those.
    """
    parsed = [parser.parse_function(text) for text in (_ATTEND_SEGMENT, _TARGET_HISTORY_ATTENTION, _OVER_SEGMENTS)]
    assert {(f.domain, f.name, OP_VERSION) for f in parsed[1:]} == {(DOMAIN, OP_NAME, 1)}
    parsed[-1].overload = _SEGMENTS
    return tuple(parsed[: 3 if segments else 2])


def attach(model: onnx.ModelProto) -> None:
    """Give `model` the function bodies and the `stca` opset import, in place; what it already has is replaced.

    The bodies take the model's own opset where that has all they use: ONNX's checker wants one version of an operator.

    Raises:
        ExportError: when a node gives one of `segment_offsets` and `segment_bias` without the other.
    """
    nodes = [node for node in _nodes(model.graph) if (node.domain, node.op_type) == (DOMAIN, OP_NAME)]
    for node in nodes:
        given = [bool(name) for name in node.input[len(PLAIN) :]]
        if any(given) and given != [True, True]:
            raise ExportError(
                f"{QUALIFIED_NAME} '{node.name}' gives segment_offsets or segment_bias alone; an ONNX function cannot "
                "default an input: give both, the bias as zeros where there is none"
            )
        node.overload = _SEGMENTS if any(given) else ""
    if segments := any(node.overload for node in nodes):
        model.ir_version = max(model.ir_version, _OVERLOADS)
    needed = functions(segments)
    names = {(f.domain, f.name) for f in needed}
    kept = [f for f in model.functions if (f.domain, f.name) not in names]
    del model.functions[:]
    model.functions.extend([*kept, *needed])
    if DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, OP_VERSION))
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), OPSET)
    for function in model.functions[len(kept) :]:
        for entry in function.opset_import:
            if not entry.domain and opset >= OLDEST_OPSET:
                entry.version = opset


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body)
