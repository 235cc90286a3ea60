"""A lifted bundle from end to end: served, checked and measured as what it is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from support.errors import one_line

from stca import commands as cli
from stca.bundle import Bundle
from stca.checks.bench import bench
from stca.checks.verify import prove, verify
from stca.errors import RequestError, SplitError
from stca.export.freeing import RULES
from stca.export.pipeline import CutOptions, split_onnx
from stca.runtime import OnnxRuntimeEngine, Request, RequestBatch, Session

SCOPES = {"hist": "user", "item": "target"}
BODY = """
    h = Gather(items, hist) t = Gather(items, item) u = ReduceMean<keepdims=0>(h, i1) c = Concat<axis=1>(u, t)
    x = MatMul(c, w) y = Tanh(x)
"""


def write(file, tail="score = Identity(y)", history="6", body=BODY):
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g (int64[B, {history}] hist, int64[B] item) => (float[B, 1] score) '
        f"{{ {body} {tail} }}"
    )
    rng = np.random.default_rng(0)
    given = {
        "items": rng.standard_normal((500, 8)).astype(np.float32),
        "w": rng.standard_normal((16, 1)).astype(np.float32),
        "i1": np.array([1]),
    }
    model.graph.initializer.extend(numpy_helper.from_array(x, n) for n, x in given.items())
    onnx.save(model, file)
    return file


@pytest.fixture(scope="module")
def lifted(tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("lifted")
    return split_onnx(write(folder / "m.onnx"), SCOPES, folder / "bundle", prove=prove)


@pytest.fixture(scope="module")
def as_it_stands(tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("pointwise")
    file = write(folder / "m.onnx")
    return split_onnx(file, SCOPES, folder / "bundle", prove=prove, cut=CutOptions(lift=False))


def request(seed: int, targets: int, users: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"hist": rng.integers(0, 500, (users, 6)), "item": rng.integers(0, 500, targets)}


def test_one_history_serves_many_targets_from_a_miss_and_from_a_hit(lifted):
    session, given = Session.load(lifted.path), request(0, 300)
    copies = {"hist": given["hist"].repeat(300, 0), "item": given["item"]}
    wanted = OnnxRuntimeEngine(lifted.file("pointwise")).run(copies)["score"]
    for _ in ("miss", "hit"):
        assert np.allclose(session.score(Request(given, "u", 1)), wanted, atol=1e-6)


# The target joins the ids of the history, before anything is made of the user alone.
JOINED = """
    one = Unsqueeze(item, i1) ids = Concat<axis=1>(hist, one) rows = Gather(items, ids)
    c = ReduceMean<keepdims=0>(rows, i1) wide = Concat<axis=1>(c, c) x = MatMul(wide, w) y = Tanh(x)
