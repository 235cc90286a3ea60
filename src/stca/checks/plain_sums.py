"""How much a sound implementation may lose: the request graph in its own precision, every sum taken term after term.

Libraries add in orders of their own, in blocks and lanes, and lose less than this or about as much. So where a stage
is further off than PyTorch's own error allows, what the plain order loses on the same requests says whether the model
sums so much that this is rounding, or whether a number is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx.reference.op_run import OpRun

from stca.arrays import Array
from stca.export.analysis.onnx_reference import reference_of
from stca.export.passes.to_double import to_double
from stca.runtime.engine import scores_of


def plain_error(request_graph: Path, feeds: Sequence[Mapping[str, Array]]) -> float:
    """The largest absolute error of a float32 request graph's scores with its sums in order, against itself in float64.

    A graph that computes something else than the model thus excuses nothing by it.

    Args:
        request_graph: the ONNX file, its weights beside it.
        feeds: its inputs, for each request or batch.

    Returns:
        0 where ONNX's reference cannot run the graph, or not to finite scores: nothing is excused then.
    """
    graph = onnx.inliner.inline_local_functions(onnx.load(request_graph))
    plain = reference_of(graph, [MatMul, Gemm, Einsum, ReduceSum, ReduceMean, DFT])
    worst = 0.0
    try:
        exact = reference_of(to_double(graph))
        for feed in feeds:
            wide = {n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in feed.items()}
            x, y = (scores_of(e.run(None, f)) for e, f in ((plain, dict(feed)), (exact, wide)))
            worst = max(worst, float(np.abs(x - y).max(initial=0.0)))
    except Exception:  # numpy's and the reference's own are many
        return 0.0
    return worst if np.isfinite(worst) else 0.0


def product(a: Array, b: Array) -> Array:
    """`a @ b`, its sums in order."""
    left, right = (a[None] if a.ndim == 1 else a), (b[:, None] if b.ndim == 1 else b)
    shape = (*np.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1])
    out = np.zeros(shape, np.result_type(a, b))
    for k in range(left.shape[-1]):
        out += left[..., :, k, None] * right[..., k, None, :]
    out = out[..., 0] if b.ndim == 1 else out
    return out[..., 0, :] if a.ndim == 1 and b.ndim > 1 else out[..., 0] if a.ndim == 1 else out


def total(x: Array, axes: Any, keepdims: int) -> Array:
    """The sum of `x` over `axes` (None for all), in order."""
    over = tuple(range(x.ndim)) if axes is None else tuple(int(n) % x.ndim for n in np.ravel(axes))
    kept = [n for n in range(x.ndim) if n not in over]
    rows = np.transpose(x, (*over, *kept)).reshape((-1, *(x.shape[n] for n in kept)))
    out = np.zeros(rows.shape[1:], x.dtype)
    for row in rows:
        out = out + row
    return out.reshape([1 if n in over else x.shape[n] for n in range(x.ndim)]) if keepdims else out


class MatMul(OpRun):
    def _run(self, a: Array, b: Array) -> tuple[Array]:
        return (product(a, b),)


class Gemm(OpRun):
    def _run(
        self,
        a: Array,
        b: Array,
        c: Array | None = None,
        alpha: float = 1,
        beta: float = 1,
        transA: int = 0,
        transB: int = 0,
    ) -> tuple[Array]:
        y = product(a.T if transA else a, b.T if transB else b) * a.dtype.type(alpha)
        return (y if c is None else y + c * c.dtype.type(beta),)


class Einsum(OpRun):
    def _run(self, *terms: Array, equation: str) -> tuple[Array]:
        return (np.einsum(equation.replace(" ", ""), *terms, optimize=False),)


class ReduceSum(OpRun):
    def _run(self, x: Array, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> tuple[Array]:
        none = axes is None or not np.size(axes)
        return (x if none and noop_with_empty_axes else total(x, None if none else axes, keepdims),)


class ReduceMean(OpRun):
    def _run(self, x: Array, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> tuple[Array]:
        none = axes is None or not np.size(axes)
        if none and noop_with_empty_axes:
            return (x,)
        summed = total(x, None if none else axes, keepdims)
        return (summed / x.dtype.type(max(x.size, 1) / max(summed.size, 1)),)


def spectrum(x: Array, length: int, axis: int, inverse: bool, onesided: bool) -> Array:
    """The Fourier transform of `x`, as ONNX's `DFT` lays out real and imaginary parts, its sums in order."""
    values = np.moveaxis(x[..., 0] + 1j * (x[..., 1] if x.shape[-1] > 1 else 0), axis, -1)[..., :length]
    if inverse and onesided:  # the half stands for its mirror image, too
        ends = (np.arange(values.shape[-1]) * 2) % length == 0
        values = np.where(ends, values.real, 2 * values)
    columns = length // 2 + 1 if onesided and not inverse else length
    places = np.arange(values.shape[-1])[:, None] * np.arange(columns) % length
    waves = np.exp((2j if inverse else -2j) * np.pi * places / length) / (length if inverse else 1)
    out = np.moveaxis(product(values, waves.astype(values.dtype)), -1, axis)
    parts = [out.real] if inverse and onesided else [out.real, out.imag]
    return np.stack(parts, -1).astype(x.dtype)


class DFT(OpRun):
    def _run(
        self, x: Array, dft_length: Any = None, axis: Any = None, inverse: int = 0, onesided: int = 0
    ) -> tuple[Array]:
        where = -2 if axis is None else int(np.ravel(axis)[0])  # an attribute before opset 20, with a default there
        where %= x.ndim
        whole = 2 * (x.shape[where] - 1) if inverse and onesided else x.shape[where]
        length = whole if dft_length is None else int(np.ravel(dft_length)[0])
        return (spectrum(x, length, where, bool(inverse), bool(onesided)),)
