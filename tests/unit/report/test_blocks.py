"""Blocks from dataflow: the reference model, other people's graphs, random ones; and a picture without overlaps."""

from __future__ import annotations

import re
import tempfile
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import numpy_helper, parser
from support import tiny
from support.graphs import cases

from stca.bundle import Bundle
from stca.errors import StcaError
from stca.export.pipeline import CutOptions, split_onnx
from stca.report.blocks import Condensed, condense
from stca.report.picture import block_picture

SVG = "{http://www.w3.org/2000/svg}"

# Two layers as people write them: heads as an axis of their own, a mask, residual connections, no operator, no names.
_LAYER = """
    f{i} = MatMul (h, up{i})
    g{i} = Relu (f{i})
    e{i} = MatMul (g{i}, down{i})
    k{i}a = MatMul (e{i}, key{i})
    k{i}b = Reshape (k{i}a, heads)
    k{i} = Transpose <perm: ints = [1, 2, 0]> (k{i}b)
    v{i}a = MatMul (e{i}, value{i})
    v{i}b = Reshape (v{i}a, heads)
    v{i} = Transpose <perm: ints = [1, 0, 2]> (v{i}b)
    q{i}a = MatMul ({x}, query{i})
    q{i}b = Reshape (q{i}a, heads)
    q{i} = Transpose <perm: ints = [1, 0, 2]> (q{i}b)
    l{i} = MatMul (q{i}, k{i})
    s{i} = Mul (l{i}, factor)
    m{i} = Where (mask, s{i}, never)
    p{i} = Softmax <axis: int = -1> (m{i})
    o{i}a = MatMul (p{i}, v{i})
    o{i}b = Transpose <perm: ints = [1, 0, 2]> (o{i}a)
    o{i}c = Reshape (o{i}b, rows)
    o{i} = MatMul (o{i}c, out{i})
    x{i} = Add ({x}, o{i})
"""
_FOREIGN = (
    """<ir_version: 10, opset_import: ["": 18]>
    ranker (int64[N_h] clicks, bool[N_h] valid, float[1, 8] profile, int64[N_t] candidates) => (float[N_t, 1] score) {
    h = Gather <axis: int = 0> (table, clicks)
    t = Gather <axis: int = 0> (table, candidates)
    mask = Unsqueeze (valid, first)
    u = MatMul (profile, mix)"""
    + _LAYER.format(i=0, x="t")
    + _LAYER.format(i=1, x="x0")
    + """
    y = Add (x1, u)
    z = MatMul (y, last)
    score = Sigmoid (z)
    }"""
)
_POOLED = """<ir_version: 10, opset_import: ["": 18]>
    pooled (int64[N_h] clicks, float[1, 32] page, int64[N_t] candidates) => (float[N_t, 1] score) {
    h = Gather <axis: int = 0> (table, clicks)
    e = MatMul (h, up0)
    u = ReduceSum <keepdims: int = 1> (e, first)
    t = Gather <axis: int = 0> (table, candidates)
    g = MatMul (page, key0)
    a = Mul (t, u)
    b = Add (a, g)
    score = MatMul (b, last)
    }"""


def _split(text: str, out: Path, **scopes: str) -> Bundle:
    model = parser.parse_model(text)
    shapes = {"table": (50, 32), "mix": (8, 32), "last": (32, 1)}
    for i in (0, 1):
        shapes |= {f"{n}{i}": (32, 32) for n in ("up", "down", "key", "value", "query", "out")}
    values = {n: np.full(s, 0.1, np.float32) for n, s in shapes.items()}
    values |= {"factor": np.float32(0.3), "never": np.float32(-1e9), "first": np.array([0])}
    values |= {"heads": np.array([0, 4, 8]), "rows": np.array([-1, 32])}
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in values.items() if n in read)
    onnx.save(model, out / "model.onnx")
    cut = CutOptions(free=False)  # attention stays as it is spelled
    return split_onnx(out / "model.onnx", scopes, out / "bundle", prove=tiny.no_proof, cut=cut)  # type: ignore[arg-type]


def _keys(graph: Condensed) -> set[tuple[str, int | str]]:
    return {b.key for b in graph.blocks}


def _work(bundle: Bundle) -> int:
    split = bundle.manifest.split
    return split["user_work"] + split["request_work"] + split["target_work"]


@pytest.mark.parametrize("form", ["projected", "absorbed"])
def test_reference_model(exported, form):
    bundle = Bundle.load(exported("log", form))
    graph = condense(bundle)
    shared = {("tokens", 0), ("target", 0), ("per_request", 0), ("head", 0)}
    assert _keys(graph) == shared | {(kind, row) for kind in ("encode", "attention", "query") for row in (1, 2)}
    assert graph.flops == _work(bundle)
    assert (
        graph.side_flops("target")
        == _work(bundle) - bundle.manifest.split["user_work"] + bundle.manifest.split["recomputed_work"]
    )
    for s, spec in zip(graph.state, bundle.manifest.state, strict=True):
        layer = re.match(r"attention_(\d)", spec.name)
        assert s.row == (int(layer[1]) + 1 if layer else None)
        assert s.bytes_per_token == spec.bytes_per_token
    assert sum(s.bytes for s in graph.state) == bundle.manifest.split["state_bytes"]
    chain = [("in", "user"), ("tokens", 0), ("encode", 2), *[("state", s.name) for s in graph.state if s.row == 2][:1]]
    chain += [("attention", 2), ("head", 0), ("out", "")]
    assert set(pairwise(chain)) <= graph.edges
    assert (("attention", 1), ("query", 2)) in graph.edges
    assert (("attention", 2), ("query", 2)) not in graph.edges
    for b in graph.blocks:
        if b.kind == "attention":  # the projection of its output is a part of it, whatever shape arithmetic is between
            assert (b.operators["TargetHistoryAttention"], b.operators["MatMul"]) == (1, 1)


