"""What a graph takes is found by running it, whatever makes it so, and at whatever a run may cost its process."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from stca.errors import SplitError
from stca.export import asking
from stca.export.analysis.positions import position_tables
from stca.export.asking import ask
from stca.specs import TensorSpec

ITEM = TensorSpec("item", "int64", ("N_t",), "target", 50)


@pytest.fixture
def of(tmp_path):
    """What is accepted by nodes over `weights` that make `score`."""

    def run(inputs, nodes, max_history=None, **weights):
        kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "bool": TensorProto.BOOL}
        values = [helper.make_tensor_value_info(s.name, kinds[s.dtype], s.shape) for s in inputs]
        out = [helper.make_tensor_value_info("score", TensorProto.FLOAT, None)]
        constants = [numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items()]
        made = helper.make_graph(
            [helper.make_node(*n[:3], **(n[3] if n[3:] else {})) for n in nodes], "g", values, out, constants
        )
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, run.file)
        sizes = [n for table in position_tables(model).values() for n in table]
        return ask(run.file, inputs, max_history, sizes=sizes)

    run.file = tmp_path / "m.onnx"
    return run


def test_no_code_of_the_working_directory_runs(of, tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    of([ITEM], [("Gather", ["table", "item"], ["score"])], table=table(50))
    assert not (tmp_path / "ran").exists()


def table(rows, width=4):
    return np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("nodes", "limit"),
    [
        ([], 33),
        ([("Add", ["history", "three"], ["ids"])], 30),
        ([("Mul", ["history", "three"], ["ids"])], 11),
        (
            [
                ("Cast", ["history"], ["f"], {"to": TensorProto.FLOAT}),
                ("Cast", ["f"], ["ids"], {"to": TensorProto.INT64}),
            ],
            33,
        ),
        ([("Mod", ["history", "three"], ["ids"])], None),
    ],
)
def test_the_range_of_ids_by_whatever_way_they_reach_their_table(of, nodes, limit):
    history = TensorSpec("history", "int64", (1, "N_h"), "user")
    ids = "ids" if nodes else "history"
    ends = [("Gather", ["table", ids], ["x"]), ("ReduceSum", ["x"], ["score"])]
    found = of((history, ITEM), [*nodes, *ends], table=table(33), three=np.int64(3))
    assert found.inputs[0].limit == limit
    assert found.inputs[1] == ITEM, "what is known is not asked"
    assert (found.min_history, found.max_history) == (None, None)


@pytest.mark.parametrize("low", [1, -1])
def test_a_least_id_that_is_known_stays_and_the_largest_is_found(of, low):
    history = TensorSpec("history", "int64", (1, "N_h"), "user", low=low)
    nodes = [
        ("Max", ["history", "zero"], ["ids"]),
        ("Gather", ["table", "ids"], ["x"]),
        ("ReduceSum", ["x"], ["score"]),
    ]
    found = of((history, ITEM), nodes, table=table(33), zero=np.int64(0)).inputs[0]
    assert (found.low, found.limit) == (low, 33)


def test_the_shortest_of_histories_of_two_lengths(of):
    """Places counted from the end of both, as a model with few queries has them."""
    two = [TensorSpec(n, "float32", (1, f"of_{n}", 2), "user") for n in ("click", "buy")]
    nodes = [
        ("Concat", ["click", "buy"], ["all"], {"axis": 1}),
        ("Gather", ["all", "third"], ["x"], {"axis": 1}),
        ("ReduceSum", ["x"], ["score"]),
    ]
    assert of((*two, ITEM), nodes, third=np.int64(-3)).min_history == 2


@pytest.mark.parametrize("declared", [None, 13])
def test_a_length_is_at_least_one_and_at_most_the_history(of, declared):
    history = TensorSpec("history", "float32", (1, 12, 2), "user")
    length = TensorSpec("length", "int64", (1,), "user", limit=declared)
    nodes = [
        ("Sub", ["length", "one"], ["last"]),
        ("Gather", ["history", "last"], ["x"], {"axis": 1}),
        ("ReduceSum", ["x"], ["score"]),
    ]
    found = of((history, length, ITEM), nodes, one=np.int64(1))
    assert (found.inputs[1].low, found.inputs[1].limit) == (1, 13)


def test_an_id_that_scores_like_the_last_is_no_length(of):
    """Rows of a table may be equal, as those of a padding id and of one that was never trained are."""
    history = TensorSpec("history", "int64", (1, "N_h"), "user", limit=33)
    rows = table(33)
    rows[0] = rows[-1]
    found = of((history, ITEM), [("Gather", ["table", "history"], ["x"]), ("ReduceSum", ["x"], ["score"])], table=rows)
    assert found.inputs[0].low is None


def test_positions_say_how_long_a_history_may_be(of):
    history = TensorSpec("history", "float32", (1, "N_h", 2), "user")
    nodes = [
        ("Shape", ["history"], ["size"], {"start": 1, "end": 2}),
        ("Squeeze", ["size"], ["n"]),
        ("Range", ["zero", "n", "one"], ["places"]),
        ("Gather", ["positions", "places"], ["p"]),
        ("Add", ["history", "p"], ["x"]),
        ("ReduceSum", ["x"], ["score"]),
    ]
    weights = {"zero": np.int64(0), "one": np.int64(1), "positions": table(200, 2)}
    assert of((history, ITEM), nodes, **weights).max_history == 200
    assert of((history, ITEM), nodes, 50, **weights).max_history == 50


def test_a_table_of_positions_beyond_what_is_asked_ends_a_history_too(of):
    """One that is looked up by the length of the history alone; that of the items is none."""
    history = TensorSpec("history", "int64", (1, "N_h"), "user", limit=1500)
    nodes = [
        ("Shape", ["history"], ["size"], {"start": 1, "end": 2}),
        ("Slice", ["positions", "begin", "size"], ["p"]),
        ("Gather", ["items", "history"], ["x"]),
        ("Add", ["x", "p"], ["y"]),
        ("ReduceSum", ["y"], ["score"]),
    ]
    weights = {"begin": np.int64([0]), "positions": table(1200, 2), "items": table(1500, 2)}
    found = of((history, ITEM), nodes, **weights)
    assert position_tables(onnx.load(of.file)) == {"positions": (1200, 2)}
    assert (found.max_history, of((history, ITEM), nodes, 1100, **weights).max_history) == (1200, 1100)


@pytest.mark.parametrize(("shape", "axis"), [((1200, 2), 0), ((1, 1200, 2), 1)])
@pytest.mark.parametrize("beside", [0, 1, 3])
def test_what_stands_beside_the_history_takes_positions_too(of, shape, axis, beside):
    """A token of the model's own, or the target behind the history: fewer events have a position each."""
    history = TensorSpec("history", "float32", (1, "N_h", 2), "user")
    nodes = [
        ("Concat", ["beside", "history"], ["all"], {"axis": 1}),
        ("Shape", ["all"], ["size"], {"start": 1, "end": 2}),
        ("Slice", ["positions", "begin", "size", "axis"], ["p"]),
        ("Add", ["all", "p"], ["x"]),
        ("ReduceSum", ["x"], ["score"]),
    ]
    weights = {
        "beside": np.zeros((1, beside, 2), np.float32), "begin": np.int64([0]), "axis": np.int64([axis]),
        "positions": table(1200).reshape(-1)[:2400].reshape(shape),
    }  # fmt: skip
    assert of((history, ITEM), nodes, **weights).max_history == 1200 - beside
    assert of((history, ITEM), nodes, 1200, **weights).max_history == 1200 - beside
    assert of((history, ITEM), nodes, 1100, **weights).max_history == 1100


