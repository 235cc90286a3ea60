"""`torch.ops.stca.target_history_attention`: one node to `torch.export`, differentiable, exact on a CPU.

On a CPU the values of offsets and lengths are checked. On a GPU that would wait for every launch before, so there the
caller vouches for them; the kernels touch nothing beyond the tensors even where the caller is wrong.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stca.plugins import tiling
from stca.plugins.spec import ARGUMENTS, PLAIN, QUALIFIED_NAME, check_offsets, check_shapes

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _requests(
    structure: Sequence[Tensor | None], n_targets: int, n_tokens: int
) -> list[tuple[slice, list[tuple[int, slice]]]]:
    """The rows of each request's targets, and the number and rows of each of its segments that has tokens; checked."""
    target_offsets, history_offsets, history_lengths, segment_offsets = structure
    assert target_offsets is not None
    assert history_offsets is not None
    if history_lengths is None:
        history_lengths = history_offsets[1:] - history_offsets[:-1]
    given = [target_offsets, history_offsets, history_lengths, *([] if segment_offsets is None else [segment_offsets])]
    together = torch.cat(given).tolist()  # one copy from a GPU, not three
    ends = [0, *itertools.accumulate(map(len, given))]
    targets, tokens, lengths, *segments = (together[i:j] for i, j in itertools.pairwise(ends))
    check_offsets(targets, tokens, lengths, n_targets, n_tokens, *segments)
    listed = segments[0] if segments else range(len(targets))
    rows = [slice(begin, begin + length) for begin, length in zip(tokens, lengths, strict=False)]
    return [
        (slice(t0, t1), [(s, rows[s]) for s in range(s0, s1) if lengths[s]])
        for (t0, t1), (s0, s1) in zip(itertools.pairwise(targets), itertools.pairwise(listed), strict=True)
    ]


def stack_heads(x: Tensor, key_heads: int) -> Tensor:
    """`(m, H, D)` to `(H_k, m * H / H_k, D)`: heads that share a key head become rows."""
    m, heads, depth = x.shape
    return x.reshape(m, key_heads, heads // key_heads, depth).transpose(0, 1).reshape(key_heads, -1, depth)


def unstack_heads(x: Tensor, m: int) -> Tensor:
    """The inverse of `stack_heads`."""
    key_heads, rows, depth = x.shape
    return x.reshape(key_heads, m, rows // m, depth).transpose(0, 1).reshape(m, -1, depth)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _weights(
    query: Tensor, key: Tensor, segments: list[tuple[int, slice]], segment_bias: Tensor | None, scale: float
) -> list[Tensor]:
    """The softmax over all of a request's segments, in one tensor `(H_k, rows, tokens)` for each of them.

    Args:
        query: `(H_k, rows, D)`, heads stacked, in the type to compute in.
        key: `(N_h, H_k, D)`; of its rows none is copied but to that type.
        segments: at least one.
        segment_bias: `(N_s,)` of that type.
        scale: of the logits.
    """
    query = query * scale
    logits = [query @ key[rows].to(query.dtype).permute(1, 2, 0) for _, rows in segments]
    if segment_bias is not None:
        logits = [x + segment_bias[s] for (s, _), x in zip(segments, logits, strict=True)]
    weights = torch.softmax(logits[0] if len(logits) == 1 else torch.cat(logits, dim=-1), dim=-1)
    return list(torch.split(weights, [x.shape[-1] for x in logits], dim=-1))


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target_offsets: Tensor,
    history_offsets: Tensor,
    history_lengths: Tensor | None,
    scale: float,
    segment_offsets: Tensor | None = None,
    segment_bias: Tensor | None = None,
) -> Tensor:
    """The operator in plain differentiable torch: a loop over requests, softmax in float32 (float64 stays float64).

    All heads of a request share one matrix product: with one key head the targets' heads stack up as rows, so the
    absorbed form is a single `(m · H, D) x (D, L)` product instead of `H` small ones. Segments are read where they lie.

    Args:
        query: `(N_t, H, D)` float32, float64, bfloat16 or float16.
        key: `(N_h, H_k, D)` of the same dtype; `H_k` is 1 (absorbed) or `H` (projected).
        value: `(N_h, H_k, D_v)` of the same dtype.
        target_offsets: `(B + 1,)` int32, from 0 to `N_t`, not decreasing.
        history_offsets: `(N_s + 1,)` int32, the last of them `N_h`; without `segment_offsets` from 0, not decreasing.
        history_lengths: `(N_s,)` int32 or None, tokens used from each segment's start; None for all up to the next.
        scale: factor on the logits.
        segment_offsets: `(B + 1,)` int32, from 0 to `N_s`, not decreasing: a request reads a list of segments in one
            softmax, which may lie anywhere and be read by others too. None: request `b` reads segment `b`.
        segment_bias: `(N_s,)` float32 (float64 with a float64 query), finite, added to the logits of a segment's
            tokens; None for none.

    Returns:
        `(N_t, H, D_v)` of the query's dtype; zeros where the history is empty.

    Raises:
        ValueError: when offsets or lengths do not describe the rows given.
    """
    compute = _compute_dtype(query)
    parts = []
    structure = (target_offsets, history_offsets, history_lengths, segment_offsets)
    for targets, segments in _requests(structure, len(query), len(key)):
        m = targets.stop - targets.start
        if m == 0 or not segments:
            parts.append(query.new_zeros(m, query.shape[1], value.shape[2]))
            continue
        weights = _weights(stack_heads(query[targets].to(compute), key.shape[1]), key, segments, segment_bias, scale)
        mixed = [w @ value[rows].to(compute).transpose(0, 1) for (_, rows), w in zip(segments, weights, strict=True)]
        parts.append(unstack_heads(functools.reduce(torch.add, mixed), m).to(query.dtype))
    return torch.cat(parts) if parts else query.new_zeros(0, query.shape[1], value.shape[2])


