"""Golden cases of corrected events and of answers that are not wanted any more; `make_golden.py` writes them."""

from __future__ import annotations

from typing import Any

import make_golden
import numpy as np
from make_golden import NEEDY_BIAS, WINDOW, Log, append, case, events, forget, refused, score, stats, tensor, warm
from onnx import TensorProto, helper

from stca.specs import StateSpec, TensorSpec

A = Log([1, 2, 3, 40, 50], [0, 1, 3, 2, 2])
DEADLINE_ERROR, CANCELLED_ERROR = 11, 12


def cases() -> list[Any]:
    """All of them."""
    return [*_amendments(), *_refusals(), *_blanks(), *_weighed(), *_deadlines()]


def amend(user: str, given: Any, version: str, at: int, expected: Any, after: str | None = None) -> dict[str, Any]:
    """A step that amends, and whether the state is kept, or the error."""
    outcome = expected if isinstance(expected, dict) else {"kept": expected}
    return {"call": "amend", "user": user, "events": given, "version": version, "at": at, "after": after, **outcome}


def _by(step: dict[str, Any], seconds: float, cancelled: bool = False) -> dict[str, Any]:
    """The step with a deadline."""
    return {**step, "deadline": {"seconds": seconds, "cancelled": cancelled}}


def _amendments() -> list[Any]:
    def corrected(at: int, items: list[int], actions: list[int]) -> Log:
        end = at + len(items)
        return Log([*A.items[:at], *items, *A.items[end:]], [*A.actions[:at], *actions, *A.actions[end:]])

    kept = score(A.inputs(), A.scores(), "ann", "v1")
    places = [(0, [9], [3]), (1, [9, 8], [3, 1]), (-1, [9], [3]), (-5, [9] * 5, [1] * 5), (5, [], []), (-2, [], [])]
    found = []
    for at, items, actions in places:
        right = corrected(at % 5 if at != 5 else 5, items, actions)
        found.append(
            case(
                f"{len(items)} events amended at {at}",
                kept,
                amend("ann", events(items, actions), "v2", at, True, "v1"),
                score(A.rest(), right.scores(), "ann", "v2"),
                score(A.rest(), refused("ann", "v1", "send the user inputs"), "ann", "v1"),
                stats(hits=1, misses=1, appends=1, users=1, state_bytes=A.state_bytes(), appended_bytes=5 * 8),
            )
        )
    for at, items in ((5, [9]), (4, [9, 9]), (-6, [9]), (1 << 62, [9]), (-(1 << 62), [9])):
        says = refused(f"at: is {at}; the kept history has 5 events, and all {len(items)} from there on must be in it")
        found.append(
            case(
                f"{len(items)} events at {at} are not within the history",
                kept,
                amend("ann", events(items, [0] * len(items)), "v2", at, says),
                score(A.rest(), A.scores(), "ann", "v1"),
            )
        )
    longest = Log([*A.items, 60], [*A.actions, 0])
    seen = Log([3, 40, 50, 60, 70, 9], [3, 2, 2, 0, 0, 3])
    return [
        *found,
        case(
            "counted from the newest where old events fell off",
            score(longest.inputs(), longest.scores(), "ann", "v1"),
            append("ann", events([70, 80], [0, 1]), "v2", True),
            amend("ann", events([9], [3]), "v3", -1, True),
            score(A.rest(), seen.scores(), "ann", "v3"),
        ),
        case(
            "amended once, and after the right version alone",
            kept,
            amend("ann", events([9], [3]), "v3", 0, False, "v2"),
            amend("ann", events([9], [3]), "v2", 0, True, "v1"),
            amend("ann", events([8], [3]), "v2", 0, True, "v1"),
            score(A.rest(), corrected(0, [9], [3]).scores(), "ann", "v2"),
            forget("ann", True),
            amend("ann", events([9], [3]), "v3", 0, False),
        ),
        case("nothing to amend", amend("bob", events([1], [1]), "v2", 0, False)),
        case("no amending of this model", amend("ann", {}, "v2", 0, refused("send the whole history")), bundle="plain"),
        case(
            "no part of an event that is amended",
            amend("ann", {**events([1], [1]), **A.rest()}, "v2", 0, refused("no part of an event; amend takes")),
        ),
        case(
            "a bad event amends nothing",
            kept,
            amend("ann", events([1000], [1]), "v2", 0, refused("history_item", "1000", "[0, 999]")),
            score(A.rest(), A.scores(), "ann", "v1"),
        ),
    ]


