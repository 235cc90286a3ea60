"""How a model takes a shorter history is found by asking it; what is not shown is not guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.errors import one_line

from stca.errors import SplitError
from stca.export.analysis.marks import marks
from stca.export.histories import unpacked
from stca.export.padding import Found, PadOptions, find_padding
from stca.specs import EventInput, Padding, TensorSpec

L = 8
ITEMS = TensorSpec("items", "int64", (1, L), "user", 100)
TIMES = TensorSpec("times", "float32", (1, L), "user")
LENGTH = TensorSpec("count", "int64", (1,), "user")
MASK = TensorSpec("mask", "bool", (1, L), "user")
TARGET = TensorSpec("item", "int64", ("N_t",), "target", 100)
Feeds = Mapping[str, Any]
WEIGHTS = np.linspace(1, 2, 100)


def asked(
    scores: Callable[[Feeds], Any], *specs: TensorSpec, known: Any = None, reads: Any = (), **options: Any
) -> Found:
    def run(feeds: Feeds) -> list[Any] | str:
        out = WEIGHTS[feeds["item"]] * scores(feeds)
        return [out] if np.isfinite(out).all() else "scores are not finite"

    return find_padding((*specs, TARGET), PadOptions(**options), known or {}, run, 0, reads)


def events(feeds: Feeds) -> Any:
    """A number for each event."""
    return WEIGHTS[feeds["items"][0]] + feeds.get("times", np.zeros((1, L)))[0]


def by_id(feeds: Feeds) -> float:
    return float((events(feeds) * (feeds["items"][0] != 0)).sum())


def last(feeds: Feeds) -> float:
    """Events in order, whose ids may be none."""
    return float(np.cumsum(events(feeds) * (feeds["items"][0] != 0) * np.arange(1, L + 1))[-1])


def test_a_mask_made_of_ids_shows_padding_on_either_side() -> None:
    found = asked(by_id, ITEMS, TIMES)
    assert found.padding == (Padding((EventInput("items", 1), EventInput("times", 1)), "right"),)
    assert "padded on the right with 0" in found.told[0]
    assert asked(by_id, ITEMS, TIMES, side="left").padding[0].side == "left"  # type: ignore[index]


def test_padding_shows_where_one_event_weighs_all_and_times_of_like_size_are_one() -> None:
    """A softmax over one event is 1, and of random seconds most fall into the largest bucket."""
    seconds = TensorSpec("seconds", "int64", (1, L), "user")

    def scores(feeds: Feeds) -> float:
        gap = np.clip(2**23 - feeds["seconds"][0], 1, None)
        logits = np.where(feeds["items"][0] != 0, np.floor(np.log2(gap)) / 10, -1e9)
        weights = np.exp(logits - logits.max())
        return float(weights / weights.sum() @ WEIGHTS[feeds["items"][0]])

    assert asked(scores, ITEMS, seconds).padding == (
        Padding((EventInput("items", 1), EventInput("seconds", 1)), "right"),
    )


def test_small_integers_are_asked_within_their_type() -> None:
    small = TensorSpec("age", "int16", (1, L), "user")

    def scores(feeds: Feeds) -> float:
        return float(feeds["age"].sum() + events(feeds).sum())

    assert asked(scores, ITEMS, small).padding[0].side is None  # type: ignore[index]


def test_ids_alone_need_a_mark_in_the_graph() -> None:
    assert asked(by_id, ITEMS).padding[0].side is None  # type: ignore[index]
    assert asked(by_id, ITEMS, known={"items": 0}).padding[0].side == "right"  # type: ignore[index]


def test_where_places_count_nothing_is_guessed() -> None:
    found = asked(last, ITEMS, TIMES)
    assert found.padding[0].side is None  # type: ignore[index]
    assert "exactly 8 events" in found.told[0]
    assert "--pad" in found.told[0]
    said = asked(last, ITEMS, TIMES, side="left", values={"times": -1})
    assert said.padding == (Padding((EventInput("items", 1), EventInput("times", 1, -1)), "left"),)


def test_padding_goes_to_the_side_on_which_events_count() -> None:
    """The event at the place of their number: padded on the left, it would be padding."""

    def newest(feeds: Feeds) -> float:
        real = feeds["items"][0] != 0
        return float(events(feeds)[real.sum() - 1] * real[real.sum() - 1])

    found = asked(newest, ITEMS, known={"items": 0})
    assert found.padding[0].side == "right"  # type: ignore[index]
    assert "would not look at all events" in found.told[0]


def test_padding_goes_before_a_last_place_that_is_read() -> None:
    """What stands there counts for more, even if it is padding; of a sum over places nothing tells."""

    def scores(feeds: Feeds) -> float:
        return float(WEIGHTS[feeds["items"][0, -1]] + by_place(feeds))

    def by_place(feeds: Feeds) -> float:
        return float((events(feeds) * (feeds["items"][0] != 0) * np.arange(1, L + 1)).sum())

    found = asked(scores, ITEMS, known={"items": 0}, reads={("items", 1)})
    assert asked(scores, ITEMS, known={"items": 0}, reads={("profile", 1)}).padding[0].side is None  # type: ignore[index]
    assert found.padding[0].side == "left"  # type: ignore[index]
    assert "reads the last place" in found.told[0]
    found = asked(by_place, ITEMS, known={"items": 0})
    assert found.padding[0].side is None  # type: ignore[index]
    assert "otherwise on the left than on the right; pass --pad left or --pad right" in found.told[0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_lengths_show_the_side_and_get_their_range(side: Any) -> None:
    def scores(feeds: Feeds) -> float:
        n = int(feeds["count"][0])
        real = events(feeds)[:n] if side == "right" else events(feeds)[L - n :]
        return float(real.mean()) if n else float("nan")

    found = asked(scores, ITEMS, LENGTH)
    assert found.padding == (Padding((EventInput("items", 1),), side, "count"),)
    (length,) = (s for s in found.inputs if s.name == "count")
    assert (length.low, length.limit) == (1, L + 1)
    with one_line(SplitError, "--pad", side):
        asked(scores, ITEMS, LENGTH, side="left" if side == "right" else "right")


@pytest.mark.parametrize("event", [1, 0])
def test_a_mask_is_found_whatever_it_says_of_an_event(event: int) -> None:
    def scores(feeds: Feeds) -> float:
        return float((events(feeds) * (feeds["mask"][0] == bool(event))).sum())

    found = asked(scores, ITEMS, MASK)
    assert found.padding == (Padding((EventInput("items", 1), EventInput("mask", 1, 1 - event, event)), "right"),)
    assert "mask need not be sent: then send real events only" in found.told[0]
    assert "weight" not in found.told[0]


def test_a_mask_of_floats_may_be_a_weight() -> None:
    mask = TensorSpec("mask", "float32", MASK.shape, "user")
    found = asked(lambda feeds: float((events(feeds) * feeds["mask"][0]).sum()), ITEMS, mask)
    assert "send mask if it is a weight" in found.told[0]


def test_a_mask_of_a_free_length_is_made_too() -> None:
    free = [TensorSpec(s.name, s.dtype, (1, "seq"), s.scope, s.limit) for s in (ITEMS, MASK)]

    def scores(feeds: Feeds) -> float:
        return float((WEIGHTS[feeds["items"][0]] * feeds["mask"][0]).sum())

    assert asked(scores, *free).padding == (Padding((EventInput("items", 1), EventInput("mask", 1, 0, 1))),)


def test_no_more_is_said_than_was_seen() -> None:
    """A mean over all places is the same with padding on either side, and another with more of it."""
    found = asked(lambda feeds: by_id(feeds) / L + (feeds["items"][0] == 0).sum(), ITEMS, known={"items": 0})
    assert "score alike with it on the left" in found.told[0]
    assert "ignore" not in found.told[0]


def test_options_that_contradict_the_model_are_refused() -> None:
    with one_line(SplitError, "--pad-value", "5", "items", "0"):
        asked(by_id, ITEMS, TIMES, known={"items": 0}, values={"items": 5})
    with one_line(SplitError, "--pad-value", "clicks", "items"):
        asked(by_id, ITEMS, values={"clicks": 5})
    with one_line(SplitError, "no history of a fixed length"):
        asked(by_id, TensorSpec("age", "int64", (1,), "user", 9), side="left")


def test_which_inputs_hold_a_history() -> None:
    vector = TensorSpec("profile", "float32", (1, 16), "user")
    vectors = TensorSpec("clicks", "float32", ("batch", "seq", 4), "user")
    assert unpacked((ITEMS, TIMES, vector, vectors, LENGTH, TARGET)) == [
        (EventInput("items", 1), EventInput("times", 1)),
        (EventInput("clicks", 1),),
    ]
    packed = [
        TensorSpec("items", "int64", ("N_h",), "user"),
        TensorSpec("history_offsets", "int32", ("B_plus_1",), "user"),
        TensorSpec("item", "int64", ("N_t",), "target"),
        TensorSpec("target_offsets", "int32", ("B_plus_1",), "target"),
    ]
    assert unpacked(packed) == []


@pytest.mark.parametrize(
    ("op", "constant", "first_row", "mark"),
    [
        ("Equal", 3, 1.0, 3),
        ("Greater", 0, 1.0, 0),
        ("GreaterOrEqual", 1, 1.0, 0),
        (None, 0, 0.0, 0),
        (None, 0, 1.0, None),
    ],
)
def test_graphs_that_tell_which_id_is_none(op: str | None, constant: int, first_row: float, mark: int | None) -> None:
    table = np.ones((5, 2), np.float32)
    table[0] = first_row
    nodes = [helper.make_node("Gather", ["table", "ids"], ["rows"]), helper.make_node("Identity", ["rows"], ["out"])]
    if op:
        nodes.append(helper.make_node(op, ["ids", "constant"], ["real"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 4, 2])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.int64(constant), "constant")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert marks(model) == ({} if mark is None else {"ids": mark})


def test_no_events_of_a_free_length_are_padding_or_need_an_event() -> None:
    """A softmax written by hand weighs padding as events where there is nothing else; over nothing it is 0."""
    free = TensorSpec("items", "int64", (1, "N_h"), "user", 100)

    def pooled(feeds: Feeds) -> float:
        ids = feeds["items"][0]
        logits = np.where(ids != 0, WEIGHTS[ids], -1e9)
        weights = np.exp(logits - logits.max(initial=-1e9))
        return float(weights @ WEIGHTS[ids] / weights.sum()) if len(ids) else 0.0

    def summed(feeds: Feeds) -> float:
        return float(WEIGHTS[feeds["items"][0]] @ (feeds["items"][0] != 0))

    def mean(feeds: Feeds) -> float:
        return float(WEIGHTS[feeds["items"][0]].sum() / max(1, feeds["items"].size))

    (line,) = asked(pooled, free).needs
    assert "at least 1 event" in line
    assert "send one of padding (0 in items)" in line
    assert asked(summed, free).needs == () == asked(mean, free).needs, "the same as padding alone, or no padding"
