"""The door: every wrong request is refused in one line that names the input, the value and the limit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from support.errors import nothing_or_one_line, one_line

from stca import probe
from stca.errors import RequestError
from stca.manifest import Manifest
from stca.runtime import Request, RequestBatch
from stca.runtime.request import Door
from stca.specs import GraphSpec, TensorSpec

SPECS = (
    TensorSpec("history_item", "int64", ("N_h",), "user", 9),
    TensorSpec("history_time", "int64", ("N_h",), "user"),
    TensorSpec("history_vector", "float32", ("N_h", 2), "user"),
    TensorSpec("history_offsets", "int32", ("B_plus_1",), "user"),
    TensorSpec("user_segment", "int64", ("B",), "user", 5),
    TensorSpec("request_device", "int64", ("B",), "request", 3),
    TensorSpec("target_item", "int64", ("N_t",), "target", 9),
    TensorSpec("target_price", "float32", ("N_t",), "target"),
    TensorSpec("target_offsets", "int32", ("B_plus_1",), "target"),
)
MAX_HISTORY = 6
ALL = ("user", "request", "target")


def manifest(specs=SPECS, max_history=MAX_HISTORY) -> Manifest:
    graph = GraphSpec("request.onnx", specs, (TensorSpec("scores", "float32", ("N_t", 1)),))
    return Manifest(
        model={"kind": "onnx"},
        weights="",
        precision="float32",
        attention=None,
        graphs=dict.fromkeys(("request", "user_encoder", "target_scorer"), graph),
        state=(),
        appendable=False,
        max_history=max_history,
        split={},
        parity={},
        producer={},
    )


DOOR = Door(manifest())


def single(tokens=4, targets=3, seed=0) -> dict[str, Any]:
    return probe.single(SPECS, tokens, targets, np.random.default_rng(seed))


def packed(*sizes) -> dict[str, Any]:
    return probe.pack(SPECS, [single(n, m, i) for i, (n, m) in enumerate(sizes)])


def refused(inputs, *words):
    with one_line(RequestError, *words):
        DOOR.admit(inputs, *ALL)


# --- one request ------------------------------------------------------------------------------------------------------


def test_what_passes_comes_out_as_the_graphs_want_it():
    given_lists = {n: x.tolist() for n, x in single().items()}
    out = DOOR.admit(given_lists, *ALL)
    assert out.keys() == {s.name for s in SPECS}
    for spec in SPECS:
        assert out[spec.name].dtype == np.dtype(spec.dtype)
        assert out[spec.name].flags.c_contiguous
    assert out["history_offsets"].tolist() == [0, 4]
    assert out["target_offsets"].tolist() == [0, 3]


@pytest.mark.parametrize("tokens", [0, 1, MAX_HISTORY])
@pytest.mark.parametrize("targets", [0, 1, 50])
def test_any_size(tokens, targets):
    out = DOOR.admit(single(tokens, targets), *ALL)
    assert out["history_offsets"].tolist() == [0, tokens]
    assert out["target_offsets"].tolist() == [0, targets]


def test_empty_lists_have_any_dtype():
    empty = {"history_item": [], "history_time": [], "history_vector": [], "target_item": []}
    out = DOOR.admit({**single(0, 0), **empty, "target_price": []}, *ALL)
    assert out["history_item"].dtype == np.int64
    assert out["history_vector"].shape == (0, 2)


def test_what_there_is_once_may_come_without_its_axis():
    for value in (2, [2], np.int32(2), np.array(2)):
        assert DOOR.admit({**single(), "user_segment": value}, *ALL)["user_segment"].tolist() == [2]


def test_other_integer_and_float_widths_are_converted():
    inputs = single()
    for dtype in (np.int8, np.int32, np.uint8, np.uint64):
        out = DOOR.admit({**inputs, "history_item": inputs["history_item"].astype(dtype)}, *ALL)
        assert out["history_item"].dtype == np.int64
    for dtype in (np.float16, np.float64):
        out = DOOR.admit({**inputs, "target_price": inputs["target_price"].astype(dtype)}, *ALL)
        assert out["target_price"].dtype == np.float32


def test_strided_and_foreign_endian_views():
    inputs = single()
    expected = DOOR.admit(inputs, *ALL)
    item = inputs["history_item"]
    for view in (np.repeat(item, 2)[::2], item[::-1][::-1], item.astype(">i8"), np.asfortranarray(item)):
        out = DOOR.admit({**inputs, "history_item": view}, *ALL)
        assert np.array_equal(out["history_item"], expected["history_item"])
        assert out["history_item"].dtype == np.dtype("int64")


@pytest.mark.parametrize("name", [s.name for s in SPECS if not s.name.endswith("offsets")])
def test_a_missing_input(name):
    refused({n: x for n, x in single().items() if n != name}, name, "missing")


def test_an_unknown_input():
    refused({**single(), "history_itme": [1]}, "history_itme", "history_item")
    refused({**single(), 3: [1]}, "3")


@pytest.mark.parametrize("name", ["history_offsets", "target_offsets"])
def test_offsets_in_a_single_request(name):
    refused({**single(), name: [0, 4]}, name, "leave it out")


WRONG = [
    ("history_item", [1.0, 2, 3, 4], ("float64", "int64")),
    ("history_item", ["1", "2", "3", "4"], ("holds '1' at [0]", "int64")),
    ("history_item", None, ("is None", "int64")),
    ("history_item", np.array([None]), ("holds None", "int64")),
    ("history_item", np.array(["1", "2", "3", "4"]), ("holds text", "int64")),
    ("history_item", [True, False, True, True], ("bool", "int64")),
    ("history_item", [1, None, 3, 4], ("holds None at [1]", "int64")),
    ("history_item", [1, 2**70, 3, 4], (f"holds {2**70} at [1]", "int64")),
    ("history_item", np.zeros(4, "m8[s]"), ("spans of time", "int64")),
    ("history_item", np.zeros(4, complex), ("complex128",)),
    ("history_item", {1: 2}, ("int64",)),
    ("history_item", [[1, 2], [3]], ("different lengths",)),
    ("history_item", [[1, 2, 3, 4]], ("[1, 4]", "[N_h]")),
    ("history_item", 3, ("[]", "[N_h]")),
    ("history_item", [1, 2, 9, 4], ("9", "[2]", "[0, 8]")),
    ("history_item", [1, 2, 3, -1], ("-1", "[3]", "[0, 8]")),
    ("history_time", np.array([1, 2, 3, 2**64 - 1], np.uint64), (str(2**64 - 1), "[3]", str(2**63 - 1))),
    ("history_time", [1, 2, 3], ("[3], so N_h = 3, but history_item has N_h = 4; send as many of both",)),
    ("history_time", [1, 2, 3, 4, 5], ("[5]", "4", "history_item")),
    ("history_vector", np.zeros((4, 3), "f"), ("[4, 3]", "[N_h, 2]")),
    ("history_vector", np.zeros((3, 2), "f"), ("[3, 2]", "4")),
    ("history_vector", np.full((4, 2), np.nan), ("nan", "[0, 0]", "finite")),
    ("history_vector", [[0, 0], [0, 0], [0, 0], [0, np.inf]], ("inf", "[3, 1]", "finite")),
    ("history_vector", np.zeros((4, 2), int), ("int64", "float32")),
    ("history_vector", np.full((4, 2), 1e300), ("1e+300", "float32")),  # finite, and infinite as float32
    ("user_segment", [1, 2], ("[2]", "1")),
    ("user_segment", [], ("[0]", "1")),
    ("user_segment", 5, ("5", "[0, 4]")),
    ("user_segment", 1.0, ("float64", "int64")),
    ("request_device", -1, ("-1", "[0, 2]")),
    ("target_item", [1, 2, 100], ("100", "[2]", "[0, 8]")),
    ("target_price", [1.0, np.nan, 2.0], ("nan", "[1]", "finite")),
    ("target_price", [1.0, 2.0], ("[2]", "3", "target_item")),
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(WRONG)])
def test_a_wrong_input_is_named_with_its_value_and_the_limit(name, value, words):
    refused({**single(), name: value}, f"{name}:", *words)


def test_a_masked_array_is_not_taken_at_its_hidden_values():
    item = np.ma.masked_array([1, 2, 3, 4], mask=[False, False, True, False])
    refused({**single(), "history_item": item}, "history_item", "masked")


def test_a_history_over_the_limit():
    refused(single(MAX_HISTORY + 1), "history_item", "7 tokens", "6", "truncate=True")


def test_truncation_keeps_the_most_recent():
    long = single(MAX_HISTORY + 4)
    out = Door(manifest(), truncate=True).admit(long, *ALL)
    for name in ("history_item", "history_time", "history_vector"):
        assert np.array_equal(out[name], long[name][4:].astype(out[name].dtype))
        assert out[name].flags.c_contiguous
    assert out["history_offsets"].tolist() == [0, MAX_HISTORY]
    assert out["user_segment"].tolist() == long["user_segment"].tolist()


def test_truncation_does_not_excuse_bad_values():
    """What is cut off is checked too: a caller who sends wrong ids wants to know."""
    long = single(MAX_HISTORY + 4)
    long["history_item"][0] = 9
    with one_line(RequestError, "history_item"):
        Door(manifest(), truncate=True).admit(long, *ALL)


def test_no_limit():
    assert Door(manifest(max_history=None)).admit(single(1000), *ALL)["history_offsets"].tolist() == [0, 1000]


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-2, 10) | st.floats(), max_size=5),
    st.lists(st.lists(st.integers(-2, 10), max_size=3), max_size=5),
    st.dictionaries(st.integers(), st.integers(), max_size=2),
    st.binary(max_size=4),
)


@given(st.sampled_from([s.name for s in SPECS]), values)
def test_anything_in_any_input(name, value):
    with nothing_or_one_line(RequestError):
        out = DOOR.admit({**single(), name: value}, *ALL)
        given = np.asarray(value).ravel()
        wanted = given.astype(np.float32) if out[name].dtype == np.float32 else given  # rounded, as any float32 is
        if np.ndim(value) == 0 and name.startswith("target"):
            wanted = np.repeat(wanted, 3)  # one value for all targets
        assert wanted.tolist() == out[name].ravel().tolist()


def test_a_range_that_takes_no_memory_is_not_written_out():
    with one_line(RequestError, "history_item", "more than"):
        DOOR.admit({**single(), "history_item": range(10**12)}, *ALL)


@given(st.sampled_from([s.name for s in SPECS]), values)
def test_anything_in_any_input_of_a_batch(name, value):
    batch = RequestBatch({**packed((2, 1), (3, 2)), name: value})
    with nothing_or_one_line(RequestError):
        for request in DOOR.unpack(batch):
            DOOR.admit(request.inputs, *ALL)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_cut_into_its_requests():
    sizes = ((4, 3), (0, 2), (2, 0), (6, 1))
    requests = DOOR.unpack(RequestBatch(packed(*sizes), users=("a", None, "c", 4), versions=(1, 2, 3, None)))
    assert [(r.user, r.version) for r in requests] == [("a", 1), (None, None), ("c", 3), (4, None)]
    for i, (request, (tokens, targets)) in enumerate(zip(requests, sizes, strict=True)):
        expected = DOOR.admit(single(tokens, targets, i), *ALL)
        got = DOOR.admit(request.inputs, *ALL)
        assert got.keys() == expected.keys()
        for name, x in got.items():
            assert np.array_equal(x, expected[name]), name


def test_an_empty_batch():
    none = {n: x[:1] if n.endswith("offsets") else x[:0] for n, x in packed((1, 1)).items()}
    assert DOOR.unpack(RequestBatch(none)) == []


@pytest.mark.parametrize("name", ["history_offsets", "target_offsets"])
@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([1, 2, 6], ("starts at 1", "0")),
        ([-1, 2, 6], ("starts at -1",)),
        ([0, 7, 6], ("backwards at 2", "7", "6")),
        ([0, -1, 6], ("backwards at 1", "-1")),
        ([0, 2, 7], ("7",)),
        ([0, 2, 5], ("5",)),
        ([0, 6], ("length",)),
        ([0, 1, 2, 6], ("length",)),
        ([], ("at least one",)),
        ([0.0, 2.0, 6.0], ("float64",)),
        ([[0, 2, 6]], ("[1, 3]",)),
        (6, ("[]",)),
        (None, ()),
        ([True, True, True], ("bool",)),
        ([[0], [2, 6]], ()),
        (np.array([0, 2**63, 6], np.uint64), ("backwards",)),
        (["0", "2", "6"], ()),
    ],
    ids=str,
)
def test_wrong_offsets(name, offsets, words):
    batch = packed((2, 2), (4, 4))
    with one_line(RequestError, name, *words):
        DOOR.unpack(RequestBatch({**batch, name: offsets}))


@pytest.mark.parametrize("name", [s.name for s in SPECS])
def test_a_missing_input_of_a_batch(name):
    batch = {n: x for n, x in packed((2, 2), (4, 4)).items() if n != name}
    with one_line(RequestError, name, "missing"):
        for request in DOOR.unpack(RequestBatch(batch)):
            DOOR.admit(request.inputs, *ALL)


@pytest.mark.parametrize("name", [s.name for s in SPECS if not s.name.endswith("offsets")])
def test_rows_and_offsets_that_disagree(name):
    batch = packed((2, 2), (4, 4))
    for rows in (batch[name][:-1], np.concatenate([batch[name], batch[name]])):
        with one_line(RequestError, name, "offsets"):
            DOOR.unpack(RequestBatch({**batch, name: rows}))


def test_an_unknown_input_of_a_batch():
    with one_line(RequestError, "nonsense"):
        for request in DOOR.unpack(RequestBatch({**packed((2, 2)), "nonsense": [1]})):
            DOOR.admit(request.inputs, *ALL)


@pytest.mark.parametrize(
    "labels",
    [{"users": ("a",)}, {"users": (1, 2, 3)}, {"versions": (1,)}, {"users": (1, 2), "versions": (1,)}],
    ids=str,
)
def test_labels_for_another_number_of_requests(labels):
    with one_line(RequestError, *list(labels)[-1:], "2 requests"):
        DOOR.unpack(RequestBatch(packed((2, 2), (4, 4)), **labels))


def test_labels_as_an_array():
    requests = DOOR.unpack(RequestBatch(packed((2, 2), (4, 4)), users=np.array([7, 8]), versions=np.array([0, 1])))
    assert [(r.user, r.version) for r in requests] == [(7, 0), (8, 1)]


# --- models without offsets -------------------------------------------------------------------------------------------

PLAIN = (
    TensorSpec("u", "float32", ("N_h", 3), "user"),
    TensorSpec("profile", "float32", (1, 5), "user"),
    TensorSpec("t", "float32", ("N_t", 3), "target"),
)


def test_a_model_without_offsets_takes_one_request_at_a_time():
    door = Door(manifest(PLAIN, None))
    inputs = probe.single(PLAIN, 4, 2, np.random.default_rng(0))
    assert door.admit(inputs, *ALL).keys() == {"u", "profile", "t"}
    with one_line(RequestError, "one Request at a time"):
        door.unpack(RequestBatch(inputs))
    with one_line(RequestError, "profile", "[2, 5]", "[1, 5]"):
        door.admit({**inputs, "profile": np.zeros((2, 5), "f")}, *ALL)


def test_a_ragged_model_with_an_input_that_cannot_be_packed():
    door = Door(manifest((*SPECS, TensorSpec("page", "float32", (4,), "request"))))
    with one_line(RequestError, "one Request at a time"):
        door.unpack(RequestBatch({**packed((2, 2)), "page": np.zeros(4, "f")}))
    with one_line(RequestError, "user_segment", "[2]"):
        door.admit({**single(), "page": np.zeros(4, "f"), "user_segment": [1, 2]}, *ALL)
    assert door.admit({**single(), "page": np.zeros(4, "f")}, *ALL)["history_offsets"].tolist() == [0, 4]


def test_a_model_whose_targets_have_no_offsets_takes_one_request_at_a_time():
    door = Door(manifest(tuple(s for s in SPECS if s.name != "target_offsets")))
    with one_line(RequestError, "one Request at a time"):
        door.unpack(RequestBatch(packed((2, 2))))
    assert door.admit(single(), *ALL)["history_offsets"].tolist() == [0, 4]


# --- versions ---------------------------------------------------------------------------------------------------------


def test_the_digest_sees_every_user_input_and_nothing_else():
    base = single()
    digest = DOOR.digest(DOOR.admit(base, *ALL))
    assert digest == DOOR.digest(DOOR.admit({n: x.copy() for n, x in base.items()}, *ALL))
    for name, x in base.items():
        changed = {**base, name: np.where(x == x.flat[0], x.flat[0] + 1 if x.flat[0] < 2 else 0, x).astype(x.dtype)}
        other = DOOR.digest(DOOR.admit(changed, *ALL))
        assert (other != digest) == (DOOR.inputs[name].scope == "user"), name


def test_the_digest_tells_histories_apart_that_share_bytes():
    """Rows moved from one input's end to the next one's beginning."""
    a = DOOR.admit({**single(2), "history_item": [0, 1], "history_time": [2, 3]}, *ALL)
    b = DOOR.admit({**single(2), "history_item": [0, 1], "history_time": [2, 4]}, *ALL)
    c = DOOR.admit({**single(0), "history_item": [], "history_time": []}, *ALL)
    assert len({DOOR.digest(x) for x in (a, b, c)}) == 3


def test_requests_are_frozen():
    with pytest.raises(AttributeError):
        Request({}).user = "x"


def test_a_history_of_another_shape_is_another_history():
    """The same bytes in other rows: two events of one number are not one event of two."""
    rows = np.arange(6, dtype=np.float32)
    digests = {DOOR.digest({n: rows.reshape(shape) for n in DOOR.names("user")}) for shape in ((6,), (2, 3), (3, 2))}
    assert len(digests) == 3


def test_an_id_that_its_dtype_does_not_hold_is_refused_whatever_the_limit():
    small = TensorSpec("target_item", "int8", ("N_t",), "target", limit=1000)
    door = Door(manifest((small,)))
    assert door.admit({"target_item": [127]}, *ALL)["target_item"].tolist() == [127]
    with one_line(RequestError, "target_item", "300", "[0, 127]"):
        door.admit({"target_item": [300]}, *ALL)


@pytest.mark.parametrize(
    ("dtype", "low", "limit", "value", "said"),
    [
        ("int32", -(2**31), 51, 60, "holds 60 at [0]; it must be at most 50"),
        ("uint8", None, 51, 60, "holds 60 at [0]; it must be at most 50"),
        ("int64", 1, None, 0, "holds 0 at [0]; it must be at least 1"),
        ("int32", -1, None, -2, "holds -2 at [0]; it must be at least -1"),
        # Of the side that is the dtype's own, it is the dtype that is told.
        ("int32", -1, None, 2**31, f"it must be in [-1, {2**31 - 1}]"),
        ("uint8", None, 51, -1, "it must be in [0, 50]"),
        ("int8", None, None, 300, "it must be in [-128, 127]"),
        ("int64", 1, 51, 60, "it must be in [1, 50]"),
    ],
)
def test_a_value_out_of_range_is_told_the_limit_that_it_breaks(dtype, low, limit, value, said):
    door = Door(manifest((TensorSpec("item", dtype, ("N_t",), "target", limit, low=low),)))
    with one_line(RequestError, "item: ", said):
        door.admit({"item": [value]}, *ALL)


@pytest.mark.parametrize("shape", [(1,), (), ("B",), (1, 2)])
def test_a_value_for_each_target_of_an_input_that_requests_have_once_is_told_what_to_do(shape):
    specs = (TensorSpec("device", "int64", shape, "request"), TensorSpec("item", "int64", ("N_t",), "target"))
    value = np.zeros((3, 2) if len(shape) == 2 else 3, np.int64)
    offsets = TensorSpec("target_offsets", "int32", ("B_plus_1",), "target")
    with one_line(RequestError, "device: has shape [3", "one value per request", "a target input"):
        Door(manifest((*specs, offsets))).admit({"device": value, "item": [1, 2, 3]}, *ALL)


@pytest.mark.parametrize(("scope", "shape", "value"), [("request", (2,), 3), ("user", (1,), 3), ("target", (1,), 3)])
def test_other_wrong_shapes_are_not_told_so(scope, shape, value):
    door = Door(manifest((TensorSpec("x", "int64", shape, scope),)))
    with pytest.raises(RequestError, match=r"x: has shape \[3\], expected \[\d\]$"):
        door.admit({"x": [0] * value}, *ALL)


def test_rows_of_several_users_are_told_that_one_is_wanted():
    door = Door(manifest((TensorSpec("x", "int64", (1, 2), "user"),)))
    with one_line(RequestError, "x: has shape [3, 2]", "one row for the user"):
        door.admit({"x": np.zeros((3, 2), np.int64)}, *ALL)


@pytest.mark.parametrize(("sent", "found"), [([1, 2], [1.0, 2.0]), (3, [3.0]), ((1, 0.5), [1.0, 0.5])])
def test_numbers_of_python_have_no_dtype_of_their_own(sent, found):
    door = Door(manifest((TensorSpec("x", "float32", ("N_t",), "target"),)))
    made = door.admit({"x": sent}, *ALL)["x"]
    assert (made.dtype, made.tolist()) == (np.float32, found)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ([1, 2**24 + 1], ("16777217 at [1]", "float32 does not hold exactly")),
        (np.array([1, 2]), ("has dtype int64",)),
        ([np.int64(1)], ("has dtype int64",)),
        ([True], ("has dtype bool",)),
    ],
)
def test_arrays_keep_their_dtype_and_no_number_is_rounded(sent, words):
    door = Door(manifest((TensorSpec("x", "float32", ("N_t",), "target"),)))
    with one_line(RequestError, "x: ", *words):
        door.admit({"x": sent}, *ALL)


@pytest.mark.parametrize("sent", [[1.0, -0.5], np.array([1, -0.5], np.float32), np.array([1, -0.5])])
def test_a_float_below_the_least_there_is(sent):
    door = Door(manifest((TensorSpec("price", "float32", ("N_t",), "target", low=0),)))
    with one_line(RequestError, "price: holds -0.5 at [1]; it must be at least 0"):
        door.admit({"price": sent}, *ALL)
    assert door.admit({"price": np.zeros(2, np.float32)}, *ALL)["price"].tolist() == [0, 0]


def test_a_batch_of_more_requests_than_anyone_has_is_refused_at_once():
    inputs = {n: x[:0] for n, x in packed((1, 1)).items()}
    many = np.broadcast_to(np.int64(0), (10**6,))
    with one_line(RequestError, "offsets", "999999 requests"):
        DOOR.unpack(RequestBatch({**inputs, "history_offsets": many, "target_offsets": many}))