def test_history_that_depends_on_the_request(exported):
    bundle = Bundle.load(exported("delta", "projected"))
    graph = condense(bundle)
    assert {("request_tokens", 0), ("request_encode", 1), ("request_encode", 2)} <= _keys(graph)
    assert not any(b.kind == "encode" for b in graph.blocks)
    heavy = sum(b.flops for b in graph.blocks if b.kind.startswith("request_"))
    assert heavy == pytest.approx(bundle.manifest.split["request_work"], rel=0.01)


@pytest.mark.parametrize("mask", ["user", "target"])
def test_attention_in_standard_operators(tmp_path, mask):
    """A mask of the history alone crosses the cut and serves both layers; one of the targets is theirs."""
    shape = {"user": "bool[N_h]", "target": "bool[N_t, N_h]"}[mask]
    text = _FOREIGN.replace("bool[N_h]", shape)
    graph = condense(_split(text, tmp_path, clicks="user", valid=mask, profile="user", candidates="target"))
    by_key = {b.key: b for b in graph.blocks}
    for row in (1, 2):
        assert by_key["attention", row].operators["Softmax"] == 1
        assert by_key["attention", row].operators["MatMul"] == 3  # logits, mix, and the projection of the output
        assert by_key["encode", row].operators["MatMul"] == 4
        assert by_key["query", row].operators["MatMul"] == 1
    rows = {"k0": 1, "v0": 1, "k1": 2, "v1": 2, "state_profile": None}
    assert {s.name: s.row for s in graph.state} == rows | ({"mask": 0} if mask == "user" else {})
    _check_picture(graph)


def test_no_attention_at_all(tmp_path):
    bundle = _split(_POOLED, tmp_path, clicks="user", page="request", candidates="target")
    graph = condense(bundle)
    assert _keys(graph) == {("tokens", 0), ("per_request", 0), ("target", 0), ("head", 0)}
    assert graph.rows == ()
    _check_picture(graph)


def test_many_layers_are_folded(tmp_path):
    text = _FOREIGN.split("y = Add")[0]
    layers = [_LAYER.format(i=i, x=f"x{i - 1}") for i in range(2, 9)]
    layers = [re.sub(r"\b(up|down|key|value|query|out)\d", r"\g<1>1", layer) for layer in layers]
    text += "".join(layers) + "y = Add (x8, u)\n z = MatMul (y, last)\n score = Sigmoid (z)\n }"
    graph = condense(_split(text, tmp_path, clicks="user", valid="user", profile="user", candidates="target"))
    assert graph.rows == ((1, 1), (2, 2), (3, 8), (9, 9))
    assert graph.row_name(3) == "layers 3–8"
    by_key = {b.key: b for b in graph.blocks}
    assert by_key["attention", 3].operators["Softmax"] == 6
    _check_picture(graph)


@pytest.mark.parametrize("time", ["log", "delta"])
def test_picture_of_the_reference_model(exported, time):
    graph = condense(Bundle.load(exported(time, "projected")))
    svg = _check_picture(graph)
    shown = " ".join(t.text or "" for t in svg.iter(f"{SVG}text"))
    for s in graph.state:
        assert s.name[:12] in shown
    for name in (*graph.inputs["user"], *graph.inputs["target"], *graph.outputs):
        assert name[:12] in shown


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(cases())
def test_random_graphs(case):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(case.model, file)
        cut = CutOptions(workload={"N_h": 100, "N_t": 10, "one": 1})
        try:
            bundle = split_onnx(file, case.scopes, Path(folder) / "bundle", prove=tiny.no_proof, cut=cut)
        except StcaError:
            return  # nothing to cut
        graph = condense(bundle)
    made = {v for node in case.model.graph.node for v in node.output}
    nodes = sum(sum(b.operators.values()) for b in graph.blocks)
    assert 0 < nodes <= 2 * len(made)
    _check_picture(graph)


def _check_picture(graph: Condensed) -> ET.Element:
    """Well-formed, everything inside, and no box over another."""
    svg = ET.fromstring(block_picture(graph))
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    boxes = []
    for r in svg.iter(f"{SVG}rect"):
        if r.get("class") == "paper":
            x, y, w, h = (float(r.attrib[k]) for k in ("x", "y", "width", "height"))
            assert min(x, y) >= 0
            assert x + w <= width
            assert y + h <= height
            boxes.append((x, y, x + w, y + h))
    assert len(boxes) >= len(graph.blocks)
    for a, b in combinations(boxes, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (a, b)
    for path in svg.iter(f"{SVG}path"):
        if path.get("class") == "wire":
            for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.attrib["d"]):
                assert 0 <= float(x) <= width
                assert 0 <= float(y) <= height
    return svg
