"""A split graph as a handful of blocks: what a person would draw on a board, found from the dataflow alone.

Nothing goes by name, so a foreign model condenses like the reference one. Attention is where history meets targets: an
attention operator, or MatMul → Softmax → MatMul, that reads a value of the user's and one of the targets'. Every other
node belongs where it leads: to one attention layer, to several (tokens, embeddings), or past all of them (the head).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import onnx

from stca.bundle import Bundle
from stca.checks.forecast import counted
from stca.export.analysis import operators
from stca.export.analysis.scope import Scope, reads
from stca.specs import ITEM_BYTES, OFFSETS, Lookup, StateSpec

Side = Literal["user", "target"]
Value = tuple[Side, str]

# Ends of edges that are no blocks: ("in", scope), ("state", name) and ("out", "").
Key = tuple[str, int | str]

# A block of the scorer's that is not per target, and does less of the work than this, is not drawn on its own.
LIGHT = 1e-3

# More attention layers than this are drawn as the first two, the ones between, and the last.
MOST_LAYERS = 6


LABELS: Mapping[str, str] = {
    "tokens": "History tokens",
    "encode": "History encoding",
    "features": "User features",
    "request_tokens": "History with request",
    "request_encode": "History encoding",
    "per_request": "Once per request",
    "attention": "Attention",
    "query": "Query path",
    "target": "Target embedding",
    "head": "Head",
}


@dataclass(frozen=True)
class Block:
    """Nodes that are drawn as one box.

    Attributes:
        kind: a key of `LABELS`.
        row: the layer's row, from 1; 0 when it belongs to no single layer.
        side: the half it runs in.
        scope: the highest among its nodes.
        operators: how often each operator occurs.
        flops: floating-point operations of a nominal request.
    """

    kind: str
    row: int
    side: Side
    scope: Scope
    operators: Mapping[str, int]
    flops: int

    @property
    def key(self) -> Key:
        return self.kind, self.row


@dataclass(frozen=True)
class State:
    """One state tensor: where it crosses the cut, and its bytes at the nominal workload.

    `row` is the layer that alone reads it; 0 when several do; None when it is no part of the attention's history.
    """

    name: str
    about: str
    bytes: int
    bytes_per_token: int
    row: int | None


@dataclass(frozen=True)
class Condensed:
    """Blocks, state tensors, and the edges between them; `rows` are the first and last layer of each row drawn."""

    blocks: tuple[Block, ...]
    state: tuple[State, ...]
    inputs: Mapping[str, tuple[str, ...]]
    outputs: tuple[str, ...]
    edges: frozenset[tuple[Key, Key]]
    rows: tuple[tuple[int, int], ...]
    flops: int

    def row_name(self, row: int) -> str:
        """`layer 2`, or `layers 3–11`."""
        first, last = self.rows[row - 1]
        return f"layer {first}" if first == last else f"layers {first}–{last}"

    def side_flops(self, side: Side) -> int:
        """Work of one half."""
        return sum(b.flops for b in self.blocks if b.side == side)


def condense(bundle: Bundle) -> Condensed:
    """The blocks of a bundle's two halves, joined where the state crosses."""
    return _Joined(bundle).condensed()


def ids_of(bundle: Bundle, graph: str, lookup: Lookup) -> list[str]:
    """The inputs of a graph by which rows are looked up."""
    spec = bundle.manifest.graphs[graph]
    if spec.ids is None or lookup.ids in {s.name for s in spec.inputs}:
        return [lookup.ids]
    return [v.name for v in onnx.load(bundle.path / spec.ids).graph.input]


@dataclass(frozen=True)
class _Node:
    side: Side
    proto: onnx.NodeProto
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    scope: Scope
    work: int


