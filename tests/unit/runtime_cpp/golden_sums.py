"""Golden cases of a bundle whose states hold a sum over events; `make_golden.py` writes them."""

from __future__ import annotations

from typing import Any

import make_golden
import numpy as np
from golden_changes import amend
from make_golden import WINDOW, append, case, refused, score, stats, tensor
from onnx import TensorProto, helper

from stca.specs import SUM, StateSpec, TensorSpec

CLICKS = TensorSpec("clicks", "int64", ("N_h",), "user", 100)
RECENT = TensorSpec("recent", "int64", (2,), "user", 100)
INPUTS = (
    CLICKS,
    RECENT,
    TensorSpec("hour", "int64", (1,), "request", 24),
    TensorSpec("candidates", "float32", ("N_t",), "target"),
)
# What follows from the sum is kept too; the scorer reads that alone, and each click.
STATE = (
    StateSpec("state_clicks", "int64", ("N_h",), 8, "clicks"),
    StateSpec("total", "float32", (1,), 0, append=SUM),
    StateSpec("user", "float32", (1,), 0),
)


def write_bundle() -> None:
    """The bundle `sums`."""
    n = helper.make_node

    def encoder(total: list[Any]) -> Any:
        nodes = [
            n("Identity", ["clicks"], ["state_clicks"]),
            n("Cast", ["clicks"], ["clicked"], to=TensorProto.FLOAT),
            *total,
            n("Cast", ["recent"], ["lately"], to=TensorProto.FLOAT),
            n("ReduceSum", ["lately", "axis0"], ["late"], keepdims=1),
            n("Mul", ["total", "two"], ["twice"]),
            n("Add", ["twice", "late"], ["user"]),
        ]
        return nodes, {"axis0": np.int64([0]), "two": np.float32([2])}

    def scorer(bias: float) -> Any:
        nodes = [
            n("Cast", ["state_clicks"], ["clicked"], to=TensorProto.FLOAT),
            n("ReduceSum", ["clicked", "axis0"], ["each"], keepdims=1),
            n("Mul", ["each", "thousand"], ["thousands"]),
            n("Mul", ["candidates", "user"], ["product"]),
            n("Cast", ["hour"], ["time"], to=TensorProto.FLOAT),
            n("Sum", ["product", "thousands", "time", "bias"], ["scores"]),
        ]
        constants = {"axis0": np.int64([0]), "thousand": np.float32([1000]), "bias": np.float32([bias])}
        return nodes, constants

    own = n("ReduceSum", ["clicked", "axis0"], ["total"], keepdims=1)
    added = [n("ReduceSum", ["clicked", "axis0"], ["new"], keepdims=1), n("Add", ["kept_total", "new"], ["total"])]
    grower = ((TensorSpec("kept_total", "float32", (1,)), CLICKS, RECENT), *encoder(added))
    halves = (encoder([own]), scorer, grower)
    scores = (TensorSpec("scores", "float32", ("N_t",)),)
    make_golden.write_bundle("sums", INPUTS, STATE, scores, halves, 0.0, appendable=True, max_history=WINDOW)


def cases() -> list[Any]:
    """All of them."""
    ours: dict[str, Any] = {"bundle": "sums"}

    def user(clicks: list[int], recent: tuple[int, int]) -> dict[str, Any]:
        return {"clicks": tensor("int64", clicks, [len(clicks)]), "recent": tensor("int64", recent)}

    def scored(clicks: list[int], recent: tuple[int, int]) -> list[list[float]]:
        return [[c * (2 * sum(clicks) + sum(recent)) + 1000 * sum(clicks) + 9] for c in (1.0, 0.5)]

    rest = {"hour": tensor("int64", [9]), "candidates": tensor("float32", [1.0, 0.5])}
    kept = score({**user([3, 4, 5], (4, 5)), **rest}, scored([3, 4, 5], (4, 5)), "ann", "v1")
    more, whole = user([7, 1], (7, 1)), [3, 4, 5, 7, 1]
    no_part = "is no part of an event; append takes the user inputs alone"
    return [
        case(
            "events are added to a kept sum",
            kept,
            append("ann", more, "v2", True, "v1"),
            score(rest, scored(whole, (7, 1)), "ann", "v2"),
            append("ann", user([], (8, 8)), "v3", True, "v2"),
            score(rest, scored(whole, (8, 8)), "ann", "v3"),
            append("ann", user([2], (1, 2)), "v4", True),
            score(rest, scored([*whole, 2], (1, 2)), "ann", "v4"),
            append("ann", user([2], (1, 2)), "v4", True),
            append("ann", user([], (3, 3)), "v5", True, "v4"),
            append("ann", user([], (2, 6)), "v6", True, "v5"),
            stats(hits=3, appends=5, state_bytes=6 * 8 + 2 * 4),
            score(rest, scored([*whole, 2], (2, 6)), "ann", "v6"),
            score(rest, refused("ann", "v1", "send the user inputs"), "ann", "v1"),
            # Written are, in a room for more, three old clicks and three new ones; for each request after an append,
            # what is no row; and the inputs of five appends, which wait until then.
            stats(
                hits=4,
                misses=1,
                appends=5,
                users=1,
                state_bytes=6 * 8 + 2 * 4,
                appended_bytes=6 * 8 + 4 * 2 * 4 + 3 * 8 + 5 * 2 * 8,
            ),
            **ours,
        ),
        case(
            "a sum forgets no event",
            kept,
            append("ann", user([1, 1, 1, 1], (1, 1)), "v2", False),
            append("ann", more, "v2", False, "v0"),
            append("bob", more, "v2", False),
            amend("ann", more, "v2", -2, refused("amend", "sums over all events", "whole history")),
            score(rest, scored([3, 4, 5], (4, 5)), "ann", "v1"),
            **ours,
        ),
        case(
            "what an append to a sum brings",
            kept,
            append("ann", {"clicks": more["clicks"]}, "v2", refused("recent", "missing")),
            append("ann", {**more, "hour": rest["hour"]}, "v2", refused("hour", no_part)),
            append("ann", user([100], (1, 1)), "v2", refused("clicks", "100", "[0, 99]")),
            **ours,
        ),
    ]
