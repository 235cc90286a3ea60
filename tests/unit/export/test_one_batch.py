"""One batch of users and targets under several names, or none."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser
from support import tiny

from stca.checks.verify import prove
from stca.export.one_batch import with_one_batch
from stca.export.pipeline import split_onnx
from stca.runtime import Request, Session
from stca.specs import TensorSpec


def graph(history: str, item: str, score: str, join: str) -> onnx.ModelProto:
    """The user's mean event beside the item, weighed; `join` puts the two together."""
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[{history}, 2] history, float[{item}, 2] item) => (float[{score}] score)
        <int64[1] last = {{-1}}, int64[1] axis = {{1}}, float[4] weights = {{1.0, 2.0, 3.0, 4.0}}> {{
            mean = ReduceMean <keepdims: int = 0> (history, axis)
            {join}
            weighed = Mul (both, weights)
            score = ReduceSum <keepdims: int = 0> (weighed, last)
        }}"""
    )
    onnx.checker.check_model(model, full_check=True)
    return model


CONCAT = "both = Concat <axis: int = 1> (mean, item)"
# At request level already: the one user's mean is repeated for the targets.
EXPANDED = """size = Shape (item)
            means = Expand (mean, size)
            both = Concat <axis: int = 1> (means, item)"""


@pytest.mark.parametrize(
    ("sizes", "said"), [(("b1, L", "b2", "b3"), "b1, b2"), (("4, L", "4", "4"), "4")], ids=["names", "baked"]
)
def test_one_batch_of_several_names_or_a_number_is_lifted(sizes, said, tmp_path):
    onnx.save(graph(*sizes, CONCAT), tmp_path / "m.onnx")
    steps: list[str] = []
    scopes = {"history": "user", "item": "target"}
    bundle = split_onnx(tmp_path / "m.onnx", scopes, tmp_path / "B", prove=prove, progress=steps.append)
    assert f"taking the first sizes of the inputs, {said}, for one batch" in steps
    assert bundle.manifest.split["lifted"]["rows"] == "batch"
    history, item = np.float32([[1, 2], [3, 4], [5, 9]]), np.float32([[i, 10 * i] for i in range(7)])
    with Session.load(bundle.path, threads=1) as session:
        scores = session.score(Request({"history": history, "item": item}))
    np.testing.assert_allclose(scores[:, 0], 3 + 2 * 5 + item @ np.float32([3, 4]), rtol=1e-6)


def test_a_batch_of_one_fixed_history_each_is_no_history_of_its_own(tmp_path):
    join = CONCAT.replace("(mean, item)", "(means, item)").replace(
        "both", "zero = Sub (item, item) means = Add (zero, mean) both"
    )
    onnx.save(graph("b1, 3", "b2", "b3", join), tmp_path / "m.onnx")
    bundle = split_onnx(tmp_path / "m.onnx", {"history": "user", "item": "target"}, tmp_path / "B", prove=prove)
    assert bundle.manifest.graphs["request"].inputs[0].shape == (1, 3, 2)


def test_a_model_of_several_requests_serves_one(tmp_path):
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]>
        g (float[batch, seq, 2] history, float[batch, cand, 2] item) => (float[batch, cand] score)
        <int64[1] axis = {1}> {
            mean = ReduceMean <keepdims: int = 1> (history, axis)
            crossed = Mul (mean, item) last = Constant <value_ints: ints = [2]> ()
            score = ReduceSum <keepdims: int = 0> (crossed, last)
        }"""
    )
    onnx.save(model, tmp_path / "m.onnx")
    bundle = split_onnx(tmp_path / "m.onnx", {"history": "user", "item": "target"}, tmp_path / "B", prove=prove)
    request = bundle.manifest.graphs["request"]
    assert [s.shape for s in (*request.inputs, *request.outputs)] == [(1, "N_h", 2), (1, "cand", 2), ("cand", 1)]
    history, item = np.float32([[1, 2], [3, 4]]), np.float32([[i, 10 * i] for i in range(7)])
    with Session.load(bundle.path, threads=1) as session:
        scores = session.score(Request({"history": history, "item": item}))
    np.testing.assert_allclose(scores[:, 0], item @ np.float32([2, 3]), rtol=1e-6)


@pytest.mark.parametrize(
    "batch",
    [
        "rows = Shape <start: int = 0, end: int = 1> (item)",
        """whole = Shape (item) none = Constant <value_int: int = 0> () row = Gather (whole, none)
           zero = Constant <value_ints: ints = [0]> () rows = Unsqueeze (row, zero)""",
    ],
    ids=["newer", "older"],
)
def test_a_batch_read_from_the_candidates_does_not_make_the_history_theirs(batch, tmp_path):
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[batch, seq, 2] history, float[batch, cand, 2] item) => (float[batch, cand] score)
        <int64[1] axis = {{1}}> {{
            {batch} rest = Constant <value_ints: ints = [-1, 2]> () shape = Concat <axis: int = 0> (rows, rest)
            viewed = Reshape (history, shape) raised = Exp (viewed)
            mean = ReduceMean <keepdims: int = 1> (raised, axis)
            crossed = Mul (mean, item) last = Constant <value_ints: ints = [2]> ()
            score = ReduceSum <keepdims: int = 0> (crossed, last)
        }}"""
    )
    onnx.save(model, tmp_path / "m.onnx")
    bundle = split_onnx(tmp_path / "m.onnx", {"history": "user", "item": "target"}, tmp_path / "B", prove=prove)
    assert [s.shape for s in bundle.manifest.state] == [(1, 1, 2)]


@pytest.mark.parametrize(
    ("sizes", "join"),
    [(("b1, L", "b2", "b2"), EXPANDED), (("1, L", "N_t", "N_t"), EXPANDED), (("b, L", "b", "b"), CONCAT)],
    ids=["request level", "one user", "one name"],
)
def test_what_is_clear_stays_as_it_is(sizes, join):
    model = graph(*sizes, join)
    before = model.SerializeToString(deterministic=True)

    def shape(text: str) -> tuple[int | str, ...]:
        return tuple(int(n) if n.isdigit() else n for n in text.split(", "))

    inputs = (
        TensorSpec("history", "float32", (*shape(sizes[0]), 2), "user"),
        TensorSpec("item", "float32", (*shape(sizes[1]), 2), "target"),
    )
    assert with_one_batch(model, inputs, tiny.no_proof) == inputs
    assert model.SerializeToString(deterministic=True) == before
