"""ONNX's own tests of its operators as models to split: as they stand, or as the user's or the target's part."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from cases import Case
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case import node as tests

TARGETS = 4


def names(files: Sequence[str] | None = None) -> list[str]:
    """The tests of these files, None for all of them, as `node/FILE/TEST`. Loading them all takes seconds."""
    every = [m.name for m in pkgutil.iter_modules(tests.__path__) if not m.ispkg]
    found: list[str] = []
    for file in every if files is None else files:
        known = len(tests._NodeTestCases)
        _load(file)
        found += [f"node/{file}/{t.name}" for t in tests._NodeTestCases[known:]]
    return found


def node_case(name: str) -> Case | None:
    """A test as a case, by its name; None for one that takes or gives something else than tensors."""
    _, file, which = name.split("/")
    _load(file)
    test = next(t for t in tests._NodeTestCases if t.name == which)
    if test.model is None or not test.data_sets:
        return None
    model = onnx.ModelProto()
    model.CopyFrom(test.model)
    model.ir_version = min(model.ir_version, 11)
    for domain in model.opset_import:  # most tests come with the next opset's, of which they need nothing
        domain.version = min(domain.version, 24)
    given = [_array(x) for x in test.data_sets[0][0]]
    feeds = {i.name: x for i, x in zip(model.graph.input, given, strict=False) if x is not None}
    if len(feeds) != len(model.graph.input) or not model.graph.output[0].type.HasField("tensor_type"):
        return None
    style = zlib.crc32(which.encode()) % 3
    if style == 0 and len(feeds) > 1:
        half = len(feeds) // 2
        scopes = {n: "user" if i < half else "target" for i, n in enumerate(feeds)}
        return Case(name, model, scopes, feeds, feeds)
    return _as_part(name, model, feeds, user=style < 2)


def _load(file: str) -> None:
    """A file's tests are made when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(f"{tests.__name__}.{file}")


def _as_part(name: str, model: onnx.ModelProto, feeds: dict[str, NDArray[Any]], user: bool) -> Case:
    """The mean of what the operator gives, times a number of each target; or the user's number times its mean."""
    graph, result = model.graph, model.graph.output[0].name
    other, rows = ("fuzz_target", "N_t") if user else ("fuzz_user", 1)
    scopes = {**dict.fromkeys(feeds, "user" if user else "target"), other: "target" if user else "user"}
    graph.input.append(helper.make_tensor_value_info(other, TensorProto.FLOAT, [rows]))
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "fuzz_flat"))
    graph.node.extend(
        [
            helper.make_node("Cast", [result], ["fuzz_cast"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["fuzz_cast", "fuzz_flat"], ["fuzz_row"]),
            helper.make_node("ReduceMean", ["fuzz_row"], ["fuzz_mean"], keepdims=0),
            helper.make_node("Tanh", ["fuzz_mean"], ["fuzz_small"]),
            helper.make_node("Mul", [other, "fuzz_small"], ["fuzz_score"]),
        ]
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("fuzz_score", TensorProto.FLOAT, [rows]))
    values = np.linspace(-1, 1, TARGETS if user else 1).astype(np.float32)
    return Case(name, model, scopes, {**feeds, other: values}, {**feeds, other: values})


def _array(value: Any) -> NDArray[Any] | None:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return value if isinstance(value, np.ndarray | np.generic) else None