def _refusals() -> list[Any]:
    """Calls that would leave a state as it was, or other events in a place than were meant."""
    kept = score(A.inputs(), A.scores(), "ann", "v1")
    same = refused("version: is 'v1', that of the history before; name the changed one anew")
    full = Log([1, 2, 3, 40, 50, 60], [0, 1, 3, 2, 2, 0])
    seven = events([9, 8, 7, 6, 5, 4, 3], [0] * 7)
    after_seven = Log([8, 7, 6, 5, 4, 3], [0] * 6)
    says = refused("at: is 0; the kept history has 6 events, and all 7 from there on must be in it")
    return [
        case(
            "a changed history under the version of the one before",
            kept,
            append("ann", events([9], [3]), "v1", same, "v1"),
            amend("ann", events([9], [3]), "v1", 0, same, "v1"),
            append("bob", events([9], [3]), "v1", same, "v1"),
            append("ann", events([1000], [3]), "v1", refused("history_item", "1000"), "v1"),
            score(A.rest(), A.scores(), "ann", "v1"),
        ),
        case(
            "more events are amended than are kept",
            score(full.inputs(), full.scores(), "ann", "v1"),
            amend("ann", seven, "v2", 0, says),
            amend("bob", seven, "v2", 0, False),
            score(full.rest(), full.scores(), "ann", "v1"),
            append("ann", seven, "v2", True),
            score(full.rest(), after_seven.scores(), "ann", "v2"),
            truncate=True,
        ),
    ]


def _blanks() -> list[Any]:
    """Of a model that has no score for a history of nothing but blank events, which these are a part of."""
    longer = Log([*A.items, 0, 0], [*A.actions, 0, 0])
    corrected = Log([0, *A.items[1:], 0], [3, *A.actions[1:], 0])
    one = Log([7], [1])
    nothing = refused("history_item", "would hold nothing but 0", "at least one other")
    return [
        case(
            "blank: events that leave nothing else",
            score(A.inputs(), A.scores(NEEDY_BIAS), "ann", "v1"),
            append("ann", events([0] * WINDOW, [1] * WINDOW), "v2", nothing),
            score(A.rest(), A.scores(NEEDY_BIAS), "ann", "v1"),
            score(one.inputs(), one.scores(NEEDY_BIAS), "bob", "v1"),
            amend("bob", events([0], [1]), "v2", 0, nothing),
            append("bob", events([0] * (WINDOW - 1), [0] * (WINDOW - 1)), "v2", True),
            append("bob", events([0], [0]), "v3", nothing),
            score(one.rest(), Log([7, 0], [1, 0]).scores(NEEDY_BIAS), "bob", "v2"),
            stats(hits=2, misses=2, appends=1, users=2),
            bundle="log_not_blank",
        ),
        case(
            "blank: events of a history that has others",
            score(A.inputs(**events([0, 0], [1, 1])), refused("history_item", "nothing but 0", "at least one other")),
            score(A.inputs(), A.scores(NEEDY_BIAS), "ann", "v1"),
            append("ann", events([0], [0]), "v2", True),
            amend("ann", events([0], [3]), "v3", 0, True),
            score(A.rest(), corrected.scores(NEEDY_BIAS), "ann", "v3"),
            score(longer.inputs(), longer.scores(NEEDY_BIAS), "ann", "v4"),
            bundle="log_not_blank",
            truncate=True,
        ),
    ]


