"""A history in several pieces: how a bundle's graph for them is called, what it takes, and what it must give.

The target scorer takes one row per history token as one tensor. `PIECES` is the same scorer with so many inputs in the
place of each such input, one for each piece; any piece may be without rows. The first piece has the scorer's own names.
Offsets of the history that nothing else reads are left out, for each piece is read whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from stca.manifest import Manifest
from stca.specs import TOKENS, GraphSpec, TensorSpec

PIECES: Final = "pieces_scorer"


def piece_of(name: str, piece: int) -> str:
    """How an input or a size of the target scorer is called for one of the pieces; 0 is the first."""
    return f"{name}@{piece}" if piece else name


def inputs_in_pieces(scorer: GraphSpec, graph: GraphSpec, pieces: int) -> tuple[TensorSpec, ...]:
    """What the scorer takes of so many pieces: its own inputs, then those of each further piece.

    Args:
        scorer: the target scorer.
        graph: the same for pieces, which has such offsets as something reads.
        pieces: how many.
    """
    names = {s.name for s in graph.inputs}
    own = [s for s in scorer.inputs if s.name in names or not s.is_offsets]
    further = [
        replace(s, name=piece_of(s.name, i), shape=(piece_of(TOKENS, i), *s.shape[1:]), scope=None)
        for i in range(1, pieces)
        for s in own
        if s.shape[:1] == (TOKENS,)
    ]
    return (*own, *further)


def pieces_of(manifest: Manifest) -> tuple[Mapping[str, str], ...]:
    """Of each piece that the graph takes behind the first: its inputs, by the target scorer's; none without the graph.

    Raises:
        ValueError: when it takes anything else than the target scorer and further pieces behind that, or gives another
            output.
    """
    if (graph := manifest.graphs.get(PIECES)) is None:
        return ()
    scorer, where = manifest.graphs["target_scorer"], f"graphs.{PIECES}"
    apart = [s.name for s in scorer.inputs if s.shape[:1] == (TOKENS,)]
    own = inputs_in_pieces(scorer, graph, 1)
    count = (len(graph.inputs) - len(own)) // (len(apart) or 1)
    if not apart or count < 1 or not manifest.appendable:
        raise ValueError(f"{where}: there are no pieces of a history that it could take")
    for what, specs, wanted in (
        ("inputs", graph.inputs, inputs_in_pieces(scorer, graph, count + 1)),
        ("outputs", graph.outputs, scorer.outputs),
    ):
        kinds, expected = ([(s.name, s.dtype, s.shape) for s in them] for them in (specs, wanted))
        if kinds != expected:
            wrong = next((s for s, its in zip(kinds, expected, strict=False) if s != its), kinds[-1])
            raise ValueError(f"{where}: {what}: {wrong[0]!r:.80} is not what the target scorer takes or gives")
    return tuple({n: piece_of(n, i) for n in apart} for i in range(1, count + 1))
