"""`torch.ops.stca.target_history_attention`: one node to `torch.export`, differentiable, exact on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stca.plugins.spec import check_shapes

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _segments(target_offsets: Tensor, history_offsets: Tensor, history_lengths: Tensor | None) -> list[list[int]]:
    """Rows `(first target, last target, first token, last token)`, one per request, on the host."""
    if history_lengths is None:
        history_lengths = history_offsets[1:] - history_offsets[:-1]
    rows = torch.stack(
        [target_offsets[:-1], target_offsets[1:], history_offsets[:-1], history_offsets[:-1] + history_lengths], dim=1
    )
    segments: list[list[int]] = rows.tolist()
    return segments


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
    """
    heads, key_heads = query.shape[1], key.shape[1]
    group = heads // key_heads
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    parts = []
    for t0, t1, l0, l1 in _segments(target_offsets, history_offsets, history_lengths):
        m = t1 - t0
        if m == 0 or l1 == l0:
            parts.append(query.new_zeros(m, heads, value.shape[2]))
            continue
        q = query[t0:t1].to(compute).reshape(m, key_heads, group, -1).transpose(0, 1).reshape(key_heads, m * group, -1)
        k = key[l0:l1].to(compute).permute(1, 2, 0)
        v = value[l0:l1].to(compute).transpose(0, 1)
        o = torch.softmax((q * scale) @ k, dim=-1) @ v
        parts.append(o.reshape(key_heads, m, group, -1).transpose(0, 1).reshape(m, heads, -1).to(query.dtype))
    return torch.cat(parts) if parts else query.new_zeros(0, heads, value.shape[2])


@torch.library.custom_op("stca::target_history_attention", mutates_args=(), device_types="cpu")
def target_history_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target_offsets: Tensor,
    history_offsets: Tensor,
    history_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of each target over its own request's history.

    Args:
        query: `(N_t, H, D)` float32, float64, bfloat16 or float16.
        key: `(N_h, H_k, D)` of the same dtype; `H_k` is 1 (absorbed) or `H` (projected).
        value: `(N_h, H_k, D_v)` of the same dtype.
        target_offsets: `(B + 1,)` int32.
        history_offsets: `(B + 1,)` int32.
        history_lengths: `(B,)` int32 or None, tokens used from each segment's start.
        scale: factor on the logits.

    Returns:
        `(N_t, H, D_v)` of the query's dtype; zeros where the history is empty. Softmax and sums are float32, or float64
        for float64 inputs.
    """
    _check(query, key, value, target_offsets, history_offsets, history_lengths)
    return eager(query, key, value, target_offsets, history_offsets, history_lengths, scale)


@target_history_attention.register_kernel("cuda")
def _cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target_offsets: Tensor,
    history_offsets: Tensor,
    history_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    from stca.plugins import launch  # Triton is needed only here

    _check(query, key, value, target_offsets, history_offsets, history_lengths)
    return launch.target_history_attention(query, key, value, target_offsets, history_offsets, history_lengths, scale)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target_offsets: Tensor,
    history_offsets: Tensor,
    history_lengths: Tensor | None,
) -> None:
    check_shapes(
        query.shape,
        key.shape,
        value.shape,
        target_offsets.shape,
        history_offsets.shape,
        None if history_lengths is None else history_lengths.shape,
    )
    if query.dtype not in _DTYPES:
        raise ValueError(f"query is {query.dtype}; supported are {', '.join(map(str, _DTYPES))}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    for name, x in (("target_offsets", target_offsets), ("history_offsets", history_offsets)):
        if x.dtype != torch.int32:
            raise ValueError(f"{name} is {x.dtype}; expected torch.int32")
    if history_lengths is not None and history_lengths.dtype != torch.int32:
        raise ValueError(f"history_lengths is {history_lengths.dtype}; expected torch.int32")


@target_history_attention.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target_offsets: Tensor,
    history_offsets: Tensor,
    history_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Recompute, then differentiate: nothing of size targets x history is kept between forward and backward."""
    query, key, value, target_offsets, history_offsets, history_lengths = ctx.saved_tensors
    with torch.enable_grad():
        leaves = (query.detach().requires_grad_(), key.detach().requires_grad_(), value.detach().requires_grad_())
        out = eager(*leaves, target_offsets, history_offsets, history_lengths, ctx.scale)
        # Empty requests leave no path from some leaf to the output; their gradient is zero.
        grads = torch.autograd.grad(out, leaves, grad, allow_unused=True) if out.requires_grad else (None,) * 3
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return (*filled, None, None, None, None)


target_history_attention.register_autograd(_backward, setup_context=_setup_context)
