"""Whether the halves of a split, joined again, give what the whole graph gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from stca.arrays import Array
from stca.export.analysis.onnx_reference import reference_of
from stca.export.split import Split

Runner = Callable[[onnx.ModelProto, Mapping[str, Array]], Sequence[Array]]


def run_reference(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> Sequence[Array]:
    """Outputs of `model` in ONNX's reference implementation: slow, and the same operations in the same order."""
    return list(reference_of(model).run(None, dict(feeds)))


def run_joined(result: Split, feeds: Mapping[str, Array], run: Runner = run_reference) -> Sequence[Array]:
    """Outputs of the scorer fed with the encoder's state; `feeds` are those of the whole graph."""

    def inputs(half: onnx.ModelProto, values: Mapping[str, Array]) -> dict[str, Array]:
        return {value.name: values[value.name] for value in half.graph.input}

    state = run(result.user_encoder, inputs(result.user_encoder, feeds))
    named = {tensor.name: array for tensor, array in zip(result.state, state, strict=True)}
    return run(result.target_scorer, inputs(result.target_scorer, {**feeds, **named}))


def joined_equals_whole(
    model: onnx.ModelProto,
    result: Split,
    feeds: Mapping[str, Array],
    run: Runner = run_reference,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> bool:
    """Whether the joined halves give what `model` gives; bit for bit by default, NaN equal to NaN.

    Exactness can be asked of the reference implementation. A runtime that fuses each graph in its own way rounds
    differently, and needs a tolerance.
    """
    whole, joined = run(model, feeds), run_joined(result, feeds, run)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
        for a, b in zip(whole, joined, strict=True)
    )
