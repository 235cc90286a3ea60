"""Golden cases of several ids per event, target and user: in padded histories, and packed ones with offsets."""

from __future__ import annotations

from typing import Any

import make_golden
import numpy as np
from make_golden import batch, case, refused, score, tensor
from onnx import TensorProto, helper

from stca.specs import EventInput, Padding, StateSpec, TensorSpec

PLACES, IDS = 4, 3
PADDED = (
    TensorSpec("tags", "int64", (1, PLACES, IDS), "user", 100),
    TensorSpec("likes", "int64", (1, IDS), "user", 100),
    TensorSpec("labels", "int64", ("N_t", 2), "target", 100),
)
PACKED = (
    TensorSpec("tags", "int64", ("N_h", IDS), "user", 100),
    TensorSpec("history_offsets", "int32", ("B_plus_1",), "user"),
    TensorSpec("likes", "int64", ("B", IDS), "user", 100),
    TensorSpec("labels", "int64", ("N_t", 2), "target", 100),
    TensorSpec("target_offsets", "int32", ("B_plus_1",), "target"),
)
# 0 stands for no id.
ANN, BOB = [[4, 0, 0], [5, 6, 0], [7, 8, 9]], [[1, 2, 0]]
LIKES, LABELS = [3, 1, 0], [[2, 4], [1, 0]]


def write_bundles() -> None:
    """`bags_padded` and `bags_packed`: the sum of place * id over all events of a user, and the ids of a target."""
    scores = (TensorSpec("scores", "float32", ("N_t",)),)
    state = (StateSpec("sum", "float32", (1,), 0),)
    fields: dict[str, Any] = {"appendable": False, "max_history": None}
    padding = (Padding((EventInput("tags", 1, 0),), "right"),)
    make_golden.write_bundle("bags_padded", PADDED, state, scores, _padded(), 0.0, padding=padding, **fields)
    state = (
        StateSpec("token", "float32", ("N_h",), 4),
        StateSpec("state_history_offsets", "int32", ("B_plus_1",), 0, "history_offsets"),
        StateSpec("liked", "float32", ("B",), 0),
    )
    make_golden.write_bundle("bags_packed", PACKED, state, scores, _packed(), 0.0, **fields)


def _of_ids(ids: str, out: str) -> list[Any]:
    """Nodes that sum the ids of each, times their place among them."""
    n = helper.make_node
    return [
        n("Cast", [ids], [f"{ids}_numbers"], to=TensorProto.FLOAT),
        n("Mul", [f"{ids}_numbers", f"{ids}_places"], [f"{ids}_placed"]),
        n("ReduceSum", [f"{ids}_placed", "last"], [out], keepdims=0),
    ]


_IDS = {"last": np.int64([-1])} | {
    f"{name}_places": np.arange(1, size + 1, dtype=np.float32)
    for name, size in (("tags", IDS), ("likes", IDS), ("labels", 2))
}


def _constants(*names: str) -> dict[str, Any]:
    return {n: x for n, x in _IDS.items() if n == "last" or n.removesuffix("_places") in names}


def _padded() -> Any:
    n = helper.make_node
    encoder = [
        *_of_ids("tags", "token"),
        n("Mul", ["token", "places"], ["placed"]),
        n("ReduceSum", ["placed", "last"], ["in_all"], keepdims=0),
        *_of_ids("likes", "liked"),
        n("Add", ["in_all", "liked"], ["sum"]),
    ]
    places = np.arange(1, PLACES + 1, dtype=np.float32)

    def scorer(bias: float) -> Any:
        nodes = [*_of_ids("labels", "own"), n("Sum", ["own", "sum", "bias"], ["scores"])]
        return nodes, {**_constants("labels"), "bias": np.float32([bias])}

    return (encoder, {**_constants("tags", "likes"), "places": places}), scorer


