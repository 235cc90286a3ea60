"""Offsets that contradict the tensors: refused where their values are known, harmless where they are not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stca.plugins import launch, torch_op  # noqa: F401  (torch_op registers the op)
from stca.plugins.interpret import KERNELS, Interpreter
from stca.plugins.reference import target_history_attention as reference
from stca.plugins.spec import ARGUMENTS
from stca.plugins.tiling import Plan, Shape, Sizes, Tile, check_sizes

Op = torch.ops.stca.target_history_attention
TARGETS, TOKENS, HEADS, DEPTH = 5, 40, 2, 16
LIMIT = 2**31 - 2**15

# What is wrong: target_offsets, history_offsets, history_lengths of a batch with TARGETS targets and TOKENS tokens, and
# what the message says.
WRONG = {
    "targets begin late": ([1, 5], [0, 40], [40], "target_offsets[0] is 1, expected 0"),
    "targets end early": ([0, 2, 4], [0, 40, 40], [40, 0], "target_offsets[2], the last, is 4, expected N_t = 5"),
    "targets end late": ([0, 3, 7], [0, 1, 40], [1, 39], "target_offsets[2], the last, is 7, expected N_t = 5"),
    "targets descend": (
        [0, 4, 2, 5],
        [0, 1, 2, 40],
        [1, 1, 38],
        "target_offsets[2] is 2, expected at least target_offsets[1] = 4",
    ),
    "targets below zero": (
        [0, -40, -40, 5],
        [0, 1, 2, 40],
        [1, 1, 38],
        "target_offsets[1] is -40, expected at least target_offsets[0] = 0",
    ),
    "tokens begin before the first": ([0, 5], [-3, 40], [43], "history_offsets[0] is -3, expected 0"),
    "tokens end late": ([0, 5], [0, 47], [47], "history_offsets[1], the last, is 47, expected N_h = 40"),
    "tokens descend": (
        [0, 2, 5],
        [0, 46, 40],
        [40, 3],
        "history_offsets[2] is 40, expected at least history_offsets[1] = 46",
    ),
    "a length beyond its segment": (
        [0, 2, 5],
        [0, 30, 40],
        [30, 19],
        "history_lengths[1] is 19, expected 0 to 10, the tokens of its segment",
    ),
    "a negative length": ([0, 5], [0, 40], [-16], "history_lengths[0] is -16, expected 0 to 40"),
    "anything": (
        [0, 2**31 - 1, -(2**31), 2**31 - 1, 5],
        [0, -(2**31), 2**31 - 1, 2**31 - 1, 40],
        [2**31 - 1, -(2**31), 2**31 - 1, 40],
        "target_offsets[2] is -2147483648, expected at least target_offsets[1] = 2147483647",
    ),
}


def rows(targets: int = TARGETS, tokens: int = TOKENS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, HEADS, DEPTH, generator=generator) for n in (targets, tokens, tokens)]


def int32(*values: list[int]) -> list[Tensor]:
    return [torch.tensor(x, dtype=torch.int32) for x in values]


@pytest.mark.parametrize("wrong", WRONG)
def test_the_torch_op_and_the_reference_name_the_entry(wrong: str) -> None:
    *structure, message = WRONG[wrong]
    pattern = rf"^stca::TargetHistoryAttention: {re.escape(message)}.*$"  # one line
    with pytest.raises(ValueError, match=pattern):
        Op(*rows(), *int32(*structure), 0.25)
    with pytest.raises(ValueError, match=pattern):
        reference(*(x.numpy() for x in rows()), *map(np.array, structure), scale=0.25)


# What is wrong: history_offsets, history_lengths, segment_offsets of two requests.
WRONG_LISTS = {
    "a list begins late": ([4, 0, 40], [1, 1], [1, 1, 2], "segment_offsets[0] is 1, expected 0"),
    "a list ends late": ([4, 0, 40], [1, 1], [0, 1, 4], "segment_offsets[2], the last, is 4, expected N_s = 2"),
    "a list begins below": ([4, 0, 40], [1, 1], [-5, 1, 2], "segment_offsets[0] is -5, expected 0"),
    "lists descend": (
        [4, 0, 40],
        [1, 1],
        [0, 3, 2],
        "segment_offsets[2] is 2, expected at least segment_offsets[1] = 3",
    ),
    "a segment below": ([-1, 0, 40], [1, 1], [0, 1, 2], "history_offsets[0] is -1, expected 0 to N_h = 40"),
    "a segment beyond": ([4, 41, 40], [1, 0], [0, 1, 2], "history_offsets[1] is 41, expected 0 to N_h = 40"),
    "a segment too long": ([4, 30, 40], [1, 11], [0, 1, 2], "history_lengths[1] is 11, expected 0 to 10, the tokens"),
    "a negative length": ([4, 30, 40], [-1, 1], [0, 1, 2], "history_lengths[0] is -1, expected 0 to 36"),
    "no end": ([4, 30, 39], [1, 1], [0, 1, 2], "history_offsets[2] is 39, expected N_h = 40"),
    "anything": (
        [2**31 - 1, -(2**31), 40],
        [2**31 - 1, 2**31 - 1],
        [-(2**31), 2**31 - 1, -5],
        "segment_offsets[0] is -2147483648, expected 0",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_LISTS)
def test_the_torch_op_and_the_reference_name_the_entry_of_a_list(wrong: str) -> None:
    *lists, message = WRONG_LISTS[wrong]
    pattern = rf"^stca::TargetHistoryAttention: {re.escape(message)}.*$"
    starts, lengths, ends = int32(*lists)
    with pytest.raises(ValueError, match=pattern):
        Op(*rows(), *int32([0, 2, 5]), starts, lengths, 0.25, ends)
    arrays = [x.numpy() for x in (*rows(), *int32([0, 2, 5]), starts, lengths, ends)]
    with pytest.raises(ValueError, match=pattern):
        reference(*arrays, scale=0.25)


def test_lengths_left_out_are_no_way_around() -> None:
    with pytest.raises(ValueError, match=r"history_offsets\[1\], the last, is 47, expected N_h = 40"):
        Op(*rows(), *int32([0, 5], [0, 47]), None, 0.25)


@pytest.mark.parametrize(
    ("targets", "tokens", "structure", "message"),
    [
        (3, 0, ([0], [0], []), "target_offsets has 1 entry, so no request, for 3 rows; expected none"),
        (0, 7, ([0], [0], []), "history_offsets has 1 entry, so no request, for 7 rows; expected none"),
        (0, 0, ([], [], []), "target_offsets has 0 entries; expected batch + 1, at least 1"),
        (0, 0, ([0], [], []), "history_offsets has 0 entries; expected batch + 1, at least 1"),
        (3, 7, ([0, 3], [0, 4, 7], [7]), "target_offsets has 2 entries, history_offsets 3; both need batch + 1"),
        (3, 7, ([0, 3], [0, 7], [7, 7]), "history_lengths has shape (2,), expected (1,)"),
    ],
)
def test_counts_are_checked_by_shape_alone(
    targets: int, tokens: int, structure: tuple[list[int], ...], message: str
) -> None:
    """So on a GPU too, and while a model is compiled: here on tensors without values."""
    meta = [x.to("meta") for x in (*rows(targets, tokens), *int32(*structure))]
    with pytest.raises(ValueError, match=re.escape(message)):
        Op(*meta, 0.25)


def test_no_request_is_no_row() -> None:
    assert Op(*rows(0, 0), *int32([0], [0], []), 0.25).shape == (0, HEADS, DEPTH)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(2**27, 1, 1), f"N_t \\* H is {2**31}, expected less than {LIMIT}; send smaller batches"),
        (Sizes(1, LIMIT, 1), f"N_h is {LIMIT}, expected less than {LIMIT}"),
        (Sizes(1, 1, 2**30), f"B is {2**30}, expected less than {2**30}"),
    ],
)
def test_sizes_beyond_int32_are_refused(sizes: Sizes, message: str) -> None:
    shape = Shape(16, 16, 16, 16, "bfloat16")
    with pytest.raises(ValueError, match=message):
        check_sizes(shape, sizes)
    check_sizes(shape, Sizes(LIMIT // 16 - 1, LIMIT - 1, 2**30 - 1))


def test_a_launch_beyond_int32_is_refused() -> None:
    query = torch.empty(1, 16, 16).expand(2**27, -1, -1)
    key = torch.empty(1, 16, 16)
    with pytest.raises(ValueError, match=r"N_t \* H is 2147483648, expected less than 2147450880"):
        launch.launches(query, key, key, *int32([0, 2**27], [0, 1], [1]), 0.25, PLAN, torch.empty(0))


# --- on a GPU nobody looks at the values: the kernels must stay within the tensors ------------------------------------

GUARD = 2048  # elements before and after each tensor; three times what the cases' small excesses reach
PLAN = Plan(Tile(16, 16, 16, 16, 4, 2), 1, 0.0)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as child:
        yield child


def guarded(x: Tensor, around: float) -> Tensor:
    """`x` in the middle of a larger block of memory that is full of `around`."""
    block = torch.full((x.numel() + 2 * GUARD,), around, dtype=x.dtype)
    inside = block[GUARD : GUARD + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside


def surroundings(x: Tensor) -> Tensor:
    block = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return torch.cat([block[:GUARD], block[GUARD + x.numel() :]])


def attend(
    tensors: list[Tensor], structure: list[Tensor], parts: int, interpreter: Interpreter, source: Path = KERNELS
) -> list[Tensor]:
    """`attend_kernel` alone, on tensors between NaN and offsets between plausible offsets; returns its outputs. The
    fourth of `structure` are the segments', whose bias is zeros between NaN."""
    floats = [guarded(x, float("nan")) for x in tensors]
    integers = [guarded(x, 3) for x in structure]
    bias = [guarded(torch.zeros(len(structure[2])), float("nan")) for _ in integers[3:]]
    given = (*floats, *integers[:3], 0.25, Plan(PLAN.tile, parts, 0.0), torch.empty_like(tensors[0]))
    (step, *_) = launch.launches(*given, *integers[3:], *bias, upcast=True)
    first = len(ARGUMENTS) + 4
    outputs = [guarded(torch.zeros_like(x), 7.0) for x in step.arguments[first:] if isinstance(x, Tensor)]
    interpreter.launch("attend_kernel", step.grid, [*step.arguments[:first], *outputs], step.constants, source)
    return outputs