WEIGHED = (
    TensorSpec("clicks", "int64", ("N_h",), "user", 100, blank=0),
    TensorSpec("history_offsets", "int32", ("B_plus_1",), "user"),
    TensorSpec("weight", "float32", ("N_h",), "request"),
    TensorSpec("candidates", "float32", ("N_t",), "target"),
    TensorSpec("target_offsets", "int32", ("B_plus_1",), "target"),
)
WEIGHED_STATE = (
    StateSpec("state_clicks", "int64", ("N_h",), 8, "clicks"),
    StateSpec("state_history_offsets", "int32", ("B_plus_1",), 0, "history_offsets"),
)


def write_bundle() -> None:
    """The bundle `weighed`: a request weighs each event, and there is no score where all events are 0."""
    n = helper.make_node

    def scorer(bias: float) -> Any:
        nodes = [
            n("Cast", ["state_clicks"], ["clicked"], to=TensorProto.FLOAT),
            *(n("Unsqueeze", [name, "axis1"], [f"{name}_column"]) for name in ("clicked", "weight")),
            n("Concat", ["clicked_column", "weight_column"], ["both"], axis=1),  # which broadcasts nothing
            n("ReduceProd", ["both"], ["each"], axes=[1], keepdims=0),
            n("ReduceSum", ["each", "axis0"], ["total"], keepdims=1),
            n("ReduceSum", ["clicked", "axis0"], ["any"], keepdims=1),
            n("Div", ["none", "any"], ["nothing"]),
            n("Sum", ["candidates", "total", "nothing", "bias"], ["scores"]),
        ]
        constants = {"axis0": np.int64([0]), "axis1": np.int64([1]), "none": np.float32([0])}
        return nodes, {**constants, "bias": np.float32([bias])}

    encoder = [n("Identity", [s.input], [s.name]) for s in WEIGHED_STATE]
    scores = (TensorSpec("scores", "float32", ("N_t",)),)
    make_golden.write_bundle(
        "weighed", WEIGHED, WEIGHED_STATE, scores, ((encoder, {}), scorer), 0.0, appendable=True, max_history=WINDOW
    )


def _weighed() -> list[Any]:
    """Whether a state has scores is asked with an entry for each of its tokens."""

    def asked(weight: list[float]) -> dict[str, Any]:
        return {"weight": tensor("float32", weight), "candidates": tensor("float32", [1.0, 0.5])}

    def clicks(values: list[int]) -> dict[str, Any]:
        return {"clicks": tensor("int64", values)}

    nothing = refused("clicks", "would hold nothing but 0", "at least one other")
    return [
        case(
            "blank: events of a history that a request weighs",
            score({**clicks([3, 2]), **asked([2, 1])}, [[9.0], [8.5]], "ann", "v1"),
            append("ann", clicks([0, 0]), "v2", True),
            score(asked([1, 2, 3, 4]), [[8.0], [7.5]], "ann", "v2"),
            append("ann", clicks([0] * WINDOW), "v3", nothing),
            bundle="weighed",
            truncate=True,
        )
    ]


def _deadlines() -> list[Any]:
    late = refused("the deadline passed before the answer was there", code=DEADLINE_ERROR)
    cancelled = refused("the call was cancelled", code=CANCELLED_ERROR)
    return [
        case(
            "in time",
            _by(warm("ann", A.user(), "v1", True), 1e9),
            _by(score(A.rest(), A.scores(), "ann", "v1"), 1e9),
            _by(score(A.inputs(), A.scores()), 1e300),
        ),
        *(
            case(
                f"{seconds} seconds are over before anything is looked at",
                _by(score({}, late, "ann", "v1"), seconds),
                _by(score(A.inputs(), late, "ann", "v1"), seconds),
                _by(warm("ann", A.user(), "v1", late), seconds),
                stats(hits=0, misses=0, users=0, warmed=0),
            )
            for seconds in (0, -1, -1e300)
        ),
        case(
            "not wanted any more",
            _by(score(A.inputs(), cancelled, "ann", "v1"), 1e9, cancelled=True),
            _by(warm("ann", A.user(), "v1", cancelled), 1e9, cancelled=True),
            _by(score(A.inputs(), cancelled, "ann", "v1"), 0, cancelled=True),
            stats(hits=0, misses=0, users=0, warmed=0),
        ),
    ]
