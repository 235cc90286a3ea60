"""ONNX's reference implementation, with the operators mended that it gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from stca.arrays import Array
from stca.errors import SplitError, said


class GatherElements(OpRun):
    """ONNX's own takes at most 64 elements along an axis, and an index beyond the last for another one."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, axis: int | None = None) -> tuple[Array]:
        axis = (axis or 0) % data.ndim
        rows = tuple(slice(None) if i == axis else slice(n) for i, n in enumerate(indices.shape))
        return (np.take_along_axis(data[rows], indices, axis),)


def reference_of(model: onnx.ModelProto, new_ops: Sequence[type[OpRun]] = ()) -> Any:
    """A reference evaluator of `model`: slow, and the same operations in the same order.

    Args:
        model: with its weights inline.
        new_ops: more implementations to use in place of ONNX's.

    Raises:
        SplitError: when it has no implementation of a part of the model.
    """
    if any(function.overload for function in model.functions):  # ONNX's own takes one of a name for all of them
        model = onnx.inliner.inline_local_functions(model)
    try:
        return ReferenceEvaluator(model, new_ops=[GatherElements, *new_ops])
    except (NotImplementedError, RuntimeError) as e:
        raise SplitError(
            f"nothing can prove this model: ONNX's reference lacks a part of it ({said(e)}); "
            "export it with a newer opset_version, or express that part in other operators"
        ) from e