def stays_inside(outputs: list[Tensor]) -> bool:
    """Nothing around the inputs was read, nothing around the outputs written."""
    return all(x.isfinite().all() for x in outputs) and all((surroundings(x) == 7.0).all() for x in outputs)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("wrong", WRONG)
def test_the_kernel_touches_only_the_tensors(wrong: str, parts: int, interpreter: Interpreter) -> None:
    *structure, _ = WRONG[wrong]
    assert stays_inside(attend(rows(), int32(*structure), parts, interpreter))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("wrong", WRONG_LISTS)
def test_the_kernel_touches_only_the_tensors_whatever_a_list_says(
    wrong: str, parts: int, interpreter: Interpreter
) -> None:
    *lists, _ = WRONG_LISTS[wrong]
    assert stays_inside(attend(rows(), int32([0, 2, 5], *lists), parts, interpreter))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("wrong", WRONG)
def test_the_kernels_in_bulk_touch_only_the_tensors(wrong: str, parts: int, interpreter: Interpreter) -> None:
    *structure, _ = WRONG[wrong]
    inputs = [guarded(x.half(), float("nan")) for x in rows()] + [guarded(x, 3) for x in int32(*structure)]
    plan = Plan(Tile(16, 16, 16, 16, 4, 2, bulk=True), parts, 0.0)
    out = guarded(torch.zeros(TARGETS, HEADS, DEPTH, dtype=torch.float16), 7.0)
    attend, finish = launch.launches(*inputs, 0.25, plan, out, upcast=True)
    partial = [guarded(torch.zeros_like(x), 7.0) for x in attend.arguments[-2:] if isinstance(x, Tensor)]
    for step, arguments in (
        (attend, [*attend.arguments[:-2], *partial]),
        (finish, [*finish.arguments[:6], *partial, *finish.arguments[8:]]),
    ):
        source = KERNELS.with_name("kernels_bulk.py")
        interpreter.launch(step.kernel, step.grid, arguments, step.constants, source)
    assert stays_inside([*partial, out])