"""


def test_a_history_that_meets_the_target_at_once_is_shared_as_it_came(tmp_path):
    bundle = split_onnx(write(tmp_path / "m.onnx", body=JOINED), SCOPES, tmp_path / "bundle", prove=prove)
    assert [(t.shape, t.input) for t in bundle.manifest.state] == [((1, 6), "hist")]
    given = request(0, 30)
    copies = {"hist": given["hist"].repeat(30, 0), "item": given["item"]}
    wanted = OnnxRuntimeEngine(bundle.file("pointwise")).run(copies)["score"]
    with Session.load(bundle.path) as session:
        for sent in (given, {"item": given["item"]}):
            np.testing.assert_allclose(session.score(Request(sent, "u", 1)), wanted, atol=1e-6)
    with one_line(SplitError, "cache: 'ids' (Concat) reads 'hist' together with 'one'; encode the history"):
        split_onnx(tmp_path / "m.onnx", SCOPES, tmp_path / "b", prove=prove, cut=CutOptions(lift=False))


def test_users_of_a_batch_are_stacked(lifted):
    session, given = Session.load(lifted.path), [request(i, n) for i, n in enumerate((3, 1, 5))]
    alone = [session.score(Request(g)) for g in given]
    batch = {n: np.concatenate([g[n] for g in given]) for n in SCOPES}
    found = session.score(RequestBatch({**batch, "target_offsets": [0, 3, 4, 9]}, users=["a", "b", "c"]))
    assert np.array_equal(found, np.concatenate(alone))
    assert session.stats().users == 3
    with one_line(RequestError, "hist: has 3 rows, expected 2 for 2 requests"):
        session.score(RequestBatch({**batch, "target_offsets": [0, 3, 9]}))
    with one_line(RequestError, "item: has 9 rows, expected 8"):
        session.score(RequestBatch({**batch, "target_offsets": [0, 3, 4, 8]}))
    with one_line(RequestError, "target_offsets: is missing"):
        session.score(RequestBatch(batch))


def test_a_batch_axis_that_stays_is_compared_between_user_and_targets(as_it_stands):
    session = Session.load(as_it_stands.path)
    assert len(session.score(Request(request(0, 4, users=4), "u", 1))) == 4
    hit, miss = Request({"item": request(0, 3)["item"]}, "u", 1), Request(request(1, 3, users=4))
    for given in (hit, miss):
        with one_line(RequestError, "item: has shape [3], with B = 3; the user's inputs had 4"):
            session.score(given)


def test_checks_run_the_targets_they_are_told(as_it_stands, lifted):
    for bundle in (as_it_stands, lifted):
        asked = []
        verify(bundle, probes=(((1, 7),), ((1, 2),)), progress=lambda _: None)
        report = bench(bundle, [512, 2048], [40], seconds=0.01, progress=asked.append)
        assert {r.history for r in report.rows} == {6}, "a fixed history is measured once, as what it is"
        assert any("fixed length" in str(step) for step in asked)
    assert report.cached == lifted.manifest.cached
    assert {r.measured_targets for r in report.rows if r.stage == "pointwise"} == {40}, "one batch of copies"


def test_weights_of_the_pointwise_graph_exist_once(lifted):
    assert {f.name for f in lifted.path.glob("*.safetensors")} == {"weights.safetensors"}
    assert lifted.file("pointwise").stat().st_size < 2000


def test_a_target_that_sees_the_others_fails_the_proof(tmp_path):
    tail = "mean = ReduceMean<keepdims=1>(y, zero) score = Sub(y, mean)"
    file = write(tmp_path / "m.onnx", tail)
    model = onnx.load(file)
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "zero"))
    onnx.save(model, file)
    with one_line(SplitError, "node 'mean' (ReduceMean)", "--no-lift"):
        split_onnx(file, SCOPES, tmp_path / "bundle", prove=prove)
    assert not (tmp_path / "bundle").exists()


def test_inspect_says_why(lifted, capsys):
    assert cli.main(["inspect", str(lifted.path), "--why"]) == 0
    told = capsys.readouterr().out
    assert "scope user; one row for all targets (B → 1)" in told
    assert "expanded to the targets, for c (Concat)" in told


def test_inspect_says_what_each_rule_did_and_what_all_of_them_gained(tmp_path, capsys):
    """What a hit would take without rules is what it takes when none is tried."""
    body = f"{BODY.replace('y = Tanh(x)', 'y = Tanh(x) i = Identity(i1)')} z = ReduceSum(y, i)"
    model = onnx.load(write(tmp_path / "m.onnx", "score = Identity(z)", body=body))
    rows = numpy_helper.from_array(np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32), "w")
    next(t for t in model.graph.initializer if t.name == "w").CopyFrom(rows)
    onnx.save(model, tmp_path / "m.onnx")
    free, plain = (
        split_onnx(tmp_path / "m.onnx", SCOPES, tmp_path / f"{on}", prove=prove, cut=CutOptions(free=on)).manifest.split
        for on in (True, False)
    )
    hit, without = (r["recomputed_work"] + r["request_work"] + r["target_work"] for r in (free, plain))
    assert free["hit_work_without_rules"] == without > hit
    assert "hit_work_without_rules" not in plain
    gain = f"rules took a hit's work from {without / 1e9:.3g} to {hit / 1e9:.3g} GFLOP"
    assert gain in free["notes"]
    assert cli.main(["inspect", str(tmp_path / "True"), "--why"]) == 0
    told = capsys.readouterr().out
    assert gain in told
    assert "sum of products: rewritten\n      x\n" in told
    assert "nothing in the graph looks like what these rewrite\n      spectrum as a product," in told
    fired = {v["rule"] for v in free["rules"]}
    assert {rule.name for rule in RULES} == fired | {*free["rules_without_a_place"]}
    assert not fired & {*free["rules_without_a_place"]}


def test_every_node_has_one_reason(lifted):
    report = lifted.manifest.split
    for half, names in (("user_encoder", report["encoder_nodes"]), ("target_scorer", report["scorer_nodes"])):
        told = [node for r in report["reasons"] if r["half"] == half for node in r["nodes"]]
        assert sorted(told) == sorted(n for n in names if not n.startswith("state_"))  # these only rename
    meets = [r for r in report["reasons"] if "; it meets " in r["why"]]
    assert meets
    assert all((r["scope"], *r["inputs"]) == ("target", "hist", "item") for r in meets)


def test_counts_that_are_never_all_zero_are_no_obstacle(tmp_path):
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]> g (int64[B, 9] a, int64[B, 9] b, float[B] item)
        => (float[B] score) {
            both = Add(a, b) count = Cast<to=1>(both) rate = Reciprocal(count) one = Constant<value_ints=[1]>()
            mean = ReduceMean<keepdims=0>(rate, one) score = Mul(mean, item)
        }"""
    )
    onnx.save(model, tmp_path / "m.onnx")
    scopes = {"a": "user", "b": "user", "item": "target"}
    assert split_onnx(tmp_path / "m.onnx", scopes, tmp_path / "bundle", prove=prove).manifest.parity["passed"]


