"""How long should a request take? What its graphs do, counted, at the rates of a machine: a GPU's, or this CPU's own.

Counts, not simulation: a node costs the operations, elements or bytes it takes at the rate for its kind, one node after
the other. Needs `onnx`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from stca.bundle import Bundle
from stca.manifest import HALVES, OFFSETS, TARGETS, TOKENS, USERS
from stca.plugins.tiling import Shape, Sizes

Kind = Literal["product", "function", "move", "attention"]


@dataclass(frozen=True)
class Item:
    """What one node does in one run.

    Attributes:
        kind: the rate that it runs at.
        operations: of a product; elements of a function.
        rows, weight: of a product with a constant matrix, `(rows, K)` by `weight`, `(K, N)`.
        bytes: read and written, in the graph's own types.
        between: how many of them are only handed from one pointwise node to the next, which GPU engines fuse.
        shape, sizes: of an attention.
    """

    kind: Kind
    operations: int = 0
    rows: int = 0
    weight: tuple[int, int] | None = None
    bytes: int = 0
    between: int = 0
    shape: Shape | None = None
    sizes: Sizes | None = None


class Machine(Protocol):
    """Something with rates."""

    def least(self, stage: str) -> float:
        """Seconds of a stage of `bench` that has next to nothing to do."""

    def seconds(self, item: Item) -> float:
        """Of one node."""


@dataclass(frozen=True)
class Forecast:
    """Seconds of each stage that `bench` measures, at one size, for one request."""

    user_encoder: float
    target_scorer: float
    miss: float
    hit: float

    def milliseconds(self) -> dict[str, float]:
        """By the names of `bench`'s stages."""
        return {stage: round(1e3 * seconds, 4) for stage, seconds in dataclasses.asdict(self).items()}


def forecast(bundle: Bundle, machine: Machine, history: int, targets: int) -> Forecast:
    """What a request of this size should take on a machine.

    Raises:
        SplitError: when a size of the graph's inputs is not known.
    """
    encode, score = (sum(map(machine.seconds, items(bundle, half, history, targets))) for half in HALVES)
    work = {"user_encoder": encode, "target_scorer": score, "miss": encode + score, "hit": score}
    return Forecast(**{stage: machine.least(stage) + seconds for stage, seconds in work.items()})


def items(bundle: Bundle, half: str, history: int, targets: int) -> list[Item]:
    """What a half's nodes do for one request; those that cost nothing are left out."""
    from stca.export.analysis import operators
    from stca.export.analysis.cost import Sizes as Nominal
    from stca.export.passes.lower import is_operator

    model = _read(bundle.file(half))
    nominal = {**bundle.manifest.split.get("workload", {}), TOKENS: history, TARGETS: targets, USERS: 1, OFFSETS: 2}
    at = Nominal(model, nominal)
    weights = {t.name for t in model.graph.initializer}
    fused = _fused(model.graph)
    outputs = {value.name for value in model.graph.output}
    found = []
    for node in model.graph.node:
        names = [n for n in (*node.input, *node.output) if n and n not in weights]
        moved, between = (sum(at.bytes(n) or 0 for n in some) for some in (names, [n for n in names if n in fused]))
        if is_operator(node):
            (tokens, key_heads, depth), value = at.shape(node.input[1]) or (1, 1, 1), at.shape(node.input[2]) or (1,)
            rows, heads = (at.shape(node.input[0]) or (1, 1))[:2]
            shape = _shape(heads, key_heads, depth, value[-1], node.input[1] == node.input[2])
            found.append(Item("attention", at.work(node), 0, None, moved, 0, shape, Sizes(rows, tokens, 1)))
        elif node.op_type in operators.PRODUCTS | operators.RECURRENT | {"Attention"}:
            out, operations = at.shape(node.output[0]) or (1,), at.work(node)
            rows = max(1, math.prod(out[:-1]))
            weight = (max(1, operations // (2 * rows * max(1, out[-1]))), out[-1])
            constant = node.op_type in ("MatMul", "Gemm") and node.input[1] in weights
            found.append(Item("product", operations, rows, weight if constant else None, moved))
        elif node.op_type in operators.FUNCTIONS | operators.ALONG_AXIS:
            found.append(Item("function", sum(map(at.elements, filter(None, node.output))), 0, None, moved, between))
        elif node.op_type not in operators.COSTS_NOTHING or outputs & {*node.output}:
            found.append(Item("move", bytes=moved, between=between))
    return found


def _shape(heads: int, key_heads: int, depth: int, value_depth: int, tied: bool) -> Shape:
    """The operator's shape; head sizes that no kernel has count as the next that one has."""
    padded = -(-depth // 16) * 16, -(-value_depth // 16) * 16
    return Shape(heads, key_heads, *padded, "float32", tied)


@functools.lru_cache(maxsize=4)
def _read(file: Path) -> Any:
    """A graph without its weights."""
    import onnx

    return onnx.load(file, load_external_data=False)


def _fused(graph: Any) -> set[str]:
    """Values that a pointwise node hands to pointwise nodes alone."""
    from stca.export.analysis.operators import ELEMENTWISE

    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    made = {n for node in graph.node if node.op_type in ELEMENTWISE for n in node.output}
    return {name for name in made if readers.get(name) and readers[name] <= ELEMENTWISE}
