"""`torch.ops.stca.target_history_attention`: one node to `torch.export`, differentiable, exact on a CPU.

On a CPU the values of offsets and lengths are checked. On a GPU that would wait for every launch before, so there the
caller vouches for them; the kernels touch nothing beyond the tensors even where the caller is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stca.plugins import tiling
from stca.plugins.spec import QUALIFIED_NAME, STRUCTURE, check_offsets, check_shapes

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _segments(
    target_offsets: Tensor, history_offsets: Tensor, history_lengths: Tensor | None, n_targets: int, n_tokens: int
) -> list[tuple[int, int, int, int]]:
    """Rows `(first target, last target, first token, last token)`, one per request, on the host, checked."""
    if history_lengths is None:
        history_lengths = history_offsets[1:] - history_offsets[:-1]
    n = len(target_offsets)
    values = torch.cat([target_offsets, history_offsets, history_lengths]).tolist()  # one copy from a GPU, not three
    targets, tokens, lengths = values[:n], values[n : 2 * n], values[2 * n :]
    check_offsets(targets, tokens, lengths, n_targets, n_tokens)
    return [(targets[b], targets[b + 1], tokens[b], tokens[b] + length) for b, length in enumerate(lengths)]


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


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target_offsets: Tensor,
    history_offsets: Tensor,
    history_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """The operator in plain differentiable torch: a loop over requests, softmax in float32 (float64 stays float64).

    All heads of a request share one matrix product: with one key head the targets' heads stack up as rows, so the
    absorbed form is a single `(m · H, D) x (D, L)` product instead of `H` small ones.

    Args:
        query: `(N_t, H, D)` float32, float64, bfloat16 or float16.
        key: `(N_h, H_k, D)` of the same dtype; `H_k` is 1 (absorbed) or `H` (projected).
        value: `(N_h, H_k, D_v)` of the same dtype.
        target_offsets: `(B + 1,)` int32, from 0 to `N_t`, not decreasing.
        history_offsets: `(B + 1,)` int32, from 0 to `N_h`, not decreasing.
        history_lengths: `(B,)` int32 or None, tokens used from each segment's start, at most the segment's.
        scale: factor on the logits.

    Returns:
        `(N_t, H, D_v)` of the query's dtype; zeros where the history is empty.

    Raises:
        ValueError: when offsets or lengths do not describe the rows given.
    """
    compute = _compute_dtype(query)
    parts = []
    for t0, t1, l0, l1 in _segments(target_offsets, history_offsets, history_lengths, len(query), len(key)):
        m = t1 - t0
        if m == 0 or l1 == l0:
            parts.append(query.new_zeros(m, query.shape[1], value.shape[2]))
            continue
        q = stack_heads(query[t0:t1].to(compute), key.shape[1])
        k, v = (x[l0:l1].to(compute).transpose(0, 1) for x in (key, value))
        out = torch.softmax((q * scale) @ k.mT, dim=-1) @ v
        parts.append(unstack_heads(out, m).to(query.dtype))
    return torch.cat(parts) if parts else query.new_zeros(0, query.shape[1], value.shape[2])


# `(Tensor query, …, float scale)`: what the op takes, and, after the output's gradient, what its backward takes.
_ARGUMENTS = torch.library.infer_schema(eager, mutates_args=()).removesuffix(" -> Tensor")


@torch.library.custom_op(
    "stca::target_history_attention", mutates_args=(), device_types="cpu", schema=f"{_ARGUMENTS} -> Tensor"
)
def target_history_attention(*arguments: Any) -> Tensor:
    """Attention of each target over its own request's history; arguments, result and errors are those of `eager`."""
    _check(*arguments[:-1])
    return eager(*arguments)


@target_history_attention.register_kernel("cuda")
def _cuda(*arguments: Any) -> Tensor:
    from stca.plugins import launch  # Triton is needed only here

    _check(*arguments[:-1])
    return launch.target_history_attention(*arguments)


@target_history_attention.register_fake
def _fake(*arguments: Any) -> Tensor:
    query, key, value, *_ = arguments
    _check(*arguments[:-1])
    if query.is_cuda:  # what has no kernel is refused while a model is compiled, not at its first request
        tiling.Shape(
            query.shape[1], key.shape[1], query.shape[2], value.shape[2], str(query.dtype).removeprefix("torch.")
        )
    out: Tensor = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, *structure: Tensor | None) -> None:
    """Shapes, dtypes and devices, which are known without a look at the values, also while a model is compiled."""
    check_shapes(*(None if x is None else x.shape for x in (query, key, value, *structure)))  # type: ignore[arg-type]
    if query.dtype not in _DTYPES:
        raise ValueError(f"{QUALIFIED_NAME}: query is {query.dtype}, expected {', '.join(map(str, _DTYPES))}")
    expected = {"key": query.dtype, "value": query.dtype} | dict.fromkeys(STRUCTURE, torch.int32)
    for (name, dtype), x in zip(expected.items(), (key, value, *structure), strict=True):
        if x is not None and x.dtype != dtype:
            raise ValueError(f"{QUALIFIED_NAME}: {name} is {x.dtype}, expected {dtype}")
        if x is not None and x.device != query.device:
            raise ValueError(f"{QUALIFIED_NAME}: {name} is on {x.device}, expected {query.device} as the query")


@torch.library.custom_op(
    "stca::target_history_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS[1:]} -> (Tensor, Tensor, Tensor)",
)
def _gradients(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. The weights are computed anew, so that nothing of size targets x history is
    kept from forward to backward; an op of its own, so that compilers see no loop over requests here either."""
    query, key, value, target_offsets, history_offsets, history_lengths, scale = arguments
    compute = _compute_dtype(query)
    d_query, d_key, d_value = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    for t0, t1, l0, l1 in _segments(target_offsets, history_offsets, history_lengths, len(query), len(key)):
        m = t1 - t0
        if m == 0 or l1 == l0:
            continue
        q, d_out = (stack_heads(x[t0:t1].to(compute), key.shape[1]) for x in (query, grad))
        k, v = (x[l0:l1].to(compute).transpose(0, 1) for x in (key, value))
        weights = torch.softmax((q * scale) @ k.mT, dim=-1)
        d_weights = d_out @ v.mT
        d_logits = weights * (d_weights - (weights * d_weights).sum(dim=-1, keepdim=True)) * scale
        d_query[t0:t1] = unstack_heads(d_logits @ k, m)
        d_key[l0:l1] = (d_logits.mT @ q).transpose(0, 1)
        d_value[l0:l1] = (weights.mT @ d_out).transpose(0, 1)
    return d_query, d_key, d_value


@_gradients.register_fake
def _gradients_fake(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(grad, *ctx.saved_tensors, ctx.scale), None, None, None, None)


target_history_attention.register_autograd(_backward, setup_context=_setup_context)
