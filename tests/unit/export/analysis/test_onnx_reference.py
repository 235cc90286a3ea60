"""What ONNX's reference implementation gets wrong, and ours does not."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from stca.export.analysis.onnx_reference import reference_of


@pytest.mark.parametrize("axis", [0, 1, -1, 2])
def test_elements_are_gathered_along_any_axis_however_long(axis):
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[70, 80, 90] x, int64[a, b, c] at) => (float[a, b, c] y) {{
            y = GatherElements <axis: int = {axis}> (x, at)
        }}"""
    )
    onnx.checker.check_model(model, full_check=True)
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.standard_normal((70, 80, 90)).astype(np.float32),
        "at": rng.integers(-70, 70, (3, 4, 5)),
    }
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(reference_of(model).run(None, feeds)[0], session.run(None, feeds)[0])
    feeds["at"][0, 0, 0] = 90
    with pytest.raises(IndexError):
        reference_of(model).run(None, feeds)
