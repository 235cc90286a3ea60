"""The float64 truth that every implementation of the operator is measured against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stca.plugins.spec import check_offsets, check_shapes


def target_history_attention(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    target_offsets: NDArray[np.integer[Any]],
    history_offsets: NDArray[np.integer[Any]],
    history_lengths: NDArray[np.integer[Any]] | None = None,
    segment_offsets: NDArray[np.integer[Any]] | None = None,
    segment_bias: NDArray[Any] | None = None,
    *,
    scale: float,
) -> NDArray[np.float64]:
    """Attention of each target over its own request's history, in float64, one request and one head at a time.

    `out[t, h] = Σ_l softmax_l(scale · query[t, h] · key[l, h_k] + segment_bias[s]) · value[l, h_k]` with `l` over the
    first `history_lengths[s]` tokens of every segment `s` of the request that holds `t` (arXiv 2511.06077; several
    segments and their bias as in arXiv 2604.23810; head `h_k` is 0 when there is one).

    Args:
        query: `(N_t, H, D)` any float dtype.
        key: `(N_h, H_k, D)`, `H_k` 1 or `H`.
        value: `(N_h, H_k, D_v)`.
        target_offsets: `(B + 1,)` integers, from 0 to `N_t`, not decreasing.
        history_offsets: `(N_s + 1,)` integers, the last is `N_h`; without `segment_offsets` from 0, not decreasing.
        history_lengths: `(N_s,)` integers, tokens used from each segment's start; all up to the next when omitted.
        segment_offsets: `(B + 1,)` integers, from 0 to `N_s`, not decreasing; request `b` has segment `b` when omitted.
        segment_bias: `(N_s,)` any float dtype, finite; none when omitted.
        scale: factor on the logits.

    Returns:
        `(N_t, H, D_v)` float64; zeros where the history is empty.

    Raises:
        ValueError: when shapes disagree, or offsets or lengths do not describe the rows given.
    """
    lengths = np.diff(history_offsets) if history_lengths is None else history_lengths
    tensors = (query, key, value, target_offsets, history_offsets, lengths, segment_offsets, segment_bias)
    check_shapes(*(None if x is None else x.shape for x in tensors))  # type: ignore[arg-type]
    listed = None if segment_offsets is None else segment_offsets.tolist()
    check_offsets(target_offsets.tolist(), history_offsets.tolist(), lengths.tolist(), len(query), len(key), listed)
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    bias = np.zeros(len(lengths)) if segment_bias is None else np.asarray(segment_bias, dtype=np.float64)
    heads = q.shape[1]
    out = np.zeros((q.shape[0], heads, v.shape[2]), dtype=np.float64)
    ends = range(len(target_offsets)) if listed is None else listed
    for b in range(len(target_offsets) - 1):
        targets = slice(int(target_offsets[b]), int(target_offsets[b + 1]))
        segments = np.arange(ends[b], ends[b + 1])
        tokens = np.concatenate([np.arange(lengths[s]) + history_offsets[s] for s in segments] or [[]]).astype(int)
        if len(tokens) == 0:
            continue
        for h in range(heads):
            h_k = h if k.shape[1] == heads else 0
            logits = scale * (q[targets, h] @ k[tokens, h_k].T) + np.repeat(bias[segments], lengths[segments])
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[targets, h] = (weights / weights.sum(axis=1, keepdims=True)) @ v[tokens, h_k]
    return out
