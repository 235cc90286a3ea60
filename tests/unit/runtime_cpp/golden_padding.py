"""The golden bundles whose histories are padded, and requests to them in the layouts that people send."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from golden_changes import amend
from make_golden import append, case, refused, score, tensor, write_bundle
from onnx import TensorProto, helper

from stca.specs import EventInput, Padding, StateSpec, TensorSpec

PLACES = 5
INPUTS = (
    TensorSpec("items", "int64", (1, PLACES), "user", 100),
    TensorSpec("vectors", "float32", (1, PLACES, 2), "user"),
    TensorSpec("mask", "float32", (1, PLACES), "user"),
    TensorSpec("count", "int32", (1,), "user", PLACES + 1),
    TensorSpec("item", "int64", ("N_t",), "target", 100),
    TensorSpec("price", "float32", ("N_t", 2), "target"),
)
# Of a model that has no score for a history without events.
BLANKS = {"items": 7, "mask": 0}
EVENTS = (EventInput("items", 1, 7), EventInput("vectors", 1, -1), EventInput("mask", 1, 0, 1))
ITEMS, VECTORS = [4, 5, 6], [[1.0, 2.0], [3.0, 4.0], [0.5, 0.25]]
TARGETS = {"item": tensor("int64", [1, 2]), "price": tensor("float32", [[0.5, 0], [1, 2]])}


def write_bundles() -> None:
    state = (StateSpec("sum", "float32", (1,), 0),)
    outputs = (TensorSpec("scores", "float32", ("N_t", 1)),)
    needy = tuple(dataclasses.replace(s, blank=BLANKS.get(s.name)) for s in INPUTS)
    for name, inputs, side, lengths in (
        ("padded_right", INPUTS, "right", "count"),
        ("padded_left", INPUTS, "left", "count"),
        ("padded_not_blank", needy, "right", "count"),
        ("exact", INPUTS, None, None),
    ):
        padding = (Padding(EVENTS, side, lengths),)  # type: ignore[arg-type]
        write_bundle(name, inputs, state, outputs, _halves(), 0.0, appendable=False, max_history=None, padding=padding)


def _halves() -> Any:
    """Every place counts for itself: the sum of place * (item * mask + vector), and 1000 times the length."""
    n = helper.make_node
    encoder = [
        n("Cast", ["items"], ["numbers"], to=TensorProto.FLOAT),
        n("Mul", ["numbers", "mask"], ["real"]),
        n("ReduceSum", ["vectors", "last"], ["of_vectors"], keepdims=0),
        n("Add", ["real", "of_vectors"], ["both"]),
        n("Mul", ["both", "places"], ["placed"]),
        n("ReduceSum", ["placed", "one"], ["in_all"], keepdims=0),
        n("Cast", ["count"], ["length"], to=TensorProto.FLOAT),
        n("Mul", ["length", "thousand"], ["thousands"]),
        n("Add", ["in_all", "thousands"], ["sum"]),
    ]
    constants = {
        "last": np.int64([2]), "one": np.int64([1]), "thousand": np.float32(1000),
        "places": np.arange(1, PLACES + 1, dtype=np.float32),
    }  # fmt: skip

    def scorer(bias: float) -> Any:
        nodes = [
            n("Cast", ["item"], ["number"], to=TensorProto.FLOAT),
            n("ReduceSum", ["price", "one"], ["prices"], keepdims=0),
            n("Sum", ["number", "prices", "sum", "bias"], ["flat"]),
            n("Unsqueeze", ["flat", "one"], ["scores"]),
        ]
        return nodes, {"one": np.int64([1]), "bias": np.float32([bias])}

    return (encoder, constants), scorer


def expected(items: Any, vectors: Any, side: str, targets: Any = ((1, 0.5), (2, 3.0))) -> list[Any]:
    """What a request must score, from its events alone."""
    kept, missing = len(items), PLACES - len(items)
    values = [i + sum(v) for i, v in zip(items, vectors, strict=True)]
    values = [-2.0] * missing + values if side == "left" else values + [-2.0] * missing
    user = sum(place * x for place, x in enumerate(values, start=1)) + 1000 * kept
    return [[user + item + price] for item, price in targets]


def request(items: Any = ITEMS, vectors: Any = VECTORS, /, **others: Any) -> dict[str, Any]:
    """The events without the axis of 1, and two targets; an input of None is left out."""
    given = {"items": tensor("int64", items), "vectors": tensor("float32", vectors), **TARGETS, **others}
    return {n: t for n, t in given.items() if t is not None}


def cases() -> list[Any]:
    return [*_layouts(), *_refusals(), *_blanks()]


def _layouts() -> list[Any]:
    def both(name: str, inputs: Any, wanted: Any = None, truncate: bool = False) -> list[Any]:
        return [
            case(
                f"{name}, padded {side}",
                score(inputs, (wanted or (lambda side: expected(ITEMS, VECTORS, side)))(side)),
                bundle=f"padded_{side}",
                truncate=truncate,
            )
            for side in ("right", "left")
        ]

    more, vectors = [9, 8, *ITEMS, 1], [[9.0, 9.0], [1.0, 0.0], *VECTORS, [0.0, 2.0]]
    ones = tensor("float32", [1.0, 1.0, 1.0])
    full = request(
        items=tensor("int64", [[*ITEMS, 7, 7]]),
        vectors=tensor("float32", [[*VECTORS, [-1.0, -1.0], [-1.0, -1.0]]]),
        mask=tensor("float32", [[1, 1, 1, 0, 0]]),
        count=tensor("int32", [3]),
    )
    one = {"item": tensor("int64", 9), "price": tensor("float32", [1.0, 2.0])}
    return [
        *both("events alone", request()),
        *both(
            "events behind an axis of 1", request(items=tensor("int64", [ITEMS]), vectors=tensor("float32", [VECTORS]))
        ),
        *both("narrower integers", request(items=tensor("int32", ITEMS))),
        *both("wider floats", request(vectors=tensor("float64", VECTORS))),
        *both("the mask of the events", request(mask=ones)),
        *both("the length as a number", request(count=tensor("int32", 3))),
        *both("no events", request([], [], vectors=tensor("float32", [])), lambda side: expected([], [], side)),
        *both("all places taken", request(more[1:], vectors[1:]), lambda side: expected(more[1:], vectors[1:], side)),
        *both("too many, truncated", request(more, vectors), lambda side: expected(more[1:], vectors[1:], side), True),
        *both("one target without its axis", request(**one), lambda side: expected(ITEMS, VECTORS, side, [(9, 3)])),
        *both(
            "one value for all targets",
            request(price=tensor("float32", [1.0, 2.0])),
            lambda side: expected(ITEMS, VECTORS, side, [(1, 3), (2, 3)]),
        ),
        case("padded by the caller", score(full, expected(ITEMS, VECTORS, "right")), bundle="padded_right"),
        case(
            "a kept state needs no history",
            score(request(), expected(ITEMS, VECTORS, "right"), "ann", "v1"),
            score(TARGETS, expected(ITEMS, VECTORS, "right"), "ann", "v1"),
            bundle="padded_right",
        ),
    ]


def _refusals() -> list[Any]:
    bad = [
        ("too many events", request([1] * 6, [[0.0, 0.0]] * 6), "items", "6 events", "limit is 5", "truncate"),
        (
            "vectors of fewer events",
            request(vectors=tensor("float32", VECTORS[:2])),
            "vectors",
            "2 events",
            "items has 3",
        ),
        ("a bad item among events", request([1, 2, 100]), "items", "100", "[2]", "[0, 99]"),
        ("items of floats", request(items=tensor("float32", [1.0, 2.0, 3.0])), "items", "float32", "int64"),
        ("narrow vectors", request(vectors=tensor("float32", [[1.0]] * 3)), "vectors", "[3, 1]", "[events, 2]"),
        ("two users", request(items=tensor("int64", [ITEMS, ITEMS])), "items", "[2, 3]", "[events]"),
        ("no items", request(items=None), "items", "missing"),
        ("another length", request(count=tensor("int32", [2])), "count", "says 2", "3 events", "leave it out"),
        ("a shorter mask", request(mask=tensor("float32", [1.0])), "mask", "1 events", "items has 3"),
        ("padding without its length", request([4, 7, 7, 7, 7], [[0.0, 0.0]] * 5), "count", "missing", "items"),
        ("prices of one size too few", request(price=tensor("float32", [1.0])), "price", "[2, 1]", "[N_t, 2]"),
    ]
    return [
        *(case(f"padded: {name}", score(inputs, refused(*says)), bundle="padded_right") for name, inputs, *says in bad),
        case(
            "padded: no event can be appended",
            append("ann", {"items": tensor("int64", [1])}, "v2", refused("padded to 5 events", "whole history")),
            bundle="padded_right",
        ),
        case(
            "padded: no event can be amended",
            amend("ann", {"items": tensor("int64", [1])}, "v2", -1, refused("so none can be amended", "whole history")),
            bundle="padded_right",
        ),
        case(
            "an exact length",
            score(request(count=tensor("int32", [3])), refused("items", "3 events", "exactly 5", "--pad")),
            bundle="exact",
        ),
    ]


def _blanks() -> list[Any]:
    none = tensor("float32", [0.0, 0.0, 0.0])
    said = ("nothing but", "no finite score", "at least one other")
    return [
        case(f"blank: {name}", score(inputs, outcome), bundle="padded_not_blank")
        for name, inputs, outcome in (
            ("no events", request([], [], vectors=tensor("float32", [])), refused("items", "7", *said)),
            ("ids of none alone", request([7, 7, 7], count=tensor("int32", [3])), refused("items", "7", *said)),
            ("a mask of all", request(mask=none), refused("mask", "0", *said)),
            ("events", request(), expected(ITEMS, VECTORS, "right")),
            ("one event", request([4], [[1.0, 2.0]]), expected([4], [[1.0, 2.0]], "right")),
        )
    ]
