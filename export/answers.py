"""All that a request graph is asked before its bundle is written: what it takes, and how its histories are padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import onnx

from stca.arrays import Array, Progress
from stca.export.analysis.last_place import read_at_last
from stca.export.analysis.marks import marks
from stca.export.analysis.positions import position_tables
from stca.export.asking import Accepted, ask
from stca.export.files import askable
from stca.export.histories import least_events, unpacked
from stca.export.padding import Found, PadOptions, padding_of
from stca.specs import TensorSpec

_TIES: Final = (
    "TopK takes the first of equal values; torch says of none which it takes, so its own scores may differ there"
)


def answers(
    graph: onnx.ModelProto,
    before: onnx.ModelProto,
    specs: Sequence[TensorSpec],
    max_history: int | None,
    pad: PadOptions,
    work: Path,
    progress: Progress,
    *,
    config: bool,
    apart: Mapping[str, Array],
    least: int | None = None,
) -> tuple[Accepted, Found]:
    """What the request graph takes, and how its histories are padded, found by asking it.

    Args:
        graph: that is served; weights inline.
        before: the same before rules changed it, which may leave out what refuses a request; one model perhaps.
        specs: of its inputs.
        max_history: longest history to serve; None for as long as it takes.
        pad: what is known of its padding.
        work: a folder for files that go again.
        progress: told when it is asked.
        config: whether it comes of a checkpoint, whose config says what it takes.
        apart: contents of the tables that have stand-ins in the graphs: limits are those of the tables.
        least: events of the shortest history that the module takes which it was made from; None where there is none.
    """
    takes, histories = Accepted(tuple(specs), None, max_history), unpacked(specs)
    if config and not histories and pad == PadOptions():
        return dataclasses.replace(takes, min_history=least or None), Found(None, takes.inputs)
    known = marks(graph) if histories else {}
    with askable(graph, before, work, apart) as (served, asked):
        if not config:
            progress("asking the graph what it takes")
            sizes = [n for table in position_tables(before).values() for n in table]
            takes = ask(asked, specs, max_history, {**known, **pad.values}, sizes)
        found = padding_of(served, known, takes, pad, read_at_last(graph) if histories else ())
    needs = found.needs if least is None else ()  # a module says itself what no events are
    shortest = max(takes.min_history or 0, least_events(found.inputs), least or 0, min(len(needs), 1)) or None
    ties = (_TIES,) if any(n.op_type == "TopK" for n in graph.graph.node) else ()
    return dataclasses.replace(takes, min_history=shortest, told=(*takes.told, *needs, *ties)), found
