"""Embedding tables in 8 bits: how far off rows are, in files and in graphs, and that every runtime makes the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import tables
from support.calibrating import command_on
from support.errors import one_line

from stca import commands, probe
from stca.bundle import Bundle, seal
from stca.calibration.calibrate import calibrate
from stca.calibration.choices import Options
from stca.calibration.quality import Budget
from stca.calibration.quantized_bundle import weights_bytes, write_quantized
from stca.calibration.quantized_weights import RowFormat, in_steps, quantizable_tables, quantize_tables
from stca.checks.trace_runs import TraceRuns, tasks_of
from stca.checks.verify import prove, verify
from stca.engines.refit import refit
from stca.errors import BundleError, ParityError, UsageError
from stca.export.analysis.onnx_reference import reference_of
from stca.runtime import OnnxRuntimeEngine, Request, Session
from stca.tables import TableFile
from stca.trace import Traced

RNG = np.random.default_rng(0)
DATA = {
    "normal": RNG.standard_normal((300, 16)),
    "rows of all sizes": RNG.standard_normal((300, 16)) * np.logspace(-30, 30, 300)[:, None],
    "outlier": np.where(RNG.random((300, 16)) < 0.01, 1e4, 1.0) * RNG.standard_normal((300, 16)),
    "zeros": np.zeros((300, 16)),
    "denormal": RNG.standard_normal((300, 16)) * 1e-40,
    "largest": np.full((300, 16), np.finfo(np.float32).max),
    "empty": np.zeros((0, 16)),
}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("name", DATA)
def test_what_is_read_is_within_half_a_step(name, kind):
    x = DATA[name].astype(np.float32)
    numbers, steps = in_steps(x, kind, 1)
    assert (numbers.shape, steps.shape, steps.dtype) == (x.shape, (len(x), 1), np.float32)
    read = numbers.astype(np.float64) * steps
    assert np.isfinite(read).all()
    levels = 127 if kind == "int8" else 448
    step = np.abs(x.astype(np.float64)).max(1, keepdims=True, initial=0.0) / levels
    half = 0.5 * step if kind == "int8" else np.maximum(2.0**-10 * step, 2.0**-4 * np.abs(x))
    assert (np.abs(read - x) <= half * 1.001 + levels * 2.0**-149).all()  # a step below float32's normal ones is coarse


def split(folder, above, values=None):
    return tables.split(tables.model(values=values), folder, above=above)


@pytest.fixture(scope="module", params=["file", "graph"])
def own(request, tmp_path_factory):
    return split(tmp_path_factory.mktemp("own"), 1 << 16 if request.param == "file" else None)


@pytest.fixture(scope="module")
def in_graph(tmp_path_factory):
    return split(tmp_path_factory.mktemp("in_graph"), None)


def requests(own, count=12):
    specs, rng = own.manifest.graphs["request"].inputs, np.random.default_rng(0)
    return [Traced(probe.single(specs, 20, 40, rng)) for _ in range(count)]


def searched(own, out, trace, budget="top10=0.5", **options):
    return calibrate(
        own,
        lambda: trace,
        options=Options(None, **{"tables": "int8", **options}),
        budget=Budget.parse(budget),
        out=out,
        run=TraceRuns(1),
        tasks=tasks_of(own.manifest),
        prove=prove,
    )


def test_a_table_takes_a_third_of_its_bytes_and_the_proof_holds(tmp_path, own):
    made, found = searched(own, tmp_path / "q", requests(own))
    loaded = Bundle.load(made.path)
    assert loaded.manifest.quantization["tables"] == {"kind": "int8", "tensors": ["table"]}
    assert loaded.manifest.weights != own.manifest.weights
    assert loaded.manifest.parity["passed"]
    assert found.tried[-1].weights_ratio == weights_bytes(made.manifest) / weights_bytes(own.manifest) < 0.33
    assert (found.tried[-1].ratio, found.tried[-1].quantized) == (1.0, ("table",))
    inputs = {"hist": np.array([1, 7, 4999]), "item": np.array([5, 0, 4998])}
    numbers, steps = in_steps(tables.table(), "int8", 1)
    wanted = tables.expected(tables.model(values=numbers * steps), **inputs)
    found = Session.load(made.path, threads=1).score(Request(inputs))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_table_in_a_file_can_be_fp8_and_one_in_a_graph_cannot(tmp_path, in_graph):
    own = split(tmp_path, 1 << 16)
    made, _ = searched(own, tmp_path / "q", requests(own), tables="fp8")
    (table,) = made.manifest.tables
    assert (table.dtype, table.row_bytes) == ("float8_e4m3fn", tables.WIDTH + 4)
    rows, exact = TableFile(made.path, table).rows(np.arange(50)), tables.table()[:50]
    assert 0 < np.abs(rows - exact).max() < np.abs(exact).max() / 15
    with one_line(UsageError, "--tables fp8", "'table'", "--tables-above"):
        searched(in_graph, tmp_path / "w", requests(in_graph), tables="fp8")


def test_zeros_stay_zeros_and_sparse(tmp_path):
    values = tables.table()
    values[2000:] = 0
    own = split(tmp_path, 1 << 16, values)
    made = write_quantized(own, {"table": RowFormat("int8")}, tmp_path / "q")
    (table,) = made.manifest.tables
    assert not TableFile(made.path, table).rows(np.arange(2000, 5000)).any()


def test_a_row_that_is_not_finite_is_refused(tmp_path, own):
    values = tables.table()
    values[4321, 3] = -np.inf
    own = split(tmp_path, 1 << 16 if own.manifest.tables else None, values)
    with one_line(UsageError, "'table'", "not finite"):
        write_quantized(own, {"table": RowFormat("int8")}, tmp_path / "q")


@pytest.mark.parametrize(
    ("change", "can"),
    [
        (lambda g: None, True),
        (lambda g: g.node.append(helper.make_node("Identity", ["table"], ["again"])), False),
        (lambda g: g.node[2].attribute.append(helper.make_attribute("axis", 1)), False),
        (lambda g: g.output.append(helper.make_tensor_value_info("table", TensorProto.FLOAT, [5000, 16])), False),
        (lambda g: g.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((5000, 16)), "table")), False),
        (lambda g: g.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((5000, 4), np.float32), "table")), False),
        (lambda g: g.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((99, 16), np.float32), "table")), False),
    ],
)
def test_only_large_float_tables_that_are_looked_up_are_quantized(change, can):
    model = tables.model()
    change(model.graph)
    assert quantizable_tables([model]) == (("table",) if can else ())
    assert quantizable_tables([tables.model(), model]) == (("table",) if can else ())


def test_onnx_runtime_reads_what_the_reference_reads(tmp_path):
    model = tables.model()
    quantize_tables(model, ["table"])
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "m.onnx")
    assert {n.op_type for n in model.graph.node} >= {"Gather", "DequantizeLinear", "Mul"}
    inputs = {"hist": np.arange(0, 5000, 50), "item": np.array([1, -1, 7])}
    (wanted,) = reference_of(model).run(None, inputs)
    (found,) = OnnxRuntimeEngine(tmp_path / "m.onnx", threads=1).run(inputs).values()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_state_and_tables_are_held_to_one_budget(tmp_path, exported):
    own = Bundle.load(exported("log", "projected"))
    with one_line(UsageError, "no embedding table", "64 KiB"):
        searched(own, tmp_path / "q", requests(own))
    with one_line(UsageError, "nothing is to be quantized"):
        searched(own, tmp_path / "q", requests(own), tables=None)


def test_when_a_table_breaks_the_budget_its_look_up_is_named(tmp_path, in_graph):
    class Moved(TraceRuns):
        def scores(self, bundle, requests):
            sign = 1 if bundle.manifest.quantization is None else -1
            yield from (sign * x for x in super().scores(bundle, requests))

    with one_line(ParityError, "no tensor can be int8", "'table', read by node", "(Gather)", "top10"):
        calibrate(
            in_graph,
            lambda: requests(in_graph),
            options=Options(None, tables="int8"),
            budget=Budget.parse("top10=0.99"),
            out=tmp_path / "q",
            run=Moved(1),
            tasks=tasks_of(in_graph.manifest),
            prove=prove,
        )


def test_a_changed_scale_does_not_pass_the_proof(tmp_path, in_graph):
    made = write_quantized(in_graph, {"table": RowFormat("int8")}, tmp_path / "q")
    verify(made).require()
    scorer = onnx.load(made.file("target_scorer"), load_external_data=False)
    one = next(n for n in scorer.graph.node if n.name == "table_step")
    one.attribute[0].t.CopyFrom(numpy_helper.from_array(np.array(1.01, np.float32)))
    onnx.save(scorer, made.file("target_scorer"))
    made = seal(made.path, made.manifest)
    with pytest.raises(ParityError, match="joined_halves"):
        verify(made).require()


def test_other_weights_need_another_calibration(tmp_path, own):
    made = write_quantized(own, {"table": RowFormat("int8")}, tmp_path / "q")
    with one_line(BundleError, "its tables are in 8 bits", "calibrate the new one"):
        refit(made.path, tmp_path / "none.safetensors", out=tmp_path / "r")


def test_the_command(tmp_path, own, capsys):
    argv = [*command_on(own, requests(own), tmp_path), "--out", str(tmp_path / "q")]
    assert commands.main([*argv, "--tables", "int8"]) == 0
    assert "8 bits in 1 of 1 tensors: state 1.000 of float32, weights 0.3" in capsys.readouterr().out
    assert commands.main(argv) == 2
    assert "nothing is to be quantized" in capsys.readouterr().err


def test_a_quantized_reference_model_is_rebuilt_from_its_own_rows(tmp_path):
    from support import tiny

    from stca.export.pipeline import CutOptions, export_checkpoint
    from stca.export.reference.checkpoint import Checkpoint

    config = tiny.config(items=3000, item_width=8)
    checkpoint = Checkpoint(config, tiny.module(config).state_dict())
    for above in (None, 1 << 16):
        folder = tmp_path / str(above)
        folder.mkdir()
        cut = dataclasses.replace(CutOptions(), tables_above=above)
        own = export_checkpoint(checkpoint, folder / "own", prove=tiny.no_proof, cut=cut)
        made = write_quantized(own, {"item_table": RowFormat("int8")}, folder / "q")
        assert bool(made.manifest.tables) == (above is not None)
        assert verify(made, probes=(((9, 6),),)).require().reference == "float64 torch"
