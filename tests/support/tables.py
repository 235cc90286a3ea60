"""Models whose embedding tables leave the graphs, and bundles of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support.tiny import no_proof

from stca.bundle import Bundle
from stca.export.pipeline import CutOptions, split_onnx

ROWS, WIDTH = 5000, 16
SCOPES: dict[str, Any] = {"hist": "user", "item": "target"}


def table(rows: int = ROWS, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)


def model(
    ids: list[onnx.NodeProto] | None = None,
    weights: tuple[onnx.TensorProto, ...] = (),
    *,
    values: NDArray[Any] | None = None,
    kind: int = TensorProto.FLOAT,
    bag: bool = False,
) -> onnx.ModelProto:
    """Scores `relu(mean(rows of hist) · W) · row of item`, and a bias.

    Args:
        ids: makes `ids` of `hist`; None looks `hist` itself up.
        weights: that `ids` reads.
        values: of the table; None for random ones.
        kind: of the table's elements.
        bag: sum the history's rows, and not their mean.
    """
    rng = np.random.default_rng(1)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    constants = {
        "table": (table() if values is None else values).astype(dtype),
        "w": (rng.standard_normal((WIDTH, WIDTH)) / 4).astype(np.float32),
        "zero": np.array([0]),
        "one": np.array([1]),
    }
    node = helper.make_node
    wide = ("Cast", {"to": TensorProto.FLOAT}) if kind != TensorProto.FLOAT else ("Identity", {})
    nodes = [
        *(ids or [node("Identity", ["hist"], ["ids"], "same")]),
        node("Gather", ["table", "ids"], ["events_"], "events"),
        node("Gather", ["table", "item"], ["items_"], "items"),
        node(wide[0], ["events_"], ["events"], "events_wide", **wide[1]),
        node(wide[0], ["items_"], ["items"], "items_wide", **wide[1]),
        node("ReduceSum" if bag else "ReduceMean", ["events", "zero"], ["user_"], "pooled", keepdims=1),
        node("MatMul", ["user_", "w"], ["user__"], "encoded"),
        node("Relu", ["user__"], ["user"], "user_node"),
        node("Mul", ["user", "items"], ["products"], "products_node"),
        node("ReduceSum", ["products", "one"], ["scores"], "scores_node", keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("hist", TensorProto.INT64, ["N_h"]),
            helper.make_tensor_value_info("item", TensorProto.INT64, ["N_t"]),
        ],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N_t", 1])],
        [numpy_helper.from_array(x, n) for n, x in constants.items()] + list(weights),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def split(of: onnx.ModelProto, folder: Path, prove: Any = no_proof, above: int | None = 1 << 16, **cut: Any) -> Bundle:
    """A bundle of a model, whose file is written beside it."""
    onnx.save(of, folder / "model.onnx")
    options = CutOptions(tables_above=above, **cut)
    return split_onnx(folder / "model.onnx", SCOPES, folder / "bundle", prove=prove, cut=options)


def expected(of: onnx.ModelProto, hist: Any, item: Any) -> NDArray[Any]:
    """The scores by ONNX's reference implementation of the whole model."""
    from onnx.reference import ReferenceEvaluator

    scores: Any = ReferenceEvaluator(of).run(None, {"hist": np.asarray(hist), "item": np.asarray(item)})
    return np.asarray(scores[0])
