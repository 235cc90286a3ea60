"""An `Attention` node of opset 23 in the operators that it stands for, so that what reads those reads it too."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from stca.export.analysis.layout import Layout
from stca.export.analysis.scope import attribute, label
from stca.export.passes.nodes import NewNodes
from stca.export.passes.rules import Rewrite, View


def is_attention(node: onnx.NodeProto) -> bool:
    """Whether a node is ONNX's own `Attention`."""
    return node.op_type == "Attention" and not node.domain


def spelled(view: View, node: onnx.NodeProto) -> Rewrite:
    """MatMul, scale, mask, Softmax and MatMul in place of `node`; the last node makes its result.

    Raises:
        Layout: when it does more than that.
    """
    if attribute(node, "is_causal", 0) or attribute(node, "softcap", 0.0):
        raise Layout("its Attention node is causal or caps its logits")
    if any(node.input[4:]) or any(node.output[1:]):
        raise Layout("its Attention node takes or gives more than one attention does")
    query, key, value = node.input[:3]
    run, stem = view.tried[0], label(node)
    new, shape = NewNodes(view.taken), view.tried[0].shape(query)
    heads, key_heads = (attribute(node, f"{of}_num_heads", shape[1]) for of in ("q", "kv"))
    if len(shape) == 3:
        query, key, value = (
            new.node("Transpose", [_parted(new, name, n, stem)], f"{stem}_by_head", perm=[0, 2, 1, 3])
            for name, n in ((query, heads), (key, key_heads), (value, key_heads))
        )
    else:
        key_heads = run.shape(key)[1]
    if heads != key_heads:
        raise Layout(f"its Attention node has {heads} heads of queries and {key_heads} of keys")
    depth = shape[-1] if len(shape) == 4 else shape[-1] // heads
    kind = run.values[node.input[0]].dtype
    number = np.array(attribute(node, "scale", depth**-0.5), kind)
    scale = new.node("Constant", [], f"{stem}_scale", value=numpy_helper.from_array(number))
    turned = new.node("Transpose", [key], f"{stem}_turned", perm=[0, 1, 3, 2])
    logits = new.node("Mul", [new.node("MatMul", [query, turned], f"{stem}_product"), scale], f"{stem}_logits")
    if len(node.input) > 3 and node.input[3]:
        mask = node.input[3]
        if run.values[mask].dtype == np.bool_:
            lowest = numpy_helper.from_array(np.array(-np.inf, kind))
            never = new.node("Constant", [], f"{stem}_never", value=lowest)
            logits = new.node("Where", [mask, logits, never], f"{stem}_masked")
        else:
            logits = new.node("Add", [logits, mask], f"{stem}_masked")
    weights = new.node("Softmax", [logits], f"{stem}_weights", axis=-1)
    if len(node.input) > 3 and node.input[3]:  # a history that is masked whole gives zeros, says ONNX
        none = new.node("IsNaN", [weights], f"{stem}_none")
        zero = new.node("Constant", [], f"{stem}_zero", value=numpy_helper.from_array(np.array(0, kind)))
        weights = new.node("Where", [none, zero, weights], f"{stem}_weights")
    if len(shape) == 4:
        new.node("MatMul", [weights, value], node.output[0], exact=True)
    else:
        mixed = new.node("MatMul", [weights, value], f"{stem}_mixed")
        mixed = new.node("Transpose", [mixed], f"{stem}_mixed", perm=[0, 2, 1, 3])
        new.node("Reshape", [mixed, new.integers([0, 0, -1])], node.output[0], exact=True)
    return Rewrite(new.nodes, new.weights)


def _parted(new: NewNodes, name: str, heads: int, stem: str) -> str:
    return new.node("Reshape", [name, new.integers([0, 0, heads, -1])], f"{stem}_parted")
