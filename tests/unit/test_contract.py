"""A manifest whose parts do not fit each other is refused before any engine runs; so is one its engines do not fit."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import onnx
import pytest
from support.errors import one_line

from stca.bundle import Bundle, seal
from stca.contract import as_built, check_contract, check_engine
from stca.errors import BundleError
from stca.manifest import EngineEntry, Manifest
from stca.runtime import Session
from stca.specs import HALVES, GraphSpec, TensorSpec

CPU = "CPUExecutionProvider"


@pytest.fixture(scope="module")
def raw(bundle_dir):
    return json.loads(Bundle.load(bundle_dir).manifest.to_json())


def tensor(specs, name):
    return next(s for s in specs if s["name"] == name)


def encoder(m):
    return m["graphs"]["user_encoder"]


def encoder_of(manifest):
    return manifest.graphs["user_encoder"]


def scorer(m):
    return m["graphs"]["target_scorer"]


def per_token(m):
    return next(s for s in m["state"] if s["input"] is None and s["shape"][0] == "N_h")


def everywhere(m, name):
    """The tensor wherever it stands, so that only one promise is broken at a time."""
    specs = [s for g in m["graphs"].values() for s in (*g["inputs"], *g["outputs"])]
    return [s for s in (*specs, *m["state"]) if s["name"] == name]


def change_all(m, name, **changes):
    for spec in everywhere(m, name):
        spec.update(changes)


BROKEN = {
    "a state counts users where the encoder counts tokens": (
        lambda m: per_token(m).update(shape=["B", *per_token(m)["shape"][1:]]), ("in state", "user_encoder")),
    "a state of another dtype": (lambda m: per_token(m).update(dtype="float64"), ("float64", "float32")),
    "a state the encoder does not give": (
        lambda m: encoder(m)["outputs"].remove(tensor(encoder(m)["outputs"], per_token(m)["name"])),
        ("encoder does not give",)),
    "a state the scorer does not take": (
        lambda m: scorer(m)["inputs"].remove(tensor(scorer(m)["inputs"], per_token(m)["name"])),
        ("scorer does not take",)),
    "an encoder's output that is no state": (lambda m: m["state"].remove(per_token(m)), ("no input of the request",)),
    "an input twice": (lambda m: scorer(m)["inputs"].append(dict(scorer(m)["inputs"][0])), ("twice", "target_scorer")),
    "a state twice": (lambda m: m["state"].append(dict(per_token(m))), ("twice",)),
    "a copied state of another dtype": (
        lambda m: change_all(m, next(s["name"] for s in m["state"] if s["input"] and s["shape"] == ["B_plus_1"]),
                             dtype="float32"), ("int32 or int64",)),
    "offsets of two axes": (lambda m: change_all(m, "history_offsets", shape=["B_plus_1", 2]), ("B_plus_1",)),
    "a table of more bytes than 64 bits count": (
        lambda m: m.update(tables=[{"name": "x", "file": "x.rows", "digests": "x.digests", "dtype": "float32",
                                    "rows": (1 << 34) + 1, "width": 1 << 28, "block_rows": 1 << 20}]),
        ("which is no table's",)),
    "a size without a name": (
        lambda m: change_all(m, "target_item", shape=[""]), ("target_item", "names for those that vary")),
    "a limit of truths": (
        lambda m: change_all(m, "request_device", dtype="bool", limit=2), ("bool and has a limit of ids",)),
    "a limit beyond 64 bits": (
        lambda m: change_all(m, "target_item", limit=1 << 64), ("limit is 18446744073709551616",)),
    "a least value beyond 64 bits": (
        lambda m: change_all(m, "target_item", low=1 << 64), ("more than 64 bits",)),
    "a blank beyond 64 bits": (
        lambda m: change_all(m, "target_item", blank=1 << 64), ("more than 64 bits",)),
    "an input without a scope": (
        lambda m: tensor(m["graphs"]["request"]["inputs"], "history_item").update(scope=None), ("no scope",)),
    "a target input in the encoder": (
        lambda m: encoder(m)["inputs"].append(dict(tensor(m["graphs"]["request"]["inputs"], "target_item"))),
        ("'target_item'", "not of scope user")),
    "a user input in the scorer": (
        lambda m: scorer(m)["inputs"].append(dict(tensor(m["graphs"]["request"]["inputs"], "history_item"))),
        ("'history_item'", "is of scope user")),
    "a state that counts targets": (
        lambda m: change_all(m, per_token(m)["name"], shape=["N_t", 4]), ("counts targets",)),
    "a sum of several users": (
        lambda m: per_token(m).update(append="sum"), ("is a sum over tokens", "not appended to as such")),
    "a state that is appended to in another way": (lambda m: per_token(m).update(append="rows"), ("append", "'rows'")),
    "scores of integers": (lambda m: change_all(m, "scores", dtype="int64"), ("floating-point scores",)),
    "a row of a terabyte": (lambda m: change_all(m, per_token(m)["name"], shape=["N_h", 1 << 40]), ("any row",)),
    "scores of another name": (
        lambda m: scorer(m)["outputs"][0].update(name="other"), ("output 0", "'other'", "'scores'")),
    "scores of another dtype": (lambda m: scorer(m)["outputs"][0].update(dtype="float64"), ("'scores'", "float64")),
    "scores of another width": (lambda m: scorer(m)["outputs"][0].update(shape=["N_t", 9]), ("[N_t, 9]",)),
    "an output that the request graph lacks": (
        lambda m: scorer(m)["outputs"].append({**scorer(m)["outputs"][0], "name": "more"}), ("'more'", "missing")),
    "an output that the scorer lacks": (
        lambda m: m["graphs"]["request"]["outputs"].append({**scorer(m)["outputs"][0], "name": "more"}),
        ("missing", "'more'")),
    "an 8-bit float that is no state": (
        lambda m: change_all(m, "history_item", dtype="float8_e4m3fn", limit=None), ("'history_item'", "states alone")),
    "scores in an 8-bit float": (
        lambda m: change_all(m, "scores", dtype="float8_e4m3fn"), ("'scores'", "states alone")),
    "a limit of ids on floats": (
        lambda m: change_all(m, "history_item", dtype="float32"), ("float32", "limit of ids")),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_contract(raw, name):
    change, words = BROKEN[name]
    changed = copy.deepcopy(raw)
    change(changed)
    with one_line(BundleError, "malformed", *words):
        Manifest.from_json(json.dumps(changed))


def test_a_sound_one(raw):
    assert Manifest.from_json(json.dumps(raw)).state


def test_scores_of_outputs_that_changed_places(raw):
    """One task's scores would be told as another's."""
    changed = copy.deepcopy(raw)
    for graph in ("request", "target_scorer"):
        changed["graphs"][graph]["outputs"].append({**scorer(changed)["outputs"][0], "name": "more"})
    Manifest.from_json(json.dumps(changed))
    scorer(changed)["outputs"].reverse()
    with one_line(BundleError, "output 0", "'more'", "'scores'"):
        Manifest.from_json(json.dumps(changed))


class Counting(str):
    """A name that counts how often it is compared with another."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Counting.compared += 1
        return str.__eq__(self, other)


