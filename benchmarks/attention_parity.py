"""Numbers of `torch.ops.stca.target_history_attention` on the device at hand, against float64, for `attention.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stca.plugins import torch_op

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMS = ("projected", "absorbed")
# Targets of each request, and tokens of its history; segments hold a few more tokens, which are not to be used.
LAYOUTS = {
    "ragged": ((17, 0, 1, 5, 64), (777, 40, 0, 1, 129)),
    "one token": ((1,), (1,)),
    "no token": ((3,), (0,)),
    "block + 1": ((129,), (2049,)),
    "long beside empty": ((0, 3, 1, 2), (0, 10_000, 0, 0)),
    "300 targets, 10,000 tokens": ((300,), (10_000,)),
}
_MORE = 3


def parity(
    model_sizes: Sequence[tuple[int, int]], device: str, spent: Callable[[], bool], skip: int = 0
) -> Iterator[dict[str, Any]]:
    """Every layout, dtype, form and size: the largest error, and twice PyTorch's own in that dtype plus its rounding.

    Yields the same dictionary, one more check in it each time; `passed` covers the checks done.

    Args:
        model_sizes: width and heads of each model.
        device: "cuda" or "cpu".
        spent: whether the time is up; checks beyond it are counted as skipped.
        skip: how many checks to leave out at the start.
    """
    result: dict[str, Any] = {"passed": False, "skipped_for_time": 0, "checks": []}
    cases = itertools.product(LAYOUTS.items(), DTYPES, FORMS, model_sizes)
    for (name, layout), dtype, form, (width, heads) in itertools.islice(cases, skip, None):
        if spent():
            result["skipped_for_time"] += 1
            continue
        check = _check(layout, dtype, form, width, heads, device)
        case = f"{name}, {form} {width}/{heads}, {str(dtype).removeprefix('torch.')}"
        result["checks"].append({"case": case, **check})
        result["passed"] = all(done["passed"] for done in result["checks"])
        yield result
    yield result


def _check(
    layout: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype, form: str, width: int, heads: int, device: str
) -> dict[str, Any]:
    targets, lengths = layout
    generator = torch.Generator(device).manual_seed(sum(lengths) + width)
    key_heads, depth = (heads, width // heads) if form == "projected" else (1, width)

    def normal(rows: int, count: int) -> Tensor:
        return torch.randn(rows, count, depth, generator=generator, device=device).to(dtype)

    tokens = [length + _MORE for length in lengths]
    query, key = normal(sum(targets), heads), normal(sum(tokens), key_heads)
    value = key if form == "absorbed" else normal(sum(tokens), key_heads)
    target_ends, token_ends = ([0, *itertools.accumulate(x)] for x in (targets, tokens))
    ends = (target_ends, token_ends, lengths)
    for begin, length in zip(token_ends, lengths, strict=False):
        for x in (key, value):
            x[begin + length : begin + length + _MORE] = float("nan")
    offsets, history, used = (torch.tensor(x, dtype=torch.int32, device=device) for x in ends)
    scale = depth**-0.5
    truth = torch_op.eager(query.double(), key.double(), value.double(), offsets, history, used, scale)
    torchs = torch.zeros_like(truth)
    for b, (m, length) in enumerate(zip(targets, lengths, strict=True)):
        if m and length:
            rows, held = slice(target_ends[b], target_ends[b + 1]), slice(token_ends[b], token_ends[b] + length)
            torchs[rows] = _sdpa(query[rows], key[held], value[held], scale).double()
    ours = torch.ops.stca.target_history_attention(query, key, value, offsets, history, used, scale)
    error, theirs = (float((x.double() - truth).abs().max()) for x in (ours, torchs))
    allowed = 2 * theirs + torch.finfo(dtype).eps * float(truth.abs().max())
    return {"error": error, "allowed": allowed, "passed": error <= allowed}  # NaN never passes


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    q = torch_op.stack_heads(query, key.shape[1])[None]
    k, v = (x.transpose(0, 1)[None] for x in (key, value))
    return torch_op.unstack_heads(scaled_dot_product_attention(q, k, v, scale=scale)[0], len(query))