def test_a_history_that_takes_long_has_no_end_there(of, monkeypatch):
    history = TensorSpec("history", "float32", (1, "N_h", 2), "user")
    nodes = [
        ("Shape", ["history"], ["size"], {"start": 1, "end": 2}),
        ("Slice", ["positions", "begin", "size"], ["p"]),
        ("Add", ["history", "p"], ["x"]),
        ("ReduceSum", ["x"], ["score"]),
    ]
    run = asking.Child.run

    def slow(self, feeds, by="onnxruntime"):
        return asking._LONG if feeds["history"].shape[1] > 1000 else run(self, feeds, by)

    monkeypatch.setattr(asking.Child, "run", slow)
    assert of((history, ITEM), nodes, begin=np.int64([0]), positions=table(1200, 2)).max_history is None


def test_a_float_that_must_not_be_negative_is_found_and_named(of):
    specs = [TensorSpec(n, "float32", ("N_t",), "target") for n in ("price", "rest")]
    nodes = [("Add", ["price", "one"], ["more"]), ("Log", ["more"], ["log"]), ("Add", ["log", "rest"], ["score"])]
    found = of(specs, nodes, one=np.float32(1))
    assert [s.low for s in found.inputs] == [0, None]
    assert len(found.told) == 1
    assert found.told[0].startswith("price: scores are not finite where it is negative")
    assert of(specs, nodes, one=np.float32(10)).told == (), "a logarithm that is defined there"
    declared = dataclasses.replace(specs[0], low=2)
    assert of([declared, specs[1]], nodes, one=np.float32(-1)).inputs[0].low == 2


