"""What a model is asked is asked of its own tables, not of what stands in their place while its graph is worked on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from support.errors import one_line
from support.tiny import no_proof

from stca.bundle import Bundle
from stca.errors import RequestError
from stca.export.pipeline import CutOptions, split_onnx
from stca.export.tables import APART
from stca.runtime import Request, Session

WIDTH = 512
BY_PLACE = "size = Shape<start=0, end=1>(hist) n = Squeeze(size) places = Range(zero, n, one)"
MODEL = """<ir_version: 9, opset_import: ["": 18]> g (int64[N_h] hist, int64[N_t] item) => (float[N_t, 1] scores) {
  %s
  ids = %s
  events = Gather(items, ids)
  p = Gather(positions, places)
  both = Add(events, p)
  pooled = ReduceMean<keepdims=1>(both, axis)
  user = Relu(pooled)
  rows = Gather(items, item)
  products = Mul(user, rows)
  scores = ReduceSum<keepdims=1>(products, last)
}"""


def split(folder: Path, rows: int, positions: int, ids: str, places: str = BY_PLACE, **cut: Any) -> Bundle:
    """A bundle of a model with a table of items and one of positions."""
    model = parser.parse_model(MODEL % (places, ids))
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "items": rng.standard_normal((rows, WIDTH)).astype(np.float32),
        "positions": rng.standard_normal((positions, WIDTH)).astype(np.float32),
        "zero": np.int64(0), "one": np.int64(1), "axis": np.int64([0]), "last": np.int64([1]),
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(x), n) for n, x in weights.items())
    onnx.save(model, folder / "m.onnx")
    scopes: Any = {"hist": "user", "item": "target"}
    return split_onnx(folder / "m.onnx", scopes, folder / "bundle", prove=no_proof, cut=CutOptions(**cut))


@pytest.mark.parametrize("above", [None, 1 << 16])
def test_a_large_table_of_positions_ends_a_history(tmp_path: Path, above: int | None) -> None:
    bundle = split(tmp_path, 600, rows := 520, "Identity(hist)", tables_above=above)
    assert rows * WIDTH * 4 > APART
    assert bundle.manifest.max_history == rows
    session = Session.load(bundle.path)
    assert session.score(Request({"hist": [1] * rows, "item": [3]})).shape == (1, 1)
    with one_line(RequestError, str(rows)):
        session.score(Request({"hist": [1] * (rows + 1), "item": [3]}))


def test_positions_that_a_mask_makes_end_a_history_too(tmp_path: Path) -> None:
    """Their rows are looked up by what inputs say: the table is kept apart, and asked all the same."""
    counted = (
        "real = GreaterOrEqual(hist, zero) ones = Cast<to=7>(real) count = CumSum(ones, zero) places = Sub(count, one)"
    )
    bundle = split(tmp_path, 600, rows := 520, "Identity(hist)", counted)
    assert bundle.manifest.max_history == rows


def test_ids_of_a_large_table_have_the_range_that_only_asking_tells(tmp_path: Path) -> None:
    bundle = split(tmp_path, rows := 1100, 520, "Abs(hist)")
    assert [s.limit for s in bundle.manifest.graphs["request"].inputs] == [rows, rows]