def test_the_contract_takes_as_long_as_it_has_tensors(raw):
    def comparisons(count):
        manifest = Manifest.from_json(json.dumps(raw))
        one = next(s for s in manifest.state if s.input is None)
        many = [dataclasses.replace(one, name=Counting(f"s{i}")) for i in range(count)]
        specs = tuple(TensorSpec(Counting(str(s.name)), s.dtype, s.shape) for s in many)
        graphs = {**manifest.graphs}
        graphs["user_encoder"] = dataclasses.replace(encoder_of(manifest), outputs=specs)
        scorer = manifest.graphs["target_scorer"]
        kept = tuple(s for s in scorer.inputs if s.name not in {t.name for t in manifest.state})
        graphs["target_scorer"] = dataclasses.replace(scorer, inputs=kept + specs)
        Counting.compared = 0
        check_contract(dataclasses.replace(manifest, state=tuple(many), graphs=graphs))
        check_engine("half", graphs["user_encoder"], encoder_of(manifest).inputs, specs)
        return Counting.compared

    assert comparisons(400) < 3 * comparisons(200)


def test_more_tensors_than_any_model_has(raw):
    changed = copy.deepcopy(raw)
    changed["state"] += [{**per_token(raw), "name": f"s{i}"} for i in range(2001 - len(raw["state"]))]
    with one_line(BundleError, "2001 tensors", "2000"):
        Manifest.from_json(json.dumps(changed))


