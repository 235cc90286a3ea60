"""Embedding tables leave the graphs: which do, why others stay, and that scores stay the model's scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from support import tables, tiny
from support.errors import one_line
from torch import nn

from stca import commands as cli
from stca.bundle import Bundle
from stca.checks import in_double
from stca.checks.bench import bench
from stca.checks.blame import bisect
from stca.checks.verify import prove, verify
from stca.engines.build import build
from stca.engines.refit import refit
from stca.errors import CheckpointError, SplitError
from stca.export.analysis.scope import stand_ins
from stca.export.pipeline import CutOptions, export_checkpoint, export_module
from stca.export.reference.checkpoint import Checkpoint
from stca.export.tables import Large, leave, put_back
from stca.export.to_onnx import RequestModel
from stca.report.blocks import condense
from stca.runtime import Request, Session
from stca.specs import GRAPHS, TensorSpec

HIST, ITEM = [1, 7, 4999, 7, 1030], [5, 0, 4998]
NODE = helper.make_node


def scores(bundle: Bundle, hist: list[int] = HIST, item: list[int] = ITEM) -> np.ndarray[Any, Any]:
    return Session.load(bundle.path).score(Request({"hist": hist, "item": item}))


def constant(name: str, values: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values), name)


# Ways from the input to the ids, with the weights that they read.
WAYS = {
    "straight": (None, ()),
    "an offset": ([NODE("Add", ["hist", "by"], ["ids"], "add")], (constant("by", np.int64(-1)),)),
    "hashed": (
        [NODE("Mul", ["hist", "by"], ["far"], "mul"), NODE("Mod", ["far", "n"], ["ids"], "mod")],
        (constant("by", np.int64(2654435761)), constant("n", np.int64(4999))),
    ),
    "fields that share it": (
        [
            NODE("Unsqueeze", ["hist", "axis"], ["column"], "column"),
            NODE("Mod", ["column", "n"], ["low"], "low"),
            NODE("Concat", ["low", "low"], ["both"], "both", axis=1),
            NODE("Add", ["both", "offsets"], ["apart"], "apart"),
            NODE("Reshape", ["apart", "flat"], ["ids"], "flat"),
        ],
        (
            constant("axis", np.array([1])),
            constant("n", np.int64(2000)),
            constant("offsets", np.array([[0, 2000]])),
            constant("flat", np.array([-1])),
        ),
    ),
    "from the end": (
        [
            NODE("Equal", ["hist", "seven"], ["is"], "is"),
            NODE("Where", ["is", "last", "hist"], ["ids"], "where"),
        ],
        (constant("seven", np.int64(7)), constant("last", np.int64(-1))),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_ids_made_of_integers_are_looked_up_outside_the_graphs(tmp_path, way):
    model = tables.model(WAYS[way][0], WAYS[way][1])
    bundle = tables.split(model, tmp_path, prove)
    (table,) = bundle.manifest.tables
    assert (table.name, table.rows, table.width, table.dtype) == ("table", tables.ROWS, tables.WIDTH, "float32")
    assert (bundle.path / table.file).read_bytes() == tables.table().tobytes()
    for graph in GRAPHS:
        spec = bundle.manifest.graphs[graph]
        file = onnx.load(bundle.path / spec.file)
        assert all(t.name != "table" for t in file.graph.initializer)
        assert {one.rows for one in spec.lookups} <= {i.name for i in file.graph.input}
        assert (spec.ids is None) == (way == "straight" or graph == "target_scorer")
    hist = [n for n in HIST if n] if way == "an offset" else HIST
    np.testing.assert_allclose(scores(bundle, hist), tables.expected(model, hist, ITEM), rtol=2e-5, atol=1e-5)
    assert verify(bundle).passed


def test_the_rest_of_the_toolkit_takes_such_a_bundle(tmp_path, capsys):
    bundle = tables.split(tables.model(), tmp_path)
    assert bisect(bundle, "target_scorer", bundle.file("target_scorer")) is None
    report = bench(bundle, [8], [3], seconds=0.01, threads=1)
    assert {r.stage for r in report.rows} == {"miss", "hit", "user_encoder", "target_scorer", "pointwise"}
    assert [e["precision"] for e in build(bundle.path, engine="onnxruntime", precision="fp16")] == ["fp16", "fp16"]
    built = Session.load(bundle.path, engine="onnxruntime").score(Request({"hist": HIST, "item": ITEM}))
    np.testing.assert_allclose(built, scores(bundle), rtol=2e-2, atol=2e-2)
    assert condense(Bundle.load(bundle.path)).state
    assert cli.main(["inspect", str(bundle.path), "--why"]) == 0
    said = capsys.readouterr().out
    assert "table: float32 [5000, 16]" in said
    assert "hist in user_encoder" in said
    assert "left the graphs" in said


def test_a_bag_is_summed_in_the_graph(tmp_path):
    model = tables.model(bag=True)
    bundle = tables.split(model, tmp_path, prove)
    np.testing.assert_allclose(scores(bundle), tables.expected(model, HIST, ITEM), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(TensorProto.FLOAT16, np.float16), (TensorProto.BFLOAT16, ml_dtypes.bfloat16)]
)
def test_narrow_rows_stay_narrow_on_disk(tmp_path, kind, dtype):
    model = tables.model(kind=kind)
    bundle = tables.split(model, tmp_path, prove)
    (table,) = bundle.manifest.tables
    assert (bundle.path / table.file).read_bytes() == tables.table().astype(dtype).tobytes()
    wide = tables.model(values=tables.table().astype(dtype).astype(np.float32))
    np.testing.assert_allclose(scores(bundle), tables.expected(wide, HIST, ITEM), rtol=1e-4, atol=1e-5)


def test_a_small_table_stays_and_off_keeps_all(tmp_path):
    for above in (None, tables.table().nbytes):
        assert tables.split(tables.model(), tmp_path, above=above).manifest.tables is None
    assert tables.split(tables.model(), tmp_path, above=tables.table().nbytes - 1).manifest.tables


REASONS = {
    "a product": ([NODE("MatMul", ["table", "w"], ["product"], "read")], "'read' (MatMul)"),
    "columns": ([NODE("Gather", ["table", "zero"], ["columns"], "read", axis=1)], "'read' gathers its columns"),
    "a float": (
        [
            NODE("Cast", ["hist"], ["floats"], "floats", to=TensorProto.FLOAT),
            NODE("Cast", ["floats"], ["cast"], "cast", to=TensorProto.INT64),
            NODE("Gather", ["table", "cast"], ["columns"], "read"),
        ],
        "'read' are not made of integers alone: 'floats' is float32",
    ),
    "no input": ([NODE("Gather", ["table", "zero"], ["columns"], "read")], "'read' depend on no input"),
}


@pytest.mark.parametrize("why", REASONS)
def test_a_table_that_is_used_otherwise_stays_and_says_why(tmp_path, capsys, why):
    model = tables.model()
    nodes, reason = REASONS[why]
    made = nodes[-1].output[0]
    more = [*nodes, NODE("ReduceMean", [made], ["one_number"], "mean", keepdims=0)]
    del model.graph.node[-1]
    model.graph.node.extend([*more, NODE("ReduceSum", ["products", "one"], ["sums"], "sums", keepdims=1)])
    model.graph.node.append(NODE("Add", ["sums", "one_number"], ["scores"], "scores_node"))
    bundle = tables.split(model, tmp_path)
    assert bundle.manifest.tables is None
    assert cli.main(["inspect", str(bundle.path), "--why"]) == 0
    assert reason in capsys.readouterr().out
    np.testing.assert_allclose(scores(bundle), tables.expected(model, HIST, ITEM), rtol=1e-4, atol=1e-5)


def test_rows_that_are_not_finite_are_refused(tmp_path):
    values = tables.table()
    values[4321, 3] = np.nan
    with one_line(SplitError, "'table'", "NaN or infinite", "export an earlier step"):
        tables.split(tables.model(values=values), tmp_path)
    assert not (tmp_path / "bundle").exists()


def test_narrow_rows_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    values = tables.table()
    values[4321, 3] = np.nan
    monkeypatch.setattr(tables, "table", lambda: values)
    with one_line(SplitError, "'table'", "NaN or infinite"):
        tables.split(tables.model(kind=TensorProto.BFLOAT16), tmp_path)


def test_a_table_beside_the_model_is_read_by_slices_and_stays_sparse(tmp_path, monkeypatch):
    model, rows = tables.model(), 1 << 20
    values = tables.table(rows)[: 1 << 12]
    file = tmp_path / "table.bin"
    with file.open("wb") as f:
        f.truncate(8 + rows * tables.WIDTH * 4)  # 64 MiB, most of it a hole
        f.seek(8)
        f.write(values.tobytes())
        f.seek(8 + (rows - 1) * tables.WIDTH * 4)
        f.write(values[5].tobytes())
    tensor = next(t for t in model.graph.initializer if t.name == "table")
    tensor.CopyFrom(onnx.TensorProto(name="table", data_type=TensorProto.FLOAT, dims=[rows, tables.WIDTH]))
    tensor.raw_data = b""
    onnx.external_data_helper.set_external_data(tensor, file.name, offset=8, length=rows * tables.WIDTH * 4)
    tensor.ClearField("raw_data")

    def refuse(tensor: onnx.TensorProto, base: str) -> None:
        assert tensor.name != "table", "it was loaded whole"

    monkeypatch.setattr(onnx.external_data_helper, "load_external_data_for_tensor", refuse)
    bundle = tables.split(model, tmp_path)
    (table,) = bundle.manifest.tables
    assert (bundle.path / table.file).stat().st_blocks * 512 < 4 << 20
    small = tables.model(values=np.concatenate([values, values[5:6]]))
    found = scores(bundle, [0, 7, rows - 1], [3, rows - 1])
    np.testing.assert_allclose(found, tables.expected(small, [0, 7, 1 << 12], [3, 1 << 12]), rtol=1e-4, atol=1e-5)
    assert bundle.manifest.graphs["request"].inputs[0].limit == rows


class Attends(nn.Module):
    """Targets attend to the history; the rows of the history are all that is the user's alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item, self.bag = nn.Embedding(3000, 16, padding_idx=0), nn.EmbeddingBag(2000, 16, mode="sum")
        self.out = nn.Linear(16, 1)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        history, item = self.item(inputs["hist"]), self.item(inputs["item"])
        item = item + self.bag(inputs["tags"])
        return self.out(torch.softmax(item @ history.T, -1) @ history)


