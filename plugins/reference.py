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
    *,
    scale: float,
) -> NDArray[np.float64]:
    """Attention of each target over its own request's history, in float64, one segment and one head at a time.

    `out[t, h] = Σ_l softmax_l(scale · query[t, h] · key[l, h_k]) · value[l, h_k]` with `l` over the first
    `history_lengths[b]` tokens of segment `b` that holds `t` (arXiv 2511.06077; head `h_k` is 0 when there is one).

    Args:
        query: `(N_t, H, D)` any float dtype.
        key: `(N_h, H_k, D)`, `H_k` 1 or `H`.
        value: `(N_h, H_k, D_v)`.
        target_offsets: `(B + 1,)` integers, from 0 to `N_t`, not decreasing.
        history_offsets: `(B + 1,)` integers, from 0 to `N_h`, not decreasing.
        history_lengths: `(B,)` integers, tokens used from each segment's start; all of them when omitted.
        scale: factor on the logits.

    Returns:
        `(N_t, H, D_v)` float64; zeros where the history is empty.

    Raises:
        ValueError: when shapes disagree, or offsets or lengths do not describe the rows given.
    """
    lengths = np.diff(history_offsets) if history_lengths is None else history_lengths
    check_shapes(query.shape, key.shape, value.shape, target_offsets.shape, history_offsets.shape, lengths.shape)
    check_offsets(target_offsets.tolist(), history_offsets.tolist(), lengths.tolist(), len(query), len(key))
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    heads = q.shape[1]
    out = np.zeros((q.shape[0], heads, v.shape[2]), dtype=np.float64)
    for b, length in enumerate(lengths):
        targets = slice(int(target_offsets[b]), int(target_offsets[b + 1]))
        tokens = slice(int(history_offsets[b]), int(history_offsets[b]) + int(length))
        if length == 0:
            continue
        for h in range(heads):
            h_k = h if k.shape[1] == heads else 0
            logits = scale * (q[targets, h] @ k[tokens, h_k].T)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[targets, h] = (weights / weights.sum(axis=1, keepdims=True)) @ v[tokens, h_k]
    return out