def test_a_mean_over_nothing_needs_an_event(of):
    history = TensorSpec("history", "float32", (1, "N_h", 2), "user")
    found = of((history, ITEM), [("ReduceMean", ["history", "axis"], ["score"])], axis=np.int64([1]))
    assert found.min_history == 1


def test_a_padded_history_without_an_event_is_no_range_of_ids(of):
    """A mean over the places that are not 0: a 0 among them is padding, zeros alone have no mean."""
    history = TensorSpec("history", "int64", (1, 4), "user", limit=33)
    nodes = [
        ("Cast", ["history"], ["ids"], {"to": TensorProto.FLOAT}),
        ("Sign", ["ids"], ["kept"]),
        ("ReduceSum", ["kept"], ["count"]),
        ("Gather", ["table", "history"], ["x"]),
        ("ReduceSum", ["x"], ["sum"]),
        ("Div", ["sum", "count"], ["score"]),
    ]
    found = of((history, ITEM), nodes, table=table(33))
    assert (found.inputs[0].low, found.inputs[0].blank) == (None, 0)


@pytest.mark.parametrize(
    ("dtype", "of_event", "blank"), [("float32", 1, 0), ("int64", 1, 0), ("int64", 0, 1), ("bool", 0, 1)]
)
def test_a_mask_that_leaves_nothing_has_no_score(of, dtype, of_event, blank):
    """A mean over the places that the mask leaves, whatever it holds there."""
    history, mask = TensorSpec("history", "float32", (1, "N_h"), "user"), TensorSpec("mask", dtype, (1, "N_h"), "user")
    nodes = [
        ("Cast", ["mask"], ["m"], {"to": TensorProto.FLOAT}),
        *([] if of_event else [("Sub", ["one", "m"], ["left"])]),
        ("Mul", ["history", "m" if of_event else "left"], ["x"]),
        ("ReduceSum", ["m" if of_event else "left"], ["count"]),
        ("ReduceSum", ["x"], ["sum"]),
        ("Div", ["sum", "count"], ["score"]),
    ]
    found = of((history, mask, ITEM), nodes, one=np.float32(1))
    assert [s.blank for s in found.inputs] == [None, blank, None]


def test_a_vector_of_the_users_that_is_normalized_has_no_blank(of):
    """Zeros alone have no norm, and are no history without events."""
    vector = TensorSpec("vector", "float32", (1, 8), "user")
    history = TensorSpec("history", "float32", (1, "N_h"), "user")
    nodes = [
        ("ReduceL2", ["vector"], ["norm"]),
        ("Div", ["vector", "norm"], ["unit"]),
        ("ReduceSum", ["unit"], ["profile"]),
        ("ReduceSum", ["history"], ["events"]),
        ("Add", ["profile", "events"], ["score"]),
    ]
    assert [s.blank for s in of((vector, history, ITEM), nodes).inputs] == [None, None, None]


