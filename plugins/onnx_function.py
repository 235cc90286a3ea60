"""The operator as ONNX functions in standard operators, so that one file runs in any ONNX runtime.

Two functions: `AttendSegment` is one request's attention, `TargetHistoryAttention` walks the requests of a batch.
A batch of one, the usual case, skips the walk, what only that needs, and its copies of key and value. Everything inside
is float32, whatever the inputs are. An empty history takes the branch that returns zeros: a softmax over nothing would
be NaN.
"""

from __future__ import annotations

import functools

import onnx
from onnx import defs, parser
from onnx.defs import OpSchema

from stca.plugins.spec import ARGUMENTS, DOMAIN, OP_NAME, OP_VERSION, RESULT, SCALE, VALUE_TYPES, Argument

OPSET = 18
# The first that has all operators of the bodies as they are used here.
OLDEST_OPSET = 15

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
    kind = "T" if argument.kind == "values" else "I"
    return OpSchema.FormalParameter(argument.name, kind, f"({', '.join(argument.shape)}), {argument.text}")


def register_schema() -> None:
    """Make the schema known to this process's `onnx`, once; the exporter and the checker look it up there."""
    if not defs.has(OP_NAME, DOMAIN):
        defs.register_schema(schema())


@functools.cache
def functions() -> tuple[onnx.FunctionProto, ...]:
    """The function bodies an ONNX model with the operator must carry in `model.functions`."""
    parsed = tuple(parser.parse_function(text) for text in (_ATTEND_SEGMENT, _TARGET_HISTORY_ATTENTION))
    assert (parsed[-1].domain, parsed[-1].name, OP_VERSION) == (DOMAIN, OP_NAME, 1)
    return parsed


def attach(model: onnx.ModelProto) -> None:
    """Give `model` the function bodies and the `stca` opset import, in place; what it already has is replaced.

    The bodies take the model's own opset where that has all they use: ONNX's checker wants one version of an operator.
    """
    names = {(f.domain, f.name) for f in functions()}
    kept = [f for f in model.functions if (f.domain, f.name) not in names]
    del model.functions[:]
    model.functions.extend([*kept, *functions()])
    if DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, OP_VERSION))
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), OPSET)
    for function in model.functions[len(kept) :]:
        for entry in function.opset_import:
            if not entry.domain and opset >= OLDEST_OPSET:
                entry.version = opset