GRAPH = GraphSpec("g.onnx", (TensorSpec("x", "float32", ("N_h", 4)),), (TensorSpec("y", "float32", ("N_h", 2)),))


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        ([], [TensorSpec("y", "float32", ("N_h", 2))], ("no input 'x'",)),
        ([TensorSpec("x", "int64", ("N_h", 4))], [TensorSpec("y", "float32", ("N_h", 2))], ("int64", "float32")),
        ([TensorSpec("x", "float32", ("N_h", 5))], [TensorSpec("y", "float32", ("N_h", 2))], ("[N_h, 5]", "[N_h, 4]")),
        ([TensorSpec("x", "float32", (7, 4))], [TensorSpec("y", "float32", ("N_h", 2))], ("[7, 4]", "[N_h, 4]")),
        ([TensorSpec("x", "float32", ("N_h", 4))], [TensorSpec("y", "float32", ("B", 2))], ("[B, 2]", "[N_h, 2]")),
        ([TensorSpec("x", "float32", ("N_h", 4))], [TensorSpec("y", "float32", ())], ("'y'", "[]")),
        (
            [TensorSpec("x", "float32", ("N_h", 4)), TensorSpec("z", "float32", ())],
            [TensorSpec("y", "float32", ("N_h", 2))],
            ("'z'", "says nothing"),
        ),
    ],
)
def test_an_engine_that_says_otherwise(inputs, outputs, words):
    with one_line(BundleError, "half", *words):
        check_engine("half", GRAPH, inputs, outputs)


def test_an_engine_may_name_sizes_as_it_likes():
    graph = GraphSpec("g", (TensorSpec("x", "float32", ("seq",)),), (TensorSpec("y", "float32", ("rows", 2)),))
    check_engine("half", graph, [TensorSpec("x", "float32", ("s0",))], [TensorSpec("y", "float32", ("", 2))])


def test_what_an_engine_has_one_name_for_is_one_size():
    graph = GraphSpec("g", (TensorSpec("x", "float32", ("N_h",)), TensorSpec("y", "float32", (2,))), ())
    with one_line(BundleError, "half", "'y'", "N_h", "2"):
        check_engine("half", graph, [TensorSpec(n, "float32", ("N_h",)) for n in "xy"], [])


def test_an_engine_of_one_request_has_its_sizes(raw):
    manifest = Manifest.from_json(json.dumps(raw))
    graph = manifest.graphs["user_encoder"]
    one = {"B": 1, "B_plus_1": 2}
    fixed = [
        [dataclasses.replace(s, shape=tuple(one.get(n, n) for n in s.shape)) for s in specs]
        for specs in (graph.inputs, graph.outputs)
    ]
    promised = as_built(manifest, "user_encoder", "fp32", requests=1)
    check_engine("half", promised, *fixed)
    check_engine("half", promised, graph.inputs, graph.outputs)
    with one_line(BundleError, "[2]", "[B_plus_1]"):
        check_engine("half", as_built(manifest, "user_encoder", "fp32"), *fixed)
    with one_line(BundleError, "no input"):
        check_engine("half", promised, fixed[0][1:], fixed[1])
    check_engine("half", promised, fixed[0][1:], fixed[1], may_leave_out=True)


@pytest.mark.parametrize("half", HALVES)
def test_built_engines_are_held_against_the_manifest_too(bundle_dir, tmp_path, half):
    """An engine that was built of another graph, its digest right."""
    copied = Path(shutil.copytree(bundle_dir, tmp_path / "B"))
    manifest = Bundle.load(copied).manifest
    entries = [
        EngineEntry(graph=h, file=f"{h}.built.onnx", flavour="onnxruntime", precision="fp32", provider=CPU)
        for h in HALVES
    ]
    for entry in entries:
        model = onnx.load(copied / manifest.graphs[entry.graph].file, load_external_data=False)
        if entry.graph == half:
            other = model.graph.output.pop()
            model.graph.node.add(op_type="Identity", input=[other.name], output=["other"])
            other.name = "other"
            model.graph.output.append(other)
        onnx.save(model, copied / entry.file)
    seal(copied, dataclasses.replace(manifest, engines=tuple(entries)))
    with one_line(BundleError, half, "has no output"):
        Session.load(copied, engine="onnxruntime", threads=1)


@pytest.mark.parametrize("told", [{}, {"zero_points": False}, {"zero_points": True}])
def test_int8_matrices_of_an_older_stca_are_refused_on_every_processor(raw, told):
    weights = {"kind": "int8", "activations": "none", "tensors": ["a"], **told}
    text = json.dumps(raw | {"quantization": {"weights": weights}})
    if told.get("zero_points"):
        Manifest.from_json(text)
        return
    with one_line(BundleError, "int8 matrices", "zero points", "calibrate the float32 bundle again"):
        Manifest.from_json(text)
    Manifest.from_json(text.replace('"kind": "int8"', '"kind": "fp8"'))
