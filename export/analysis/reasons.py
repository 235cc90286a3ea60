"""Why each node of the two halves is where it is, in few words: nodes alike share one."""

from __future__ import annotations

from collections.abc import Collection

from stca.export.analysis.cut import Cut
from stca.export.analysis.scope import Scope, label
from stca.specs import Reason


def reasons(cut: Cut, state: Collection[str], recomputed: Collection[int]) -> tuple[Reason, ...]:
    """One for each group of nodes, encoder first.

    Args:
        cut: the whole graph, and what is known of it.
        state: the values that the state is made of.
        recomputed: the user's nodes that the scorer computes again.
    """
    sources = _sources(cut)
    encoder, _ = cut.flow.needed(state)
    scorer, _ = cut.flow.needed(cut.outputs, given=state)
    groups: dict[tuple[str, str, tuple[str, ...], str], list[str]] = {}
    for half, nodes in (("user_encoder", encoder), ("target_scorer", scorer)):
        for i in sorted(nodes):
            why = (
                _in_encoder(cut, i, state, scorer, recomputed) if half == "user_encoder" else _in_scorer(cut, i, state)
            )
            reach = frozenset[str]().union(*(sources.get(n, ()) for n in cut.flow.reads[i]))
            key = (half, str(cut.scope(i)), tuple(n for n in cut.inputs if n in reach), why)
            groups.setdefault(key, []).append(label(cut.nodes[i]))
    return tuple(Reason(*key, tuple(names)) for key, names in groups.items())


def _sources(cut: Cut) -> dict[str, frozenset[str]]:
    """By value, the inputs that reach it."""
    found = {name: frozenset((name,)) for name in cut.inputs if cut.scopes[name] != Scope.CONSTANT}
    for i, node in enumerate(cut.nodes):
        reach = frozenset[str]().union(*(found.get(n, ()) for n in cut.flow.reads[i]))
        found.update((name, reach) for name in node.output if name)
    return found


def _in_encoder(
    cut: Cut, node: int, state: Collection[str], scorer: Collection[int], recomputed: Collection[int]
) -> str:
    if cut.scope(node) == Scope.CONSTANT:
        return _OF_WEIGHTS
    kept = [name for name in cut.writes(node) if name in state]
    if kept:
        readers = [i for i in cut.readers(kept[0]) if i in scorer]
        if not readers:
            return "once per user, and kept: it is a score's own"
        reader = max(readers, key=cut.scope)
        each = "target" if cut.scope(reader) == Scope.TARGET else "request"
        return f"once per user, and kept: the cut is here, as {label(cut.nodes[reader])!r} reads it for each {each}"
    if node in recomputed:
        return "once per user, for what is kept; the scorer computes it too, which is cheaper than keeping it"
    return "once per user, for what is kept"


def _in_scorer(cut: Cut, node: int, state: Collection[str]) -> str:
    scope = cut.scope(node)
    if scope == Scope.CONSTANT:
        return _OF_WEIGHTS
    if scope == Scope.USER:
        return "for each request, as computing it again is cheaper than keeping it"
    met = [n for n in cut.flow.reads[node] if cut.scopes[n] == Scope.USER]
    which = "the state" if all(n in state for n in met) else "values of the user's"
    meets = f"; it meets {which}: {', '.join(met[:3])}{', …' if met[3:] else ''}" if met else ""
    return f"{'once per request' if scope == Scope.REQUEST else 'for each target'}{meets}"


_OF_WEIGHTS = "of weights alone"
