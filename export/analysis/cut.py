"""Where to cut: which user-scope nodes the scorer recomputes, and what keeps request-scope work out of the cache.

Each user-scope node is either computed by the encoder, or recomputed by the scorer on every request, and the values
that the scorer then lacks are the state. The cut minimises

    bytes of the state + work the scorer recomputes per request / flops_per_byte

at nominal sizes, and among equals takes the one with less recomputed work. Bytes alone would be degenerate: raw ids are
the smallest state of all, and caching them saves nothing. So bytes are minimal at a stated price of work:
`flops_per_byte` is about the machine balance of what serves the model. At the default of 16, what only widens its
input (Cast, Expand, an embedding lookup) moves to the scorer, while a projection of width d stays in the encoder until
the price is about d or more. A row of a table outside the graphs has a price of its own: where it is low, ids are the
state, and where the rows' source is slow, the rows are.

The optimum is a minimum s-t cut, in the manner of project selection: a recomputed node costs its work, and a value that
crosses costs its bytes once, however many nodes read it. A node may be on both sides: what the encoder needs along the
way costs a request nothing, so the scorer may recompute a node that the encoder computes too, if that crosses fewer
bytes. Constants are free on both sides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import networkx
import onnx

from stca.errors import SplitError
from stca.export.analysis import operators
from stca.export.analysis.cost import NominalSizes
from stca.export.analysis.scope import Dataflow, Scope, explain, label, require_sides, walk

DEFAULT_FLOPS_PER_BYTE: Final = 16.0
# The price of a row of a table outside the graphs: of a mapped file, rows of up to 70 bytes are state rather than ids.
DEFAULT_FLOPS_PER_ROW: Final = 1000.0

# A request dependency is reported when it keeps at least this part of the user and request work out of the cache.
HEAVY: Final = 0.01


@dataclass(frozen=True)
class RequestDependency:
    """A place where history first meets a request input, so that what follows cannot be cached.

    Attributes:
        value: the first value that depends on both.
        path: value names from the request input to `value`.
        encodings: request-scope values behind it that targets read.
        flops: request-scope work from `value` on, per request.
        bytes: of `encodings`.
    """

    value: str
    path: tuple[str, ...]
    encodings: tuple[str, ...]
    flops: int
    bytes: int

    def __str__(self) -> str:
        shown = ", ".join(map(repr, self.encodings[:4])) + (" …" if len(self.encodings) > 4 else "")
        return (
            f"history encoding {shown} depends on request input {self.path[0]!r} via {' → '.join(self.path)}; "
            f"{self.flops / 1e9:.3g} GFLOP of history work per request cannot be cached"
        )


class Cut:
    """The decision: which user-scope nodes the scorer recomputes, and what it follows from. Nodes go by number.

    `never` are values that may not be in the state; inputs are not among them.
    """

    def __init__(self, model: onnx.ModelProto, scopes: Mapping[str, Scope], sizes: NominalSizes) -> None:
        self.model, self.scopes, self.sizes = model, scopes, sizes
        self.never: Collection[str] = ()
        self.flow = Dataflow(model.graph)
        self.nodes = model.graph.node
        self.inputs = [value.name for value in model.graph.input]
        self.outputs = [value.name for value in model.graph.output]
        self.live, _ = self.flow.needed(self.outputs)

    def scope(self, node: int) -> Scope:
        return max((self.scopes[name] for name in self.flow.reads[node]), default=Scope.CONSTANT)

    def of_scope(self, scope: Scope) -> list[int]:
        return [i for i in sorted(self.live) if self.scope(i) == scope]

    def work(self, scope: Scope) -> int:
        return sum(self.sizes.work(self.nodes[i]) for i in self.of_scope(scope))

    def readers(self, name: str) -> list[int]:
        return [i for i in self.flow.readers.get(name, ()) if i in self.live]

    def writes(self, node: int) -> list[str]:
        return [name for name in self.nodes[node].output if name]

    def refuse_hopeless(self, verbatim: bool = False) -> None:
        """Raise SplitError when there is nothing to cut, or a cached node would draw random numbers.

        Args:
            verbatim: whether user inputs as they came are state enough, as where a lifted graph shares them.
        """
        require_sides(self.scopes.values())
        if not any(self.scopes[name] == Scope.TARGET for name in self.outputs):
            raise SplitError(
                "no output depends on a target input, so there is nothing to score; give the inputs that differ "
                "between the items of one request the scope target (--target-inputs, or in their TensorSpec)"
            )
        of_user = [n for n in self.inputs if self.scopes[n] == Scope.USER]
        if verbatim and not any(map(self.readers, of_user)):
            raise SplitError(
                f"no score depends on a user input, so nothing can be cached: the model does not use "
                f"{', '.join(of_user):.200}; use it, or check the inputs' scopes"
            )
        if not verbatim and not self.of_scope(Scope.USER):
            raise SplitError(
                f"no node depends on user inputs alone, so there is no work to cache{self._first_met()}; encode the "
                "history before it joins those, or check the inputs' scopes"
            )
        for i in (*self.of_scope(Scope.USER), *self.of_scope(Scope.CONSTANT)):
            for node in walk([self.nodes[i]]):
                if node.op_type in operators.RANDOM:
                    raise SplitError(
                        f"node {label(node)!r} ({node.op_type}) draws random numbers, so its value cannot be cached; "
                        "export the model in evaluation mode"
                    )

    def _first_met(self) -> str:
        """Where a user's input first meets a target's or a request's."""
        for node, read in zip(self.nodes, self.flow.reads, strict=True):
            mine = [n for n in read if self.scopes[n] == Scope.USER]
            others = [n for n in read if self.scopes[n] > Scope.USER]
            if mine and others:
                return f": {label(node)!r} ({node.op_type}) reads {mine[0]!r} together with {others[0]!r}"
        return ""

    def recomputed(self, flops_per_byte: Fraction) -> set[int]:
        """The minimum cut. Capacities are exact integers that order cuts by cost first, by recomputed work second.

        A node on the scorer's side is cut from the encoder at its work. A value hangs between its writer and its
        readers: with the writer on the encoder's side and any reader on the scorer's, its bytes are cut, once.
        Nothing ties a node of the encoder to its inputs' writers: what the encoder needs, it may compute for itself.
        """
        encoder, scorer = "encoder", "scorer"
        user = self.of_scope(Scope.USER)
        bytes_unit = flops_per_byte.numerator * (self.work(Scope.USER) + 1)
        work_unit = flops_per_byte.denominator * (self.work(Scope.USER) + 1) + 1
        graph = networkx.DiGraph()

        def add_value(name: str, source: object) -> None:
            size = None if name in self.never else self.sizes.bytes(name)
            bound = {} if size is None else {"capacity": size * bytes_unit}  # no capacity: must not be cut
            graph.add_edge(source, ("value", name), **bound)
            for reader in self.readers(name):
                is_user = self.scope(reader) == Scope.USER
                graph.add_edge(("value", name), ("node", reader) if is_user else scorer)
            if name in self.outputs:
                graph.add_edge(("value", name), scorer)

        for name in self.inputs:
            if self.scopes[name] == Scope.USER:
                add_value(name, encoder)
        for i in user:
            graph.add_edge(encoder, ("node", i), capacity=self.sizes.work(self.nodes[i]) * work_unit)
            for name in self.writes(i):
                add_value(name, ("node", i))
        try:
            _, (_, right) = networkx.minimum_cut(graph, encoder, scorer)
        except networkx.NetworkXUnbounded as e:
            user_inputs = (name for name in self.inputs if self.scopes[name] == Scope.USER)
            stuck = next(name for name in user_inputs if self.sizes.bytes(name) is None)
            raise SplitError(
                f"user input {stuck!r} is not a tensor of numbers of known rank and reaches the targets as such, so it "
                "cannot be cached; encode it before the graph, or make it a request input"
            ) from e
        return {i for i in user if ("node", i) in right}

    def crossing(self, recomputed: set[int]) -> list[str]:
        """User-scope values that the scorer reads and does not make, in graph order: the state."""

        def crosses(name: str) -> bool:
            if self.scopes[name] != Scope.USER or self.flow.writer.get(name) in recomputed:
                return False
            scorer_reads = (i in recomputed or self.scope(i) > Scope.USER for i in self.readers(name))
            return name in self.outputs or any(scorer_reads)

        made = (name for i in sorted(self.live) for name in self.writes(i))
        return [name for name in (*self.inputs, *made) if crosses(name)]

    def request_dependencies(self, marks: Mapping[str, Scope | str]) -> tuple[RequestDependency, ...]:
        """Where user values first meet request values, and what hangs on it; the light ones are left out."""
        mixed: set[str] = set()
        found = []
        heavy = HEAVY * (self.work(Scope.USER) + self.work(Scope.REQUEST))
        for i in self.of_scope(Scope.REQUEST):
            names = self.flow.reads[i]
            first = mixed.isdisjoint(names)
            if first and all(self.scopes[name] != Scope.USER for name in names):
                continue
            mixed.update(self.writes(i))
            if first and (dependency := self._dependency(i, marks)).flops >= heavy:
                found.append(dependency)
        return tuple(found)

    def _dependency(self, node: int, marks: Mapping[str, Scope | str]) -> RequestDependency:
        behind, open_nodes = {node}, [node]
        while open_nodes:
            for name in self.writes(open_nodes.pop()):
                new = {i for i in self.readers(name) if self.scope(i) == Scope.REQUEST} - behind
                behind |= new
                open_nodes.extend(new)
        made = [name for i in sorted(behind) for name in self.writes(i)]
        last = [n for n in made if n in self.outputs or any(self.scope(i) == Scope.TARGET for i in self.readers(n))]
        value = self.writes(node)[0]
        return RequestDependency(
            value=value,
            path=explain(self.model, marks, value, Scope.REQUEST),
            encodings=tuple(last),
            flops=sum(self.sizes.work(self.nodes[i]) for i in behind),
            bytes=sum(self.sizes.bytes(name) or 0 for name in last),
        )
