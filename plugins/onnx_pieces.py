"""Attention over a history in several pieces, each a tensor of its own, as ONNX functions in standard operators.

`TargetHistoryAttention` takes one key and one value. Where a history lies in several places, these three take it from
there, without a join: `BeginPieces` once, `AttendPiece` for each piece in turn, `EndPieces` once. What was found so far
is, relative to some logit `m` of each row, `s = Σ exp(l - m)` and `o = Σ exp(l - m) v`. Another piece's are added after
both are brought to the larger `m`. So the result is that of one softmax over all pieces, whatever their order. A piece
without rows changes nothing; where all are without, the result is zeros. All is float32, as in
`stca.plugins.onnx_function`.
"""

from __future__ import annotations

import functools

import onnx
from onnx import parser

BEGIN, ATTEND, ATTEND_BIASED, END = "BeginPieces", "AttendPiece", "AttendBiasedPiece", "EndPieces"
# ReduceMax takes its axes as an input since then.
OLDEST_OPSET = 18

_BEGIN = """
<domain: "stca", opset_import: ["" : 18]>
BeginPieces <scale> (query, key, value) => (stacked, mixed, most, total)
{
    factor = Constant <value_float: float = @scale> ()
    query32 = Cast <to: int = 1> (query)
    scaled = Mul (query32, factor)
    depth = Shape <start: int = 2, end: int = 3> (query)
    key_heads = Shape <start: int = 1, end: int = 2> (key)
    value_depth = Shape <start: int = 2, end: int = 3> (value)
    rows = Constant <value: tensor = int64[1] {-1}> ()
    one = Constant <value: tensor = int64[1] {1}> ()
    stacked_shape = Concat <axis: int = 0> (key_heads, rows, depth)
    by_head = Transpose <perm: ints = [1, 0, 2]> (scaled)
    stacked = Reshape (by_head, stacked_shape)
    outer = Shape <start: int = 0, end: int = 2> (stacked)
    mixed_shape = Concat <axis: int = 0> (outer, value_depth)
    mixed = ConstantOfShape <value: tensor = float[1] {0}> (mixed_shape)
    single = Concat <axis: int = 0> (outer, one)
    most = ConstantOfShape <value: tensor = float[1] {-3.4028234e38}> (single)
    total = ConstantOfShape <value: tensor = float[1] {0}> (single)
}
"""

# A weight is `exp(l - m) / s`, and that of `m` itself is one over the sum. So Softmax, one operator, tells the sum;
# exponentials and a sum of their own go through all logits several times. `m` may be any logit whose weight has all of
# its digits: the largest of a few, which costs nothing, or else the largest of all.
_ATTEND = """
<domain: "stca", opset_import: ["" : 18]>
AttendShiftedPiece (stacked, key, value, shift, mixed, most, total) => (mixed_after, most_after, total_after)
{
    zero = Constant <value: tensor = int64 {0}> ()
    rows = Shape <start: int = 0, end: int = 1> (key)
    count = Squeeze (rows)
    some = Greater (count, zero)
    mixed_after, most_after, total_after = If (some) <
        then_branch = attend () => (float[g, r, d] mixed_more, float[g, r, i] most_more, float[g, r, i] total_more) {
            last = Constant <value: tensor = int64[1] {-1}> ()
            key32 = Cast <to: int = 1> (key)
            value32 = Cast <to: int = 1> (value)
            key_by_head = Transpose <perm: ints = [1, 2, 0]> (key32)
            value_by_head = Transpose <perm: ints = [1, 0, 2]> (value32)
            logits = MatMul (stacked, key_by_head)
            weights = Softmax <axis: int = -1> (logits)
            begin = Constant <value: tensor = int64[1] {0}> ()
            few = Constant <value: tensor = int64[1] {64}> ()
            few_logits = Slice (logits, begin, few, last)
            few_weights = Slice (weights, begin, few, last)
            few_highest = ReduceMax (few_logits, last)
            few_share = ReduceMax (few_weights, last)
            least = ReduceMin <keepdims: int = 0> (few_share)
            enough = Constant <value_float: float = 1e-20> ()
            told = Greater (least, enough)
            unshifted, share = If (told) <
                then_branch = by_few () => (float[g, r, i] highest_few, float[g, r, i] share_few) {
                    highest_few = Identity (few_highest)
                    share_few = Identity (few_share)
                },
                else_branch = by_all () => (float[g, r, i] highest_all, float[g, r, i] share_all) {
                    highest_all = ReduceMax (logits, last)
                    share_all = ReduceMax (weights, last)
                }
            >
            highest = Add (unshifted, shift)
            own = MatMul (weights, value_by_head)
            most_more = Max (most, highest)
            lowered = Sub (most, most_more)
            kept = Exp (lowered)
            below = Sub (highest, most_more)
            largest = Exp (below)
            gained = Div (largest, share)
            total_kept = Mul (total, kept)
            total_more = Add (total_kept, gained)
            mixed_kept = Mul (mixed, kept)
            mixed_gained = Mul (own, gained)
            mixed_more = Add (mixed_kept, mixed_gained)
        },
        else_branch = skip () => (float[g, r, d] mixed_same, float[g, r, i] most_same, float[g, r, i] total_same) {
            mixed_same = Identity (mixed)
            most_same = Identity (most)
            total_same = Identity (total)
        }
    >
}
"""