NO_REQUEST = "    if n_requests == 0:  # then there are no offsets to read\n        return\n"


@pytest.mark.parametrize("looks", [True, False])
def test_the_kernel_reads_no_offsets_where_there_is_no_request(
    looks: bool, interpreter: Interpreter, tmp_path: Path
) -> None:
    """Where its offsets end lie some that would do, and a kernel that does not look first finds work there."""
    assert KERNELS.read_text().count(NO_REQUEST) == 1
    source = tmp_path / "kernels.py"
    source.write_text(KERNELS.read_text().replace(NO_REQUEST, NO_REQUEST if looks else ""))
    targets = 40  # more than a tile of rows, or the grid alone says that there is nothing to do
    tensors = rows(targets)
    right = int32([0, targets], [0, TOKENS], [TOKENS])
    step = launch.launches(*tensors, *right, 0.25, PLAN, torch.empty_like(tensors[0]), upcast=True)[0]
    out = guarded(torch.zeros_like(tensors[0]), 7.0)
    arguments = [*tensors, *right, None, None, targets, TOKENS, 0, None, out]
    interpreter.launch("attend_kernel", step.grid, arguments, step.constants, source)
    assert bool((out == 0).all()) == looks


@pytest.mark.parametrize(
    ("wrong", "bounded", "free"),
    [
        (
            "targets end late",
            "_within(tl.load(target_offsets + request + 1, mask=held, other=0), first_target, n_targets)",
            "tl.load(target_offsets + request + 1, mask=held, other=0)",
        ),
        (
            "targets below zero",
            "_within(tile_of_request, 0, tl.cdiv(n_rows, BLOCK_M))",
            "tile_of_request",
        ),
        (
            "tokens begin before the first",
            "_within(tl.load(history_offsets + segment, mask=listed, other=0), 0, n_tokens)",
            "tl.load(history_offsets + segment, mask=listed, other=0)",
        ),
        (
            "tokens end late",
            "_within(length, 0, n_tokens - first_token)",
            "length",
        ),
        (
            "a list ends late",
            "_within(tl.load(segment_offsets + request + 1), segment, n_segments)",
            "tl.load(segment_offsets + request + 1)",
        ),
        (
            "a list begins below",
            "_within(tl.load(segment_offsets + request), 0, n_segments)",
            "tl.load(segment_offsets + request)",
        ),
    ],
)
def test_the_check_notices_a_missing_bound(
    wrong: str, bounded: str, free: str, interpreter: Interpreter, tmp_path: Path
) -> None:
    text = KERNELS.read_text()
    assert text.count(bounded) == 1
    mutant = tmp_path / "mutant.py"
    mutant.write_text(text.replace(bounded, free))
    *structure, _ = WRONG.get(wrong) or ([0, 2, 5], *WRONG_LISTS[wrong])
    assert not stays_inside(attend(rows(), int32(*structure), 1, interpreter, mutant))
