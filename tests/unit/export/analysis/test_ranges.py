"""Which integers an input may hold, from the places where values pick rows."""

from __future__ import annotations

import math

import onnx
import pytest
import torch
from onnx import inliner, parser

from stca.export.analysis.ranges import Range, input_ranges

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
TABLES = "float[100, 4] table, float[B, L, 4] hidden, float[7, 4] small, int64[1] s"


def ranges(body: str, ids: str = "int64[B, L] ids") -> dict[str, Range]:
    model = parser.parse_model(f"{HEAD} g ({ids}, {TABLES}) => (float y) {{ {body} }}")
    return {n: r for n, r in input_ranges(model).items() if n in ("ids", "length")}


def c(name: str, value: int) -> str:
    return f"{name} = Constant <value = int64 {{{value}}}> ()"


@pytest.mark.parametrize(
    ("body", "low", "high"),
    [
        ("y = Gather (table, ids)", 0, 99),
        ("i = Cast <to = 7> (ids) y = Gather (table, i)", 0, 99),
        (f"{c('k', 1)} i = Add (ids, k) y = Gather (table, i)", -1, 98),
        (f"{c('k', 1)} i = Add (k, ids) y = Gather (table, i)", -1, 98),
        (f"{c('k', 10)} i = Sub (ids, k) y = Gather (table, i)", 10, 109),
        (f"{c('k', 99)} i = Sub (k, ids) y = Gather (table, i)", 0, 99),
        ("k = Constant <value = int64[3] {0, 20, 50}> () i = Add (ids, k) y = Gather (table, i)", 0, 49),
        (f"{c('k', 2)} i = Mul (ids, k) y = Gather (table, i)", 0, 49),
        (f"{c('k', 10)} i = Div (ids, k) y = Gather (table, i)", 0, 999),
        (f"{c('z', 0)} i = Max (ids, z) y = Gather (table, i)", -math.inf, 99),
        (f"{c('z', 0)} e = Equal (ids, z) i = Where (e, z, ids) y = Gather (table, i)", 0, 99),
        (f"{c('m', -1)} {c('z', 0)} e = Equal (ids, m) i = Where (e, z, ids) y = Gather (table, i)", -1, 99),
        ("r = Reshape (ids, s) y = Gather (table, r)", 0, 99),
        ("a = Gather (table, ids) b = Gather (small, ids) y = Add (a, b)", 0, 6),
        ("k = Concat <axis = 1> (ids, ids) y = Gather (table, k)", 0, 99),
    ],
)
def test_what_an_index_may_be(body, low, high):
    assert ranges(body)["ids"] == Range(low, high)


@pytest.mark.parametrize(
    "body",
    [
        f"{c('k', 100)} i = Mod (ids, k) y = Gather (table, i)",
        f"{c('z', 0)} {c('m', 99)} i = Clip (ids, z, m) y = Gather (table, i)",
        f"{c('z', 0)} {c('n', 100)} e = Less (ids, n) i = Where (e, ids, z) y = Gather (table, i)",
        # Of what a comparison sorts out, the other part goes another way.
        f"{c('n', 50)} l = Less (ids, n) a = Sub (ids, n) i = Where (l, ids, a) y = Gather (table, i)",
        "f = Cast <to = 1> (ids) y = Mul (f, f)",
    ],
)
def test_what_a_model_bounds_itself_may_be_anything(body):
    assert "ids" not in ranges(body)


def test_what_a_comparison_sorts_out_has_no_end_and_may_be_below_zero():
    body = f"{c('k', 1)} {c('z', 0)} l = Less (ids, z) a = Add (ids, k) i = Where (l, z, a) y = Gather (table, i)"
    assert ranges(body)["ids"] == Range(-1)


COLUMNS = "a = Slice (ids, z, o, o) b = Slice (ids, o, t, o)"
NUMBERS = " ".join(f"{n} = Constant <value = int64[1] {{{i}}}> ()" for n, i in (("z", 0), ("o", 1), ("t", 2)))


def test_columns_of_several_tables_bound_no_column():
    """Of the fields of one matrix each has a table of its own: the smallest one's rows are no limit of the others."""
    assert "ids" not in ranges(f"{NUMBERS} {COLUMNS} x = Gather (table, a) v = Gather (small, b) y = Add (x, v)")


def test_columns_of_one_table_are_bounded_by_it():
    found = ranges(f"{NUMBERS} {COLUMNS} x = Gather (table, a) v = Gather (table, b) y = Add (x, v)")
    assert found["ids"] == Range(0, 99)


def test_fields_of_one_table_have_each_their_own_part():
    """As factorization machines have them: ids of all fields in a row, each moved by what lies before its part."""
    model = parser.parse_model(
        f"""{HEAD} g (int64[B, 1] item, int64[B, 1] shop, float[100, 4] table) => (float y) {{
            fields = Concat <axis = 1> (item, shop)
            parts = Constant <value = int64[2] {{0, 80}}> ()
            rows = Add (fields, parts)
            y = Gather (table, rows)
        }}"""
    )
    assert input_ranges(model) == {"item": Range(0, 99), "shop": Range(0, 19)}


def test_a_length_is_at_most_the_history():
    body = f"{c('k', 1)} i = Sub (length, k) y = GatherElements <axis = 1> (hidden, i)"
    found = ranges(body, "int64[B, 1, 4] length")["length"]
    assert (found.low, found.size, found.short) == (1, "L", 0)


@pytest.mark.parametrize("op", ["GreaterOrEqual", "Greater"])
def test_a_length_that_a_comparison_guards_is_one_of_the_history(op):
    guard = f"{c('k', 1)} {c('z', 0)} {c('n', int(op != 'Greater'))} w = {op} (length, n)"
    body = f"{guard} a = Sub (length, k) i = Where (w, a, z) y = GatherElements <axis = 1> (hidden, i)"
    found = ranges(body, "int64[B, 1, 4] length")["length"]
    assert (found.low, found.size, found.short) == (1, "L", 0)


def test_a_table_need_not_be_a_weight():
    body = "t = Constant <value = float[5] {1.0, 2.0, 3.0, 4.0, 5.0}> () y = Gather (t, ids)"
    assert ranges(body)["ids"] == Range(0, 4)


class Net(torch.nn.Module):
    """The last state by `hidden[range(batch), length - 1]`, and a padding id of -1."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(40, 4)

    def forward(self, ids, length, shifted):
        hidden = self.table(ids)
        last = hidden[torch.arange(ids.shape[0]), length - 1]
        return (last + self.table(shifted + 1).sum(1)).sum(-1)


def test_what_torch_exports(tmp_path):
    example = tuple(torch.ones(shape, dtype=torch.long) for shape in ((2, 10), (2,), (2, 3)))
    names, file = ["ids", "length", "shifted"], tmp_path / "net.onnx"
    shapes = [{0: torch.export.Dim("batch")}] * 3
    torch.onnx.export(Net().eval(), example, file, dynamo=True, verbose=False, input_names=names, dynamic_shapes=shapes)
    found = input_ranges(inliner.inline_local_functions(onnx.load(file)))
    assert {n: (r.low, r.high) for n, r in found.items()} == {"ids": (0, 39), "length": (1, 10), "shifted": (-1, 38)}
