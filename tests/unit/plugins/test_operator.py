"""Every implementation of the operator against the float64 reference, on one table; proof that the table can fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import attention_forms
from support.attention_cases import TABLE, Case, Layout, check, inputs, signed_scale
from torch import Tensor

from stca.plugins import launch, tiling, torch_op
from stca.plugins.interpret import KERNELS, Interpreter
from stca.plugins.tiling import Plan, Tile

# The interpreter takes about a third of a second a case, and two to eight for one of 10,000 tokens. Unless told
# otherwise it runs one dtype of each kind of case, in turn, and of the long ones one that is cut into parts.
_FULL = bool(os.environ.get("STCA_FULL_TABLE"))
_LONG = [case for case in TABLE if case.products > 10_000]
INTERPRETED = [
    case for i, case in enumerate(TABLE) if _FULL or case is _LONG[2] or (case not in _LONG and (i + i // 3) % 3 == 0)
]
# In bulk: 16 bits and head sizes that are powers of two, to 128. Of those every sixth, so all layouts and scores.
BULK = [
    case
    for case in TABLE
    if case.dtype != "float32"
    and not case.shape.segments
    and case.products <= 10_000
    and {case.depth, case.value_depth} <= {16, 32, 64, 128}
][:: 1 if _FULL else 7]
# Whole blocks in more parts than one that do not come out even, a tail, and rows for three products a tile and more.
STACKED = Case(Layout("stacked", (150, 2), (95, 21), (87, 17)), 3, 1, 16, 16, "bfloat16", scale=0.05)
STACKED_PLAN = Plan(Tile(3 * tiling.BULK_ROWS, 16, 16, 16, 4, 2, bulk=True), parts=4, seconds=0.0)
FORMS = (attention_forms.torch_cpu, attention_forms.onnx_runtime, attention_forms.onnx_reference)
MUTANTS = {
    "a wrong mask": (
        "tl.arange(0, BLOCK_N)[None, :] < tokens_left",
        "tl.arange(0, BLOCK_N)[None, :] <= tokens_left",
    ),
    "a missing combine rescale": ("tl.sum(values * part_rescale[:, None], 0)", "tl.sum(values, 0)"),
    "a missing rescale of the sum": ("row_sum * rescale + tl.sum(weights, 1)", "row_sum + tl.sum(weights, 1)"),
    "a sum that is never written": (
        "* (2 * row_stride) + 1, row_sum, mask=rows < rows_left)",
        "* (2 * row_stride) + 1, row_sum, mask=rows < 0)",
    ),
    "a swapped offset": (
        "_rows_of_segments(history_offsets, history_lengths, request,",
        "_rows_of_segments(target_offsets, history_lengths, request,",
    ),
}
LIST_MUTANTS = {
    "a bias that is dropped": ("tl.load(segment_bias + segment) * _LOG2_E", "0.0 * n_segments"),
    "a bias of another segment": ("tl.load(segment_bias + segment)", "tl.load(segment_bias + last - 1)"),
    "a bias that the maximum forgets": ("(new_max - bias)[:, None]", "new_max[:, None]"),
    "a part that begins a block late": ("_within(begin - before, 0, blocks)", "_within(begin - before + 1, 0, blocks)"),
    "a list that ends early": ("while (segment < last) &", "while (segment < last - 1) &"),
}
BULK_MUTANTS = {
    "a tile's sums for another's": ("_fold(states[i],", "_fold(states[0],"),
    "a tile's query for another's": ("tl.dot(q[i], k.T)", "tl.dot(q[0], k.T)"),
    "a tile that is stored in another's place": ("row + i * BLOCK_M) * KEY_HEADS", "row) * KEY_HEADS"),
    "a wrong mask of the tail": ("0, length - token, 0.0", "0, length - token + 1, 0.0"),
    "a missing rescale of the parts": ("tl.sum(part_out * part_rescale[:, :, None], 0)", "tl.sum(part_out, 0)"),
    "a block that no part takes": ("tl.minimum(part, more)", "part"),
    "a tail that is left out": ("length // WHOLE * WHOLE", "length"),
    "sums that are never written": ("row_sum, rows_left - i * BLOCK_M, BLOCK_M)", "row_sum, 0, BLOCK_M)"),
}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as child:
        yield child


def test_the_table_is_large_and_has_no_case_twice() -> None:
    assert len(TABLE) >= 200
    assert len({case.name for case in TABLE}) == len(TABLE)
    assert {case.key_heads == 1 for case in INTERPRETED} == {True, False}
    assert {case.dtype for case in INTERPRETED} == {case.dtype for case in TABLE}
    assert max(sum(case.layout.segments) for case in INTERPRETED) == 10_000


@pytest.mark.parametrize("case", [case for case in TABLE if case.scores == "equal"], ids=lambda case: case.name)
def test_equal_scores_are_equal(case: Case) -> None:
    """What is to tie really does: the tokens of a request have one key, and so one score, but not one value."""
    x = inputs(case)
    offsets, ties = x.history_offsets.tolist(), 0
    for begin, length in zip(offsets, x.history_lengths.tolist(), strict=False):
        key, value = (y[begin : begin + length] for y in (x.key, x.value))
        assert (key == key[:1]).all()
        ties += length > 1 and bool((value != value[:1]).any())
    assert ties > 1


def test_tied_cases_have_one_tensor_and_kernels_that_load_it_once() -> None:
    cases = [case for case in TABLE if case.tied]
    assert {case.key_heads == 1 for case in cases} == {True, False}
    assert {case.dtype for case in cases} == {case.dtype for case in TABLE}
    for case in TABLE:
        x = inputs(case)
        if len(x.key):  # tensors without memory have no address to tell them apart by
            assert launch.shape_of(x.query, x.key, x.value, bool(x.segments())) == case.shape
        assert tiling.is_tied(case.shape, attention_forms.small_plan(case).tile) == case.tied
    assert any(case in INTERPRETED for case in cases)


@pytest.mark.parametrize(
    "form", [attention_forms.torch_cpu, attention_forms.onnx_runtime, attention_forms.onnx_reference]
)
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_operator(case: Case, form: Callable[[Case], Tensor]) -> None:
    check(case, form(case))


@pytest.mark.parametrize("case", [case for case in TABLE if case.layout.lists], ids=lambda case: case.name)
def test_the_table_tells_a_bias_that_is_dropped_or_another_segments(case: Case) -> None:
    x, listed = inputs(case), {len(read) for read, m in zip(case.layout.read, case.layout.targets, strict=True) if m}
    assert x.segment_bias is not None
    if max(listed) > 1 and sum(x.history_lengths):
        for wrong in (torch.zeros_like(x.segment_bias), x.segment_bias.roll(1)):
            out = torch_op.eager(*x.tensors(), signed_scale(case), x.segments()[0], wrong)
            with pytest.raises(AssertionError, match="exceeds"):
                check(case, out)


@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.name)
def test_kernels_in_the_interpreter(case: Case, interpreter: Interpreter) -> None:
    check(case, attention_forms.interpreted(case, interpreter))


@pytest.mark.parametrize("mutation", [*MUTANTS, *LIST_MUTANTS])
def test_the_table_catches(mutation: str, interpreter: Interpreter, tmp_path: Path) -> None:
    """A kernel that is wrong in one place fails a case that the right kernel passes."""
    right, wrong = (MUTANTS | LIST_MUTANTS)[mutation]
    assert KERNELS.read_text().count(right) == 1
    mutant = tmp_path / "mutant.py"
    mutant.write_text(KERNELS.read_text().replace(right, wrong))
    # Split, ragged, with an empty request and a padded one, or of several steps a part: every mutant shows there.
    layouts = ("pages", "neighbours") if mutation in LIST_MUTANTS else ("three",)
    if "rescale of the sum" in mutation:
        layouts = ("wide-block-less-1",)
    of_layout = [case for case in INTERPRETED if case.layout.name in layouts]
    cases = [case for case in of_layout if attention_forms.small_plan(case).parts > 1]
    for case in cases[:3]:
        check(case, attention_forms.interpreted(case, interpreter))
        try:
            check(case, attention_forms.interpreted(case, interpreter, mutant))
        except AssertionError:
            return
    pytest.fail(f"no case fails with {mutation}")


@pytest.mark.parametrize("case", BULK, ids=lambda case: case.name)
def test_kernels_in_bulk_in_the_interpreter(case: Case, interpreter: Interpreter) -> None:
    check(case, attention_forms.interpreted(case, interpreter, plan=attention_forms.bulk_plan(case)))


@pytest.mark.parametrize("mutation", BULK_MUTANTS)
def test_the_table_catches_in_bulk(mutation: str, interpreter: Interpreter, tmp_path: Path) -> None:
    right, wrong = BULK_MUTANTS[mutation]
    source = KERNELS.with_name("kernels_bulk.py").read_text()
    assert source.count(right) == 1
    mutant = tmp_path / "mutant.py"
    mutant.write_text(source.replace(right, wrong))
    check(STACKED, attention_forms.interpreted(STACKED, interpreter, plan=STACKED_PLAN))
    with pytest.raises(AssertionError):
        check(STACKED, attention_forms.interpreted(STACKED, interpreter, mutant, STACKED_PLAN))
