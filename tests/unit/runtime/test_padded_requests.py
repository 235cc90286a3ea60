"""Histories of a fixed length: requests bring events in any likely layout, and the model gets places."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from support.errors import one_line

from stca.errors import RequestError
from stca.load.inputs import Inputs
from stca.manifest import Manifest
from stca.runtime.request import Door
from stca.specs import EventInput, GraphSpec, Padding, StateSpec, TensorSpec

SPECS = (
    TensorSpec("items", "int64", (1, 5), "user", 100),
    TensorSpec("vectors", "float32", (1, 5, 2), "user"),
    TensorSpec("mask", "bool", (1, 5), "user"),
    TensorSpec("count", "int32", (1,), "user", 6),
    TensorSpec("hour", "int64", (1,), "request", 24),
    TensorSpec("item", "int64", ("N_t",), "target", 100),
    TensorSpec("price", "float32", ("N_t", 2), "target"),
)
HISTORY = Padding((EventInput("items", 1, 7), EventInput("vectors", 1), EventInput("mask", 1, 0, 1)), "right", "count")
VECTORS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
REST = {"hour": 3, "item": [1, 2], "price": [[1.0, 1.0], [2.0, 2.0]]}


def manifest(history: Padding = HISTORY, max_history: int | None = None, specs: Any = SPECS) -> Manifest:
    scores = (TensorSpec("scores", "float32", ("N_t",)),)
    user, rest = (tuple(s for s in specs if (s.scope == "user") is of) for of in (True, False))
    state = tuple(StateSpec(s.name, s.dtype, s.shape, 0, s.name) for s in user)
    copies = tuple(TensorSpec(s.name, s.dtype, s.shape) for s in user)
    return Manifest(
        model={"kind": "onnx"},
        weights="",
        precision="float32",
        attention=None,
        graphs={
            "request": GraphSpec("request.onnx", specs, scores),
            "user_encoder": GraphSpec("encoder.onnx", user, copies),
            "target_scorer": GraphSpec("scorer.onnx", (*rest, *copies), scores),
        },
        state=state,
        appendable=False,
        max_history=max_history,
        padding=(history,),
        split={},
        parity={},
        producer={},
    )


@pytest.mark.parametrize("events", [0, 2, 5, 9])
@pytest.mark.parametrize("limit", [None, 4])
def test_traffic_brings_as_many_events_as_are_asked_and_fit(events: int, limit: int | None) -> None:
    of, most = manifest(max_history=limit), limit or 5
    inputs = Inputs(of, 10, 0)
    sent = inputs.user(3, events)
    assert sent["items"].shape == (1, min(events, most))
    assert Door(of).admit({**REST, **sent}, "user", "request", "target")["count"] == min(events, most)
    assert inputs.unmet(0, (2, most)) == []
    (told,) = inputs.unmet(0, (2, 9))
    assert f"the model takes {most} events at most" in told


def admit(inputs: dict[str, Any], door: Door | None = None) -> dict[str, Any]:
    return (door or Door(manifest())).admit({**REST, **inputs}, "user", "request", "target")


def padded(side: str = "right") -> dict[str, Any]:
    none = [0.0, 0.0]
    if side == "left":
        return {
            "items": [[7, 7, 4, 5, 6]],
            "vectors": [[none, none, *VECTORS]],
            "mask": [[0, 0, 1, 1, 1]],
            "count": [3],
        }
    return {"items": [[4, 5, 6, 7, 7]], "vectors": [[*VECTORS, none, none]], "mask": [[1, 1, 1, 0, 0]], "count": [3]}


LAYOUTS: dict[str, dict[str, Any]] = {
    "lists of events": {"items": [4, 5, 6], "vectors": VECTORS},
    "with the axis of the batch": {"items": [[4, 5, 6]], "vectors": [VECTORS]},
    "one of each": {"items": [4, 5, 6], "vectors": [VECTORS]},
    "narrower integers": {"items": np.array([4, 5, 6], np.int32), "vectors": np.array(VECTORS, np.float64)},
    "the length as a number": {"items": [4, 5, 6], "vectors": VECTORS, "count": 3},
    "the mask of the events": {"items": [4, 5, 6], "vectors": VECTORS, "mask": [True] * 3, "count": [3]},
    "padded by the caller": {
        "items": [[4, 5, 6, 7, 7]],
        "vectors": [[*VECTORS, [0.0, 0.0], [0.0, 0.0]]],
        "mask": np.array([[1, 1, 1, 0, 0]], bool),
        "count": [3],
    },
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "padded by the caller"])
def test_events_are_padded_as_the_manifest_says(layout: str, side: Any) -> None:
    made = admit(LAYOUTS[layout], Door(manifest(dataclasses.replace(HISTORY, side=side))))
    for name, wanted in padded(side).items():
        np.testing.assert_array_equal(made[name], wanted)
        assert made[name].dtype == next(s.dtype for s in SPECS if s.name == name)


def test_what_the_caller_padded_stays_as_it_is() -> None:
    made = admit(LAYOUTS["padded by the caller"])
    assert {n: made[n].tolist() for n in padded()} == padded()


def test_no_events_are_all_padding() -> None:
    made = admit({"items": [], "vectors": []})
    assert made["items"].tolist() == [[7] * 5]
    assert made["vectors"].shape == (1, 5, 2)
    assert made["count"].tolist() == [0]
    assert not made["mask"].any()


def test_the_most_recent_events_are_kept_where_the_caller_allows_it() -> None:
    door = Door(manifest(), truncate=True)
    made = admit({"items": [1, 2, 4, 5, 6, 8], "vectors": np.ones((6, 2))}, door)
    assert made["items"].tolist() == [[2, 4, 5, 6, 8]]
    assert made["count"].tolist() == [5]
    shorter = admit({"items": [1, 4, 5], "vectors": np.ones((3, 2))}, Door(manifest(max_history=2), truncate=True))
    assert shorter["items"].tolist() == [[4, 5, 7, 7, 7]]
    assert shorter["count"].tolist() == [2]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"items": [1] * 6, "vectors": np.ones((6, 2))}, ("items", "6", "5", "truncate")),
        ({"items": [1, 2, 3], "vectors": np.ones((2, 2))}, ("vectors", "2", "items", "3")),
        ({"items": [1, 2, 100], "vectors": VECTORS}, ("items", "100", "[2]", "[0, 99]")),
        ({"items": [1.5, 2.5], "vectors": VECTORS[:2]}, ("items", "float64", "int64")),
        ({"items": [4, 5, 6], "vectors": [[1.0], [2.0], [3.0]]}, ("vectors", "[3, 1]", "[events, 2]")),
        ({"items": [[[4, 5]]], "vectors": VECTORS}, ("items", "[1, 1, 2]", "[events]")),
        ({"items": [[4, 5], [6, 7]], "vectors": VECTORS}, ("items", "[2, 2]", "[events]")),
        ({"vectors": VECTORS}, ("items", "missing")),
        ({"items": [4, 5, 6], "vectors": VECTORS, "count": 2}, ("count", "2", "3 events", "leave it out")),
        ({"items": [4, 5, 6], "vectors": VECTORS, "mask": [True]}, ("mask", "1", "items", "3")),
        ({"items": [[4, 7, 7, 7, 7]], "vectors": np.ones((5, 2))}, ("count", "missing", "items")),
        ({"items": [4], "vectors": VECTORS[:1], "price": [1.0]}, ("price", "[2, 1]", "[N_t, 2]")),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(inputs: dict[str, Any], words: tuple[str, ...]) -> None:
    with one_line(RequestError, *words):
        admit(inputs)


def test_a_fixed_length_is_exact_where_nothing_shows_that_padding_is_taken() -> None:
    specs = (SPECS[0], SPECS[5])
    door = Door(manifest(Padding((EventInput("items", 1),)), specs=specs))
    with one_line(RequestError, "items", "3 events", "exactly 5", "--pad"):
        door.admit({"items": [1, 2, 3], "item": [1]}, "user", "target")
    assert door.admit({"items": [1, 2, 3, 4, 5], "item": 1}, "user", "target")["items"].shape == (1, 5)


def test_a_free_length_is_limited_along_its_own_axis() -> None:
    specs = (TensorSpec("items", "int64", (1, "seq"), "user", 100), SPECS[5])
    history = Padding((EventInput("items", 1),))
    with one_line(RequestError, "items", "4 events", "limit is 3"):
        Door(manifest(history, 3, specs)).admit({"items": [1, 2, 3, 4]}, "user")
    made = Door(manifest(history, 3, specs), truncate=True).admit({"items": [[1, 2, 3, 4]]}, "user")
    assert made["items"].tolist() == [[2, 3, 4]]


def test_a_value_of_one_target_is_that_of_all() -> None:
    made = admit({**LAYOUTS["lists of events"], "price": [1.0, 2.0]})
    assert made["price"].tolist() == [[1.0, 2.0]] * 2
    one = admit({**LAYOUTS["lists of events"], "item": 9, "price": [1.0, 2.0]})
    assert one["item"].tolist() == [9]
    assert one["price"].tolist() == [[1.0, 2.0]]


def test_a_manifest_with_padding_reads_back() -> None:
    assert Manifest.from_json(manifest().to_json()).padding == (HISTORY,)