def _packed() -> Any:
    n = helper.make_node
    encoder = [
        *_of_ids("tags", "token"),
        *_of_ids("likes", "liked"),
        n("Identity", ["history_offsets"], ["state_history_offsets"]),
    ]

    def scorer(bias: float) -> Any:
        nodes = [
            n("Concat", ["no_token", "token"], ["all"], axis=0),
            n("CumSum", ["all", "first"], ["sums"]),
            n("Gather", ["sums", "state_history_offsets"], ["bounds"], axis=0),
            n("Slice", ["bounds", "one", "end"], ["after"]),
            n("Slice", ["bounds", "zero", "last"], ["before"]),
            n("Sub", ["after", "before"], ["tagged"]),
            n("Add", ["tagged", "liked"], ["of_user"]),
            *_of_ids("labels", "own"),
            # Whose a target is: how many requests end at or before it.
            n("Shape", ["own"], ["targets"]),
            n("Squeeze", ["targets", "zero"], ["count"]),
            n("Range", ["first", "count", "step"], ["place"]),
            n("Unsqueeze", ["place", "one"], ["column"]),
            n("Slice", ["target_offsets", "one", "end"], ["ends"]),
            n("Cast", ["ends"], ["ends64"], to=TensorProto.INT64),
            n("GreaterOrEqual", ["column", "ends64"], ["ended"]),
            n("Cast", ["ended"], ["ended64"], to=TensorProto.INT64),
            n("ReduceSum", ["ended64", "one"], ["owner"], keepdims=0),
            n("Gather", ["of_user", "owner"], ["shared"], axis=0),
            n("Sum", ["own", "shared", "bias"], ["scores"]),
        ]
        constants = {
            "zero": np.int64([0]), "one": np.int64([1]), "end": np.int64([2**31]), "first": np.int64(0),
            "step": np.int64(1), "no_token": np.zeros(1, np.float32), "bias": np.float32([bias]),
        }  # fmt: skip
        return nodes, {**_constants("labels"), **constants}

    return (encoder, _constants("tags", "likes")), scorer


def expected(events: Any, padded: bool, likes: Any = LIKES, labels: Any = LABELS) -> list[list[float]]:
    """What a request must score; of a padded history each event counts by its place."""
    user = sum((place if padded else 1) * _sum(ids) for place, ids in enumerate(events, start=1)) + _sum(likes)
    return [[float(user + _sum(ids))] for ids in labels]


def _sum(ids: Any) -> int:
    return int(sum(place * i for place, i in enumerate(ids, start=1)))


def request(events: Any = ANN, **others: Any) -> dict[str, Any]:
    """One user's; an input of None is left out."""
    given = {"tags": events, "likes": LIKES, "labels": LABELS, **others}
    made = {n: x if isinstance(x, dict) else tensor("int64", x) for n, x in given.items() if x is not None}
    if events == []:
        made["tags"] = tensor("int64", [], [0, IDS])
    return made


def cases() -> list[Any]:
    """All of them."""
    both = {"bags_padded": True, "bags_packed": False}
    made = [
        case(f"several ids, {name}: {what}", score(inputs, expected(events, padded, **wanted)), bundle=name)
        for name, padded in both.items()
        for what, inputs, events, wanted in (
            ("per event, user and target", request(), ANN, {}),
            ("narrower integers", request(tags=tensor("int32", ANN)), ANN, {}),
            ("no events", request([]), [], {}),
            ("of a user with the batch axis", request(likes=[LIKES]), ANN, {}),
            ("of one target without its axis", request(labels=[7, 8]), ANN, {"labels": [[7, 8]]}),
        )
    ]
    packed = {
        "tags": tensor("int64", [*ANN, *BOB]), "history_offsets": tensor("int32", [0, 3, 4, 4]),
        "likes": tensor("int64", [LIKES, [0, 0, 2], [5, 0, 0]]),
        "labels": tensor("int64", [*LABELS, [9, 9], [1, 1]]), "target_offsets": tensor("int32", [0, 2, 3, 4]),
    }  # fmt: skip
    wanted = [
        *expected(ANN, False),
        *expected(BOB, False, [0, 0, 2], [[9, 9]]),
        *expected([], False, [5, 0, 0], [[1, 1]]),
    ]
    bad = (
        ("fewer ids than the model takes", request([[4, 5], [6, 7]]), "tags", "2]", f"{IDS}]"),
        ("one id per event", request([4, 5, 6]), "tags", "[3]", f"{IDS}]"),
        ("an id out of range", request([[4, 0, 100]]), "tags", "100", "[0, 99]"),
        ("three labels", request(labels=[[1, 2, 3]]), "labels", "[1, 3]", "[N_t, 2]"),
        ("a number of ids, as floats", request(likes=tensor("float32", [1.0, 2.0, 3.0])), "likes", "float32", "int64"),
    )
    return [
        *made,
        case("several ids, packed with offsets", batch(packed, wanted), bundle="bags_packed"),
        case(
            "several ids, packed with offsets of one too many",
            batch({**packed, "history_offsets": tensor("int32", [0, 3, 5, 5])}, refused("tags", "[4, 3]", "5")),
            bundle="bags_packed",
        ),
        *(
            case(f"several ids, {name}: {what}", score(inputs, refused(*says)), bundle=name)
            for name in both
            for what, inputs, *says in bad
        ),
    ]