# `(Tensor query, …, float scale)`: what the op takes, and, after the output's gradient, what its backward takes.
_ARGUMENTS = torch.library.infer_schema(eager, mutates_args=()).removesuffix(" -> Tensor")


@torch.library.custom_op(
    "stca::target_history_attention", mutates_args=(), device_types="cpu", schema=f"{_ARGUMENTS} -> Tensor"
)
def target_history_attention(*arguments: Any) -> Tensor:
    """Attention of each target over its own request's history; arguments, result and errors are those of `eager`."""
    _check(*arguments)
    return eager(*arguments)


@target_history_attention.register_kernel("cuda")
def _cuda(*arguments: Any) -> Tensor:
    from stca.plugins import launch  # Triton is needed only here

    _check(*arguments)
    return launch.target_history_attention(*arguments)


@target_history_attention.register_fake
def _fake(*arguments: Any) -> Tensor:
    query, key, value, *_ = arguments
    _check(*arguments)
    if query.is_cuda:  # what has no kernel is refused while a model is compiled, not at its first request
        tiling.Shape(
            query.shape[1], key.shape[1], query.shape[2], value.shape[2], str(query.dtype).removeprefix("torch.")
        )
    out: Tensor = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    return out


def _check(*arguments: Any) -> None:
    """Shapes, dtypes and devices, which are known without a look at the values, also while a model is compiled."""
    tensors = _tensors(arguments)
    query = arguments[0]
    check_shapes(*(None if x is None else x.shape for x in tensors))  # type: ignore[arg-type]
    if query.dtype not in _DTYPES:
        raise ValueError(f"{QUALIFIED_NAME}: query is {query.dtype}, expected {', '.join(map(str, _DTYPES))}")
    expected = {"values": query.dtype, "structure": torch.int32, "logits": _compute_dtype(query)}
    for argument, x in zip(ARGUMENTS, tensors, strict=True):
        if x is not None and x.dtype != (dtype := expected[argument.kind]):
            raise ValueError(f"{QUALIFIED_NAME}: {argument.name} is {x.dtype}, expected {dtype}")
        if x is not None and x.device != query.device:
            raise ValueError(
                f"{QUALIFIED_NAME}: {argument.name} is on {x.device}, expected {query.device} as the query"
            )


def _tensors(arguments: tuple[Any, ...]) -> list[Any]:
    """Those of `ARGUMENTS` in their order; the op takes the scale before what may be left out, of which torch shows
    only what was given."""
    tensors = [*arguments[: len(PLAIN)], *arguments[len(PLAIN) + 1 :]]
    return tensors + [None] * (len(ARGUMENTS) - len(tensors))


@torch.library.custom_op(
    "stca::target_history_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS[1:]} -> (Tensor, Tensor, Tensor, Tensor)",
)
def _gradients(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (empty without one). The weights are computed anew, so that nothing of
    size targets x history is kept from forward to backward; an op of its own, so that compilers see no loop over
    requests here either."""
    query, key, value, *structure, segment_bias = _tensors(arguments)
    compute, scale = _compute_dtype(query), arguments[len(PLAIN)]
    # Rows that several requests may read are summed up in float32.
    wide = key.dtype if structure[-1] is None else compute
    d_query, d_key, d_value, d_bias = _like(torch.zeros_like, query, key.to(wide), value.to(wide), segment_bias)
    for targets, segments in _requests(structure, len(query), len(key)):
        m = targets.stop - targets.start
        if m == 0 or not segments:
            continue
        q, d_out = (stack_heads(x[targets].to(compute), key.shape[1]) for x in (query, grad))
        weights = _weights(q, key, segments, segment_bias, scale)
        rows = [rows for _, rows in segments]
        d_weights = [d_out @ value[r].to(compute).permute(1, 2, 0) for r in rows]
        mean = sum((w * d).sum(dim=-1, keepdim=True) for w, d in zip(weights, d_weights, strict=True))
        d_stacked = torch.zeros_like(q)
        for (s, r), w, d in zip(segments, weights, d_weights, strict=True):
            d_logits = w * (d - mean)
            d_stacked += d_logits @ key[r].to(compute).transpose(0, 1)
            d_key[r] += (scale * (d_logits.mT @ q)).transpose(0, 1).to(wide)
            d_value[r] += (w.mT @ d_out).transpose(0, 1).to(wide)
            if segment_bias is not None:
                d_bias[s] += d_logits.sum()
        d_query[targets] = unstack_heads(scale * d_stacked, m).to(query.dtype)
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_bias


def _like(make: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    given = (query, key, value, query.new_empty(0) if bias is None else bias)
    return tuple(make(x, memory_format=torch.contiguous_format) for x in given)


@_gradients.register_fake
def _gradients_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    query, key, value, *_, bias = _tensors(arguments)
    return _like(torch.empty_like, query, key, value, bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.scale = inputs[len(PLAIN)]
    ctx.save_for_backward(*_tensors(inputs))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *required, segment_offsets, segment_bias = ctx.saved_tensors
    gradients = _gradients(grad, *required, ctx.scale, segment_offsets, segment_bias)
    return (*gradients[:3], None, None, None, None, None, None if segment_bias is None else gradients[3])


target_history_attention.register_autograd(_backward, setup_context=_setup_context)
