"""Small graphs for the rules that rewrite request graphs, and what the proof makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from stca.export.freeing import Freed, freed_and_proven
from stca.export.passes.rules import Rule, View
from stca.specs import OFFSETS, TensorSpec

SIZES = {"L": 500, "N_t": 300, "B": 1, "N_h": 500, OFFSETS: 2}


def view_of(body: str, inputs: Sequence[TensorSpec], weights: dict[str, Any], sizes: dict[str, int] = SIZES) -> View:
    """A graph of these inputs whose weights are random where only their shape is given."""
    kinds = {"float32": "float", "int64": "int64", "int32": "int32"}
    given = ", ".join(f"{kinds[s.dtype]}[{', '.join(map(str, s.shape))}] {s.name}" for s in inputs)
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g ({given}) => (float[N_t, M] scores) {{ {body} }}'
    )
    rng = np.random.default_rng(0)
    for name, of in weights.items():
        array = rng.standard_normal(of).astype(np.float32) if isinstance(of, tuple) else np.asarray(of)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model, full_check=True)
    return View(model, {s.name: str(s.scope) for s in inputs}, sizes)


def freed(view: View, inputs: Sequence[TensorSpec], rule: Rule) -> Freed:
    """The graph that a rule leaves, checked as ONNX."""
    found = freed_and_proven(view, inputs, lambda _: None, [rule])
    onnx.checker.check_model(found.model, full_check=True)
    return found


def same(before: onnx.ModelProto, after: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> None:
    """Both give the same scores of random inputs."""
    rng = np.random.default_rng(3)
    feeds = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    a, b = (ReferenceEvaluator(m).run(None, feeds)[0] for m in (before, after))
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * float(np.abs(a).max(initial=1)))