@pytest.mark.parametrize("least", [9, 100])
def test_a_model_that_picks_more_events_than_a_small_history_has(tmp_path, least):
    """A history of free length whose `least` best events count: no request of fewer is tried, or taken."""
    body = f"""
        k = Constant<value_ints: ints = [{least}]>() width = Constant<value_ints: ints = [2]>()
        h = Gather(items, hist) t = Gather(items, item) sum = ReduceSum<keepdims=0>(h, width)
        top, at = TopK<axis=1>(sum, k) mean = ReduceMean<keepdims=1>(top, i1) x = Mul(mean, t)
        y = ReduceSum<keepdims=1>(x, i1)
    """
    bundle = split_onnx(write(tmp_path / "m.onnx", history="L", body=body), SCOPES, tmp_path / "bundle", prove=prove)
    assert bundle.manifest.min_history == least
    assert bundle.manifest.split["lifted"]["rows"] == "B"
    with pytest.raises(RequestError, match=f"needs at least {least}"):
        Session.load(bundle.path).score(Request({"hist": [1] * (least - 1), "item": [1, 2]}))
    assert Session.load(bundle.path).score(Request({"hist": [1] * least, "item": [1, 2]})).shape == (2, 1)


def test_a_user_input_that_no_score_depends_on(tmp_path):
    body = "t = Gather(items, item) y = ReduceSum<keepdims=1>(t, i1)"
    with one_line(SplitError, "no score depends on a user input", "hist", "scopes"):
        split_onnx(write(tmp_path / "m.onnx", body=body), SCOPES, tmp_path / "bundle", prove=prove)


def test_a_score_that_is_squeezed_of_every_axis_has_a_row_for_a_single_target(tmp_path):
    body = BODY.replace("y = Tanh(x)", "y = Squeeze(x) z = Neg(y)")
    file = write(tmp_path / "m.onnx", "score = Identity(z)", body=body)
    model = onnx.load(file)
    del model.graph.output[0].type.tensor_type.shape.dim[1]
    onnx.save(model, file)
    session = Session.load(split_onnx(file, SCOPES, tmp_path / "bundle", prove=prove).path)
    for targets in (1, 5):
        assert len(session.score(Request(request(3, targets)))) == targets


def test_ids_beyond_a_table_are_the_inputs_fault(tmp_path):
    """Of an id that is computed, as a hash, no range is known; one that is said too large is named."""
    body = BODY.replace("h = Gather(items, hist)", "far = Max(hist, many) h = Gather(items, far)")
    file = write(tmp_path / "m.onnx", body=body)
    model = onnx.load(file)
    model.graph.initializer.append(numpy_helper.from_array(np.int64(700), "many"))
    onnx.save(model, file)
    with pytest.raises(SplitError, match=r"ids that its table lacks: say its limit \(TensorSpec, --ids\)$"):
        split_onnx(file, SCOPES, tmp_path / "bundle", prove=prove)


@pytest.mark.parametrize("history", ["6", "L"])
def test_a_history_that_is_masked_whole_is_refused_at_the_door(tmp_path, history, capsys):
    """A softmax over nothing but -inf is no number; an empty history and one of padding alone are the same."""
    body = """
        none = Constant<value: tensor = int64[1] {0}>() low = Constant<value: tensor = float[1] {-inf}>()
        width = Constant<value_ints: ints = [2]>() out = Constant<value_ints: ints = [1]>()
        h = Gather(items, hist) t = Gather(items, item) logits = ReduceSum<keepdims=0>(h, width)
        pad = Equal(hist, none) masked = Where(pad, low, logits) p = Softmax<axis=1>(masked)
        weight = Unsqueeze(p, width) weighted = Mul(weight, h) user = ReduceSum<keepdims=0>(weighted, out)
        x = Mul(user, t) y = ReduceSum<keepdims=1>(x, i1)
    """
    bundle = split_onnx(write(tmp_path / "m.onnx", history=history, body=body), SCOPES, tmp_path / "b", prove=prove)
    assert bundle.manifest.min_history == 1
    session = Session.load(bundle.path)
    with pytest.raises(RequestError, match="hist: has 0 events, the model needs at least 1"):
        session.score(Request({"hist": [], "item": [1, 2]}))
    with pytest.raises(RequestError, match="hist: holds nothing but 0, for which the model has no finite score"):
        session.score(Request({"hist": [0] * 6, "item": [1, 2]}))
    assert np.isfinite(session.score(Request({"hist": [0] * 5 + [3], "item": [1, 2]}))).all()
    assert cli.main(["inspect", str(bundle.path)]) == 0
    told = capsys.readouterr().out
    assert ("history: at most 6 events, at least 1" in told) == (history == "6")
    assert "user, ids below 500, not all 0" in told
    sizes = "N_t 300, the history's 6 events" if history == "6" else "N_h 10,000, N_t 300"
    assert f"of the work of a request of {sizes}\n" in told