class _Joined:
    """Both halves as one list of nodes in topological order; a value is named by its half and its name."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self.manifest = manifest
        self.workload: Mapping[str, int] = manifest.split["workload"]
        self.nodes: list[_Node] = []
        self.scopes: dict[Value, Scope] = {}
        self.alias: dict[Value, Value] = {}  # what an Identity writes is what it reads
        state = {s.name for s in manifest.state}
        sides: tuple[tuple[str, Side], ...] = (("user_encoder", "user"), ("target_scorer", "target"))
        for graph, side in sides:
            for spec in manifest.graphs[graph].inputs:
                if spec.scope is not None:
                    self.scopes[side, spec.name] = Scope.of(spec.scope)
                elif spec.name in state:
                    self.alias[side, spec.name] = self.source(("user", spec.name))
            for lookup in manifest.graphs[graph].lookups or ():  # rows stand where their ids stood
                ids = [self.source((side, name)) for name in ids_of(bundle, graph, lookup)]
                self.alias[side, lookup.rows] = max(ids, key=self.scopes.__getitem__)
            model, sizes = counted(bundle, graph, self.workload)
            for proto in model.graph.node:
                self._add(side, proto, sizes.work(proto))

    def _add(self, side: Side, proto: onnx.NodeProto, work: int) -> None:
        """Constants and nodes of constants alone are left out: they are a part of whatever reads them."""
        known = tuple(self.source((side, name)) for name in reads(proto))
        known = tuple(value for value in known if value in self.scopes)
        writes: tuple[Value, ...] = tuple((side, name) for name in proto.output if name)
        if not known:
            return
        if proto.op_type == "Identity":
            self.alias[writes[0]] = known[0]
            return
        scope = max(self.scopes[value] for value in known)
        self.scopes.update((value, scope) for value in writes)
        self.nodes.append(_Node(side, proto, known, writes, scope, work))

    def source(self, value: Value) -> Value:
        return self.alias.get(value, value)

    @cached_property
    def writer(self) -> dict[Value, int]:
        return {value: i for i, node in enumerate(self.nodes) for value in node.writes}

    @cached_property
    def readers(self) -> dict[Value, list[int]]:
        table: dict[Value, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for value in node.reads:
                table.setdefault(value, []).append(i)
        return table

    @cached_property
    def outputs(self) -> list[Value]:
        return [self.source(("target", spec.name)) for spec in self.manifest.graphs["target_scorer"].outputs]

    # Attention.

    @cached_property
    def layers(self) -> dict[int, int]:
        """Attention layer of each node that is a part of one, from 1: its core, and what only its output feeds."""
        layers: dict[int, int] = {}
        for i in range(len(self.nodes)):
            core = self._core(i)
            if core and not any(j in layers for j in core):
                layer = max(layers.values(), default=0) + 1
                layers.update(dict.fromkeys(core, layer))
        for i, node in enumerate(self.nodes):
            found = {layers.get(self.writer.get(v, -1), 0) for v in node.reads if v not in self.extents}
            if i not in layers and len(found) == 1 and 0 not in found:
                layers[i] = found.pop()
        return layers

    @cached_property
    def extents(self) -> set[Value]:
        """Values that are sizes of others, and what is computed of sizes alone."""
        found: set[Value] = set()
        for node in self.nodes:
            if node.proto.op_type in operators.SIZES or found.issuperset(node.reads):
                found.update(node.writes)
        return found

    def _core(self, i: int) -> list[int]:
        """The nodes of the attention that node `i` is the heart of; empty when it is none."""
        node = self.nodes[i]
        if node.scope != Scope.TARGET:
            return []
        if "Attention" in node.proto.op_type:
            return [i] if self._meets(node.reads) else []
        if node.proto.op_type != "Softmax":
            return []
        before, after = self._chain(i, back=True), self._chain(i, back=False)
        return [*before, i, *after] if before and after and self._meets(self.nodes[before[-1]].reads) else []

    def _chain(self, i: int, *, back: bool) -> list[int]:
        """Nodes from `i`, itself left out, to the nearest matrix product up or down a chain of carriers."""
        chain: list[int] = []
        while True:
            if back:
                i = self.writer.get(self._carried(i), -1)
            else:
                found = self.readers.get(self.nodes[i].writes[0], [])
                i = found[0] if len(set(found)) == 1 else -1
            if i < 0 or self.nodes[i].proto.op_type not in operators.CARRIES_A_MASK | operators.PRODUCTS:
                return []
            chain.append(i)
            if self.nodes[i].proto.op_type in operators.PRODUCTS:
                return chain

    def _meets(self, values: Iterable[Value]) -> bool:
        """Whether one of `values` is the history's, perhaps expanded to the targets, and another a target's."""
        values = tuple(values)
        origins = [self.scopes[self._origin(value)] for value in values]
        target = max(self.scopes[value] for value in values)
        return target == Scope.TARGET and any(s < Scope.TARGET for s in origins) and len(values) > 1

    def _origin(self, value: Value) -> Value:
        while value in self.writer and self.nodes[self.writer[value]].proto.op_type in operators.CARRIES_A_MASK:
            value = self._carried(self.writer[value])
        return value

    def _carried(self, i: int) -> Value:
        """What carrier `i` hands on: neither a size nor a condition, and of the highest scope, so no mask or bias."""
        node = self.nodes[i]
        condition = (node.side, node.proto.input[0]) if node.proto.op_type == "Where" else None
        data = [v for v in node.reads if v not in self.extents and v != condition] or node.reads
        return max(data, key=lambda v: self.scopes[v])

    # Where the other nodes belong.

    @cached_property
    def ends(self) -> list[frozenset[int]]:
        """By node: the attention layers it reaches without passing through another; 0 is an output."""
        ends: list[frozenset[int]] = [frozenset()] * len(self.nodes)
        outputs = set(self.outputs)
        for i in reversed(range(len(self.nodes))):
            found: set[int] = set()
            for value in self.nodes[i].writes:
                found |= {0} if value in outputs else set()
                for reader in self.readers.get(value, ()):
                    found |= {self.layers[reader]} if reader in self.layers else ends[reader]
            ends[i] = frozenset(found)
        return ends

    @cached_property
    def depth(self) -> list[int]:
        """By node: the last attention layer among what it depends on."""
        depth: list[int] = []
        for i, node in enumerate(self.nodes):
            behind = [depth[self.writer[value]] for value in node.reads if value in self.writer]
            depth.append(max(self.layers.get(i, 0), *behind, 0))
        return depth

    @cached_property
    def targets_alone(self) -> list[bool]:
        """By node: whether all that it depends on is of targets."""
        alone: list[bool] = []
        for node in self.nodes:
            known = (alone[self.writer[v]] if v in self.writer else self.scopes[v] == Scope.TARGET for v in node.reads)
            alone.append(all(known))
        return alone

    def _place(self, i: int) -> tuple[str, int]:
        """Kind and layer of node `i`."""
        node, ends, last = self.nodes[i], self.ends[i], max(self.layers.values(), default=0)
        single = next(iter(ends)) if len(ends) == 1 else -1
        if i in self.layers:
            return "attention", self.layers[i]
        if node.scope < Scope.TARGET:
            encode, tokens, other = (
                ("encode", "tokens", "features" if last else "tokens")
                if node.side == "user"
                else ("request_encode", "request_tokens", "per_request")
            )
            return (encode, single) if single > 0 else (other if single == 0 else tokens, 0)
        if not last:  # no attention at all: what depends on targets alone, and where they meet the user
            return ("target", 0) if self.targets_alone[i] else ("head", 0)
        if single == 0 or self.depth[i] == last:
            return "head", 0
        if single > 0:
            return "query", single
        return ("query", self.depth[i] + 1) if self.depth[i] else ("target", 0)

    def condensed(self) -> Condensed:
        rows = _rows(max(self.layers.values(), default=0))
        row_of = {layer: r for r, (first, last) in enumerate(rows, 1) for layer in range(first, last + 1)} | {0: 0}
        work = [node.work for node in self.nodes]
        total = max(1, sum(work))
        places: list[Key] = [(kind, row_of[layer]) for kind, layer in map(self._place, range(len(self.nodes)))]
        of_kind: Counter[str] = Counter()
        for (kind, _), flops in zip(places, work, strict=True):
            of_kind[kind] += flops
        light = {k for k in ("request_tokens", "request_encode") if of_kind[k] < LIGHT * total}
        places = [("per_request", 0) if kind in light else (kind, row) for kind, row in places]

        members: dict[Key, list[int]] = {}
        for i, key in enumerate(places):
            members.setdefault(key, []).append(i)
        blocks = tuple(
            Block(
                kind=str(kind),
                row=int(row),
                side=self.nodes[of[0]].side,
                scope=max(self.nodes[i].scope for i in of),
                operators=dict(Counter(self.nodes[i].proto.op_type for i in of).most_common()),
                flops=sum(work[i] for i in of),
            )
            for (kind, row), of in members.items()
        )
        edges = self._edges(places)
        specs = self.manifest.graphs["request"].inputs
        used = {name for _, name in self.scopes}
        return Condensed(
            blocks=blocks,
            state=tuple(self._state(s, edges) for s in self.manifest.state),
            inputs={
                scope: tuple(s.name for s in specs if s.scope == scope and s.name in used)
                for scope in ("user", "request", "target")
            },
            outputs=tuple(spec.name for spec in self.manifest.graphs["target_scorer"].outputs),
            edges=edges,
            rows=rows,
            flops=sum(work),
        )

    def _edges(self, places: list[Key]) -> frozenset[tuple[Key, Key]]:
        crossing: dict[Value, Key] = {self.source(("user", s.name)): ("state", s.name) for s in self.manifest.state}

        def end(value: Value) -> Key:
            return places[self.writer[value]] if value in self.writer else ("in", str(self.scopes[value]))

        edges: set[tuple[Key, Key]] = {(end(value), key) for value, key in crossing.items()}
        for i, node in enumerate(self.nodes):
            for value in node.reads:
                crosses = value[0] == "user" and node.side == "target"
                edges.add((crossing[value] if crosses else end(value), places[i]))
        edges |= {(crossing.get(value, end(value)), ("out", "")) for value in self.outputs}
        return frozenset((a, b) for a, b in edges if a != b)

    def _state(self, spec: StateSpec, edges: frozenset[tuple[Key, Key]]) -> State:
        readers = [b for a, b in edges if a == ("state", spec.name)]
        rows = {int(row) for kind, row in readers if kind in ("attention", "request_encode")}
        size = math.prod(self.workload.get(n, 1) if isinstance(n, str) else n for n in spec.shape)
        nbytes = size * ITEM_BYTES[spec.dtype]
        # Offsets and flags, too, go to every layer.
        history = spec.shape != (OFFSETS,) and nbytes >= LIGHT * self.manifest.split["state_bytes"]
        shared = len(rows) > 1 or any(kind == "request_tokens" for kind, _ in readers)
        return State(
            name=spec.name,
            about=f"{spec.dtype} [{', '.join(map(str, spec.shape))}]",
            bytes=nbytes,
            bytes_per_token=spec.bytes_per_token,
            row=0 if shared and history else rows.pop() if len(rows) == 1 and not shared else None,
        )


def _rows(layers: int) -> tuple[tuple[int, int], ...]:
    if layers <= MOST_LAYERS:
        return tuple((i, i) for i in range(1, layers + 1))
    return (1, 1), (2, 2), (3, layers - 1), (layers, layers)