def test_seconds_that_overflow_a_decay_have_no_range(of):
    """Far from the request's they do, and yet every second is one: no table ends there."""
    history = TensorSpec("seconds", "int64", (1, "N_h"), "user")
    now = TensorSpec("now", "int64", (1,), "request")
    nodes = [
        ("Sub", ["seconds", "now"], ["age"]),
        ("Cast", ["age"], ["x"], {"to": TensorProto.FLOAT}),
        ("Exp", ["x"], ["weight"]),
        ("ReduceSum", ["weight"], ["score"]),
    ]
    assert [s.limit for s in of((history, now, ITEM), nodes).inputs] == [None, None, 50]


def test_an_id_that_masks_may_be_the_last(of):
    history = TensorSpec("history", "int64", (1, 4), "user", limit=33)
    nodes = [
        ("Equal", ["history", "last"], ["is"]),
        ("Not", ["is"], ["real"]),
        ("Cast", ["real"], ["kept"], {"to": TensorProto.FLOAT}),
        ("ReduceSum", ["kept"], ["count"]),
        ("Div", ["one", "count"], ["rate"]),
        ("Mul", ["rate", "count"], ["score"]),
    ]
    (found, _) = of((history, ITEM), nodes, last=np.int64(32), one=np.float32(1)).inputs
    assert (found.limit, found.blank) == (33, 32)


def test_the_two_best_events_need_two(of):
    history = TensorSpec("history", "float32", (1, "N_h"), "user")
    nodes = [("TopK", ["history", "two"], ["best", "where"]), ("ReduceSum", ["best"], ["score"])]
    assert of((history, ITEM), nodes, two=np.int64([2])).min_history == 2


def test_a_run_that_kills_its_process_is_an_answer(of, monkeypatch):
    """As ONNX Runtime 1.31 does of a batched matrix product without rows."""
    history = TensorSpec("history", "float32", (1, "N_h", 2), "user")
    run = asking.Child.run

    def deadly(self, feeds, by):
        if feeds["history"].shape[1] == 0:
            self._process = self._process or self._start()
            self._process.kill()
        return run(self, feeds, by)

    monkeypatch.setattr(asking.Child, "run", deadly)
    found = of((history, ITEM), [("ReduceSum", ["history"], ["score"])])
    assert (found.min_history, found.max_history) == (1, None)


def test_a_model_that_takes_nothing_is_refused_with_what_was_said(of):
    history = TensorSpec("history", "float32", (1, "N_h", 2), "user")
    with pytest.raises(SplitError, match=r"fails on a request of 5 events and 3 targets, .*Reshape") as e:
        of((history, ITEM), [("Reshape", ["history", "shape"], ["score"])], shape=np.int64([7]))
    assert "\n" not in str(e.value)
    assert "onnxruntime_src" not in str(e.value)


def test_a_number_that_is_a_size_is_asked_small_before_large(of, monkeypatch):
    monkeypatch.setattr(asking, "_SECONDS", 10.0)
    rows = TensorSpec("rows", "int64", (1,), "user")
    history = TensorSpec("history", "float32", (1, "N_h", 2), "user")
    nodes = [  # rows x rows x rows numbers
        ("Concat", ["rows", "rows", "rows"], ["shape"], {"axis": 0}),
        ("Expand", ["number", "shape"], ["grid"]),
        ("ReduceSum", ["grid"], ["total"]),
        ("Cast", ["item"], ["item_float"], {"to": TensorProto.FLOAT}),
        ("ReduceSum", ["history"], ["events"]),
        ("Sum", ["item_float", "total", "events"], ["score"]),
    ]
    (found, *_) = of([rows, history, ITEM], nodes, number=np.float32(1)).inputs
    assert 64 <= found.limit < 1 << 20
