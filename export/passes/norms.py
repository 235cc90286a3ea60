"""A batch normalization in evaluation mode as `x factor + shift`, one number of each for a column."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from stca.export.analysis.scope import Scope, attribute
from stca.export.passes.nodes import NewNodes
from stca.export.passes.rules import View


def is_evaluated(view: View, node: onnx.NodeProto | None) -> bool:
    """Whether a node normalizes by constants, as a batch normalization does in evaluation mode."""
    if node is None or node.domain or node.op_type != "BatchNormalization" or len(node.output) > 1:
        return False
    return not attribute(node, "training_mode", 0) and all(view.scopes[n] == Scope.CONSTANT for n in node.input[1:])


def factor_and_shift(view: View, new: NewNodes, norm: onnx.NodeProto, stem: str) -> tuple[str, str]:
    """`scale / sqrt(variance + epsilon)` and `bias - mean factor`, `[C]` each; initializers stay the model's own."""
    _, scale, bias, mean, variance = norm.input
    kind = onnx.helper.tensor_dtype_to_np_dtype(view.sizes.element_type(variance))
    small = numpy_helper.from_array(np.array(attribute(norm, "epsilon", 1e-5), kind))
    epsilon = new.node("Constant", [], f"{stem}_epsilon", value=small)
    deviation = new.node("Sqrt", [new.node("Add", [variance, epsilon], f"{stem}_variance")], f"{stem}_deviation")
    factor = new.node("Div", [scale, deviation], f"{stem}_factor")
    return factor, new.node("Sub", [bias, new.node("Mul", [mean, factor], f"{stem}_mean")], f"{stem}_shift")