_ATTEND_UNSHIFTED = """
<domain: "stca", opset_import: ["" : 18, "stca" : 1]>
AttendPiece (stacked, key, value, mixed, most, total) => (mixed_after, most_after, total_after)
{
    none = Constant <value_float: float = 0.0> ()
    mixed_after, most_after, total_after = stca.AttendShiftedPiece (stacked, key, value, none, mixed, most, total)
}
"""

# Some columns of the key, `more`, are apart, as a bias is that joins it in a column of its own. Where all rows of a
# piece have the same there, as of a neighbour's similarity, they add one number to all logits of a target, and so
# to that which the piece's sums are relative to. Otherwise the key's columns are put together.
_ATTEND_BIASED = """
<domain: "stca", opset_import: ["" : 18, "stca" : 1]>
AttendBiasedPiece (stacked, stacked_more, key, more, value, mixed, most, total)
    => (mixed_after, most_after, total_after)
{
    zero = Constant <value: tensor = int64 {0}> ()
    rows = Shape <start: int = 0, end: int = 1> (more)
    count = Squeeze (rows)
    begin = Constant <value: tensor = int64[1] {0}> ()
    one = Constant <value: tensor = int64[1] {1}> ()
    more32 = Cast <to: int = 1> (more)
    first = Slice (more32, begin, one, begin)
    equal = Equal (more32, first)
    differs = Not (equal)
    counted = Cast <to: int = 1> (differs)
    others = ReduceSum <keepdims: int = 0> (counted)
    none = Constant <value_float: float = 0.0> ()
    same = Equal (others, none)
    some = Greater (count, zero)
    shared = And (same, some)
    mixed_after, most_after, total_after = If (shared) <
        then_branch = shift () => (float[g, r, d] mixed_more, float[g, r, i] most_more, float[g, r, i] total_more) {
            first_by_head = Transpose <perm: ints = [1, 2, 0]> (first)
            bias = MatMul (stacked_more, first_by_head)
            mixed_more, most_more, total_more = stca.AttendShiftedPiece (
                stacked, key, value, bias, mixed, most, total
            )
        },
        else_branch = join () => (float[g, r, d] mixed_all, float[g, r, i] most_all, float[g, r, i] total_all) {
            key32 = Cast <to: int = 1> (key)
            key_all = Concat <axis: int = 2> (key32, more32)
            stacked_all = Concat <axis: int = 2> (stacked, stacked_more)
            mixed_all, most_all, total_all = stca.AttendPiece (stacked_all, key_all, value, mixed, most, total)
        }
    >
}
"""

# The sum is at least 1, for the largest term is exp(0), or 0 where no piece had rows.
_END = """
<domain: "stca", opset_import: ["" : 18]>
EndPieces (query, mixed, total) => (out)
{
    one = Constant <value_float: float = 1.0> ()
    divisor = Max (total, one)
    divided = Div (mixed, divisor)
    heads = Shape <start: int = 1, end: int = 2> (query)
    rows = Constant <value: tensor = int64[1] {-1}> ()
    value_depth = Shape <start: int = 2, end: int = 3> (mixed)
    by_head_shape = Concat <axis: int = 0> (heads, rows, value_depth)
    by_head = Reshape (divided, by_head_shape)
    out32 = Transpose <perm: ints = [1, 0, 2]> (by_head)
    out = CastLike (out32, query)
}
"""


@functools.cache
def functions(opset: int = OLDEST_OPSET) -> tuple[onnx.FunctionProto, ...]:
    """The bodies, for a model of that opset."""
    parsed = tuple(parser.parse_function(text) for text in (_BEGIN, _ATTEND, _ATTEND_UNSHIFTED, _ATTEND_BIASED, _END))
    for function in parsed:
        function.opset_import[0].version = opset
    return parsed
