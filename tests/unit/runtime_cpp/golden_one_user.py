"""Golden cases of a model of one user at a time, without offsets, whose states hold a row per event."""

from __future__ import annotations

from typing import Any

import make_golden
import numpy as np
from golden_changes import amend
from make_golden import WINDOW, append, case, refused, score, stats, tensor
from onnx import TensorProto, helper

from stca.specs import StateSpec, TensorSpec

INPUTS = (
    TensorSpec("clicks", "int64", ("N_h",), "user", 100),
    TensorSpec("age", "float32", (1,), "user"),
    TensorSpec("candidates", "float32", ("N_t",), "target"),
)
STATE = (StateSpec("squares", "float32", ("N_h",), 4), StateSpec("twice", "float32", (1,), 0))
NAME = "one_user"


def write_bundle() -> None:
    """Scores are candidate * the sum of the clicks' squares + twice the age."""
    n = helper.make_node
    encoder = [
        n("Cast", ["clicks"], ["clicked"], to=TensorProto.FLOAT),
        n("Mul", ["clicked", "clicked"], ["squares"]),
        n("Add", ["age", "age"], ["twice"]),
    ]

    def scorer(bias: float) -> Any:
        nodes = [
            n("ReduceSum", ["squares", "axis0"], ["sum"], keepdims=1),
            n("Mul", ["candidates", "sum"], ["products"]),
            n("Sum", ["products", "twice", "bias"], ["scores"]),
        ]
        return nodes, {"axis0": np.int64([0]), "bias": np.float32([bias])}

    scores = (TensorSpec("scores", "float32", ("N_t",)),)
    halves = ((encoder, {}), scorer)
    make_golden.write_bundle(NAME, INPUTS, STATE, scores, halves, 0.0, appendable=True, max_history=WINDOW)


def cases() -> list[Any]:
    """All of them."""
    age, rest = tensor("float32", [20.0]), {"candidates": tensor("float32", [1.0, 0.5])}

    def clicks(ids: list[int]) -> dict[str, Any]:
        return {"clicks": tensor("int64", ids, [len(ids)])}

    def scored(ids: list[int]) -> list[list[float]]:
        return [[c * sum(i * i for i in ids[-WINDOW:]) + 40] for c in (1.0, 0.5)]

    kept = score({**clicks([3, 4, 5]), "age": age, **rest}, scored([3, 4, 5]), "ann", "v1")
    return [
        case(
            "events behind one user's, without offsets",
            kept,
            append("ann", clicks([7, 1]), "v2", True, "v1"),
            score(rest, scored([3, 4, 5, 7, 1]), "ann", "v2"),
            append("ann", clicks([2, 8, 9]), "v3", True),
            score(rest, scored([3, 4, 5, 7, 1, 2, 8, 9]), "ann", "v3"),
            amend("ann", clicks([6]), "v4", -1, True, "v3"),
            score(rest, scored([3, 4, 5, 7, 1, 2, 8, 6]), "ann", "v4"),
            score(rest, refused("ann", "v1", "send the user inputs"), "ann", "v1"),
            stats(hits=3, misses=1, appends=3, users=1, state_bytes=WINDOW * 4 + 4),
            bundle=NAME,
        ),
        case(
            "an event of one user has no age",
            kept,
            append("ann", {**clicks([7]), "age": age}, "v2", refused("age", "no part of an event")),
            append("ann", clicks([100]), "v2", refused("clicks", "100", "[0, 99]")),
            score(rest, scored([3, 4, 5]), "ann", "v1"),
            bundle=NAME,
        ),
    ]