ATTENDS = (
    TensorSpec("hist", "int64", ("N_h",), "user"),
    TensorSpec("item", "int64", ("N_t",), "target"),
    TensorSpec("tags", "int64", ("N_t", 3), "target"),
)


def exported(folder: Path, module: nn.Module, inputs: tuple[TensorSpec, ...], **cut: Any) -> Bundle:
    options = CutOptions(tables_above=1 << 16, **cut)
    model, source = RequestModel(module, inputs), {"kind": "callable", "name": "test:model"}
    return export_module(model, folder / "bundle", prove=prove, source=source, cut=options)


@pytest.mark.parametrize(("flops_per_row", "dtype"), [(1, "int64"), (100_000, "float32")])
def test_ids_are_the_state_unless_their_rows_come_slowly(tmp_path, flops_per_row, dtype):
    module = Attends()
    bundle = exported(tmp_path, module, ATTENDS, flops_per_row=flops_per_row)
    assert {t.name for t in bundle.manifest.tables} == {"item.weight", "bag.weight"}
    assert [s.dtype for s in bundle.manifest.state] == [dtype]
    asked = {one.ids for one in bundle.manifest.graphs["target_scorer"].lookups}
    assert "item" in asked
    assert (bundle.manifest.state[0].name in asked) == (dtype == "int64")
    session = Session.load(bundle.path)
    request = {"hist": [1, 2999, 0], "item": [4, 5], "tags": [[1, 2, 3], [1999, 0, 0]]}
    wanted = module({n: torch.tensor(x) for n, x in request.items()}).detach().numpy()
    miss = session.score(Request(request, user="u", version=1))
    hit = session.score(Request({n: request[n] for n in ("item", "tags")}, user="u", version=1))
    np.testing.assert_allclose(miss, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(miss, hit)


class Pointwise(nn.Module):
    """A row for each target, with its user's history copied."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item, self.out = nn.Embedding(3000, 16), nn.Linear(32, 1)

    def forward(self, hist: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([torch.relu(self.item(hist)).mean(1), self.item(item)], 1))


def test_a_lifted_model_and_its_pointwise_graph_share_the_table(tmp_path):
    module = Pointwise()
    specs = (TensorSpec("hist", "int64", ("B", 6), "user"), TensorSpec("item", "int64", ("B",), "target"))
    bundle = exported(tmp_path, module, specs)
    assert len(bundle.manifest.tables) == 1
    assert bundle.manifest.graphs["pointwise"].lookups
    hist, item = [1, 2999, 0, 4, 4, 9], [4, 5, 2998]
    wanted = module(torch.tensor([hist] * 3), torch.tensor(item)).detach().numpy()
    found = Session.load(bundle.path).score(Request({"hist": hist, "item": item}))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_large_tables_are_proven_without_a_copy(tmp_path, monkeypatch):
    whole = []

    def watched(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = was(self, func, types, args, kwargs)
        if isinstance(out, torch.Tensor) and out.shape in ((2000, 16), (3000, 16)):
            whole.append(str(func))
        return out

    was = in_double.InDouble.__torch_dispatch__
    monkeypatch.setattr(in_double, "LARGE", 1 << 16)
    monkeypatch.setattr(in_double.InDouble, "__torch_dispatch__", watched)
    module = Attends()
    before = [p.data_ptr() for p in module.parameters()]
    copy = in_double.converted(in_double.copied(module), torch.float64)
    shared = [p.data_ptr() for p in copy.parameters()]
    assert [a == b for a, b in zip(before, shared, strict=True)] == [True, True, False, False]
    exported(tmp_path, module, ATTENDS)
    assert [p.data_ptr() for p in module.parameters()] == before
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not whole


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_of_a_large_table_are_as_if_all_of_it_had_the_type(monkeypatch, dtype):
    monkeypatch.setattr(in_double, "LARGE", 1 << 16)
    table, ids = torch.randn(3000, 16), torch.tensor([[5, 2999, 5], [0, 1, 7]])
    ways = {
        "embedding": lambda t, i: nn.functional.embedding(i, t),
        "index": lambda t, i: t[i - 1],
        "index_select": lambda t, i: t.index_select(0, i.reshape(-1)),
        "bag": lambda t, i: nn.functional.embedding_bag(i, t, mode="sum", padding_idx=5),
        "mean": lambda t, i: nn.functional.embedding_bag(i.reshape(-1), t, torch.tensor([0, 2]), mode="mean"),
    }
    for name, way in ways.items():
        wanted = way(table.to(dtype), ids)
        with torch.no_grad(), in_double.LargeRows(dtype):
            found = way(table, ids)
        assert found.dtype == dtype, name
        assert torch.equal(found, wanted), name


def test_a_checkpoint_of_the_reference_model_refits_its_table(tmp_path):
    config = tiny.config(items=4000)
    old, new = (tiny.module(config, seed) for seed in (0, 1))
    cut = CutOptions(tables_above=1 << 16)
    bundle = export_checkpoint(Checkpoint(config, old.state_dict()), tmp_path / "bundle", prove=tiny.no_proof, cut=cut)
    (table,) = bundle.manifest.tables
    assert bundle.manifest.weights != bundle.manifest.files["weights.safetensors"]["sha256"]
    assert verify(bundle).passed  # rebuilt from the bundle, table and all
    fresh = export_checkpoint(Checkpoint(config, new.state_dict()), tmp_path / "fresh", prove=tiny.no_proof, cut=cut)
    from stca.export.reference.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "new.safetensors", new)
    refit(bundle.path, tmp_path / "new.safetensors")
    refitted = Bundle.load(bundle.path)
    assert refitted.manifest.weights == fresh.manifest.weights != bundle.manifest.weights
    assert (refitted.path / table.file).read_bytes() == new.state_dict()[table.name].numpy().tobytes()


def test_any_bundle_refits_its_table_or_says_what_is_wrong(tmp_path):
    bundle = tables.split(tables.model(), tmp_path, prove)
    weights = {"table": tables.table(seed=5), "w": np.eye(tables.WIDTH, dtype=np.float32)}
    safetensors.torch.save_file({n: torch.from_numpy(x) for n, x in weights.items()}, tmp_path / "new.safetensors")
    refit(bundle.path, tmp_path / "new.safetensors")
    model = tables.model(values=weights["table"])
    next(t for t in model.graph.initializer if t.name == "w").CopyFrom(constant("w", weights["w"]))
    np.testing.assert_allclose(scores(bundle), tables.expected(model, HIST, ITEM), rtol=1e-4, atol=1e-5)
    for change, words in (
        ({"table": weights["table"][:-1].copy()}, ("'table'", "[4999, 16]", "[5000, 16]")),
        ({"table": np.full_like(weights["table"], np.inf)}, ("'table'", "NaN or infinite")),
        ({}, ("no tensor 'table'",)),
    ):
        given = {"w": weights["w"], **change}
        safetensors.torch.save_file({n: torch.from_numpy(x) for n, x in given.items()}, tmp_path / "bad.safetensors")
        with one_line(CheckpointError, *words):
            refit(bundle.path, tmp_path / "bad.safetensors")


@pytest.mark.parametrize("text", ["", "-1", "1e9", "some"])
def test_the_option_takes_bytes_or_off(text, capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["split", "m.onnx", "--out", str(tmp_path / "b"), "--tables-above", text])
    assert "no number of bytes, nor off" in capsys.readouterr().err


def test_the_command_line_splits_and_scores(tmp_path, capsys):
    onnx.save(tables.model(), tmp_path / "model.onnx")
    out = str(tmp_path / "bundle")
    marks = ["--user-inputs", "hist", "--target-inputs", "item"]
    assert cli.main(["split", str(tmp_path / "model.onnx"), *marks, "--out", out, "--tables-above", "65536"]) == 0
    (tmp_path / "r.json").write_text(json.dumps({"inputs": {"hist": HIST, "item": ITEM}}))
    capsys.readouterr()
    assert cli.main(["score", out, str(tmp_path / "r.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["requests"][0]["scores"]
    np.testing.assert_allclose(found, tables.expected(tables.model(), HIST, ITEM), rtol=1e-4, atol=1e-5)


@pytest.fixture
def small_is_large(monkeypatch):
    """Tables of these tests are kept apart while their graphs are worked on."""
    monkeypatch.setattr("stca.export.tables.APART", 1 << 16)


@pytest.mark.parametrize("way", WAYS)
def test_a_table_that_stays_comes_back_whole(tmp_path, small_is_large, way):
    model = tables.model(WAYS[way][0], WAYS[way][1])
    bundle = tables.split(model, tmp_path, prove, above=None)
    assert bundle.manifest.tables is None
    assert "tables" not in bundle.manifest.split
    assert safetensors.torch.load_file(bundle.path / "weights.safetensors")["table"].numpy().tobytes() == (
        tables.table().tobytes()
    )
    for graph in GRAPHS:
        file = onnx.load(bundle.file(graph), load_external_data=False).graph
        (weight,) = [t for t in file.initializer if t.name == "table"]
        assert list(weight.dims) == [tables.ROWS, tables.WIDTH]
        assert sum(n.op_type == "Mod" for n in file.node) == sum(n.name in ("mod", "low") for n in file.node)
    hist = [n for n in HIST if n] if way == "an offset" else HIST
    np.testing.assert_allclose(scores(bundle, hist), tables.expected(model, hist, ITEM), rtol=2e-5, atol=1e-5)


def test_no_step_looks_at_all_of_a_table_that_is_kept_apart(tmp_path, small_is_large, monkeypatch):
    """Passes have a stand-in, and the reference in float64 reads rows: widened, a table takes twice its bytes."""
    import stca.export.passes.to_double as widened

    largest = []
    whole = widened._widen
    monkeypatch.setattr(widened, "_widen", lambda t: (largest.append(t.ByteSize()), whole(t)))
    tables.split(tables.model(), tmp_path, prove, above=None)
    assert 0 < max(largest) < tables.ROWS * tables.WIDTH * 4 / 3


def test_a_table_that_is_read_otherwise_is_widened_whole(tmp_path, small_is_large):
    model = tables.model()
    model.graph.node.append(NODE("ReduceMax", ["table"], ["largest"], "largest", keepdims=1))
    model.graph.node[-2].output[0] = "scores_"
    model.graph.node.append(NODE("Add", ["scores_", "largest"], ["scores"], "sum"))
    bundle = tables.split(model, tmp_path, prove, above=None)
    np.testing.assert_allclose(scores(bundle), tables.expected(model, HIST, ITEM), rtol=2e-5, atol=1e-5)


def test_numbers_that_are_none_are_found_in_a_table_that_stays(tmp_path, small_is_large):
    values = tables.table()
    values[-1, -1] = np.nan
    with pytest.raises(SplitError, match="weight 'table' has NaN or infinite values"):
        tables.split(tables.model(values=values), tmp_path, prove, above=None)


def test_a_table_comes_back_though_a_pass_moved_its_ids(small_is_large):
    """What lies between a look-up and the ids brought into the stand-in moves true ids then."""
    model = tables.model()
    large = Large()
    large.hollow(model.graph.initializer[0], values := tables.table())
    left = leave(model, large, Path(), lambda _: None)
    look_up = next(n for n in model.graph.node if n.name == "events")
    at = list(model.graph.node).index(look_up)
    moved = NODE("Concat", [look_up.input[1], look_up.input[1]], ["twice"], "twice", axis=0)
    look_up.input[1] = "twice"
    model.graph.node.insert(at, moved)
    assert "twice" in stand_ins(model)
    put_back(model, left.apart)
    model.graph.initializer[0].CopyFrom(constant("table", values))
    assert not stand_ins(model)
    found = tables.expected(model, HIST, ITEM)
    np.testing.assert_allclose(found, tables.expected(tables.model(), HIST, ITEM), rtol=1e-5)


def test_a_table_that_a_pass_reads_whole_says_what_leaves_it_alone(small_is_large):
    model = tables.model()
    large = Large()
    large.hollow(model.graph.initializer[0], tables.table())
    left = leave(model, large, Path(), lambda _: None)
    model.graph.node.append(NODE("ReduceMax", ["table"], ["largest"], "largest"))
    with one_line(SplitError, "'largest'", "'table'", "--no-lift"):
        put_back(model, left.apart)
