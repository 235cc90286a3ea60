"""How long should a request take? What its graphs do, counted, at the rates of a machine: a GPU's, or this CPU's own.

Counts, not simulation: a node costs the operations, elements or bytes it takes at the rate for its kind, one node after
the other. Needs `onnx`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from stca import probe
from stca.bundle import Bundle
from stca.plugins.tiling import Shape, Sizes
from stca.specs import HALVES, OFFSETS, USERS

Kind = Literal["product", "function", "along axis", "transpose", "move", "attention"]


@dataclass(frozen=True)
class Item:
    """What one node does in one run.

    Attributes:
        kind: the rate that it runs at.
        operations: of a product; elements of a function, or of what is done along an axis; pieces that change places.
        rows, weight: of a product with a constant matrix, `(rows, K)` by `weight`, `(K, N)`.
        matrices: how many pairs of matrices a product without a constant one multiplies.
        bytes: read and written, in the graph's own types.
        between: how many of them are only handed from one pointwise node to the next, which GPU engines fuse.
        shape, sizes: of an attention.
    """

    kind: Kind
    operations: int = 0
    rows: int = 0
    weight: tuple[int, int] | None = None
    matrices: int = 1
    bytes: int = 0
    between: int = 0
    shape: Shape | None = None
    sizes: Sizes | None = None


class Rates(Protocol):
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


def forecast(bundle: Bundle, rates: Rates, history: int, targets: int) -> Forecast:
    """What a request of this size should take at these rates.

    Raises:
        SplitError: when a size of the graph's inputs is not known.
    """
    encode, score = (sum(map(rates.seconds, items(bundle, half, history, targets))) for half in HALVES)
    work = {"user_encoder": encode, "target_scorer": score, "miss": encode + score, "hit": score}
    return Forecast(**{stage: rates.least(stage) + seconds for stage, seconds in work.items()})


def items(bundle: Bundle, half: str, history: int, targets: int) -> list[Item]:
    """What a half's nodes do for one request; those that cost nothing are left out."""
    from stca.export.analysis import operators
    from stca.export.analysis.scope import Scope, infer_scopes
    from stca.export.passes.lower import is_operator

    sizes = probe.row_sizes(bundle.manifest.graphs["request"].inputs, history, targets)
    model, at = counted(bundle, half, {**bundle.manifest.split.get("workload", {}), **sizes})
    scopes = infer_scopes(model, {value.name: Scope.REQUEST for value in model.graph.input})
    constant = {name for name, scope in scopes.items() if scope == Scope.CONSTANT}
    fused = _fused(model.graph)
    outputs = {value.name for value in model.graph.output}
    found = []
    for node in model.graph.node:
        if constant.issuperset(node.output):
            continue  # an engine computes it when it opens
        names = [n for n in (*node.input, *node.output) if n and n not in constant]
        moved, between = (sum(at.bytes(n) or 0 for n in some) for some in (names, [n for n in names if n in fused]))
        if is_operator(node):
            query, key, value = (at.shape(n) or (1, 1, 1) for n in node.input[:3])
            shape = _shape(query[1], key[1], key[2], value[2], node.input[1] == node.input[2])
            asked = Sizes(query[0], key[0], 1)
            item = Item("attention", at.work(node), bytes=moved, shape=shape, sizes=asked)
            # What no kernel takes counts as products.
            found.append(item if shape else dataclasses.replace(item, kind="product", sizes=None))
        elif node.op_type in operators.PRODUCTS | operators.RECURRENT | {"Attention"}:
            found.append(_product(node, at, constant, moved))
        elif node.op_type in operators.FUNCTIONS | operators.ALONG_AXIS:
            kind: Kind = "function" if node.op_type in operators.FUNCTIONS else "along axis"
            work = sum(map(at.elements, filter(None, node.output)))
            found.append(Item(kind, work, bytes=moved, between=between))
        elif node.op_type not in operators.COSTS_NOTHING or outputs & {*node.output}:
            pieces = _pieces(node, at.shape(node.output[0])) if node.op_type == "Transpose" else 0
            found.append(Item("transpose" if pieces else "move", pieces, bytes=moved, between=between))
    return found


def _product(node: Any, at: Any, constant: Container[str], moved: int) -> Item:
    """Of a product node, by the sizes `at` this workload."""
    if node.input[1] in constant:
        weight = _weight(node, at.shape(node.input[1]))
        rows = at.elements(node.output[0]) // max(1, weight[1]) if weight else 0
        return Item("product", at.work(node), rows, weight, bytes=moved)
    second = at.shape(node.input[1]) or ()
    many = node.op_type == "MatMul" and math.prod(second[:-2]) > 1
    matrices = math.prod((at.shape(node.output[0]) or (1,))[:-2]) if many else 1
    return Item("product", at.work(node), matrices=matrices, bytes=moved)


def _pieces(node: Any, shape: tuple[int, ...] | None) -> int:
    """Runs of elements that stay together while their axes change places; 0 where the last axis moves, too."""
    from stca.export.analysis.scope import attribute

    order = attribute(node, "perm", ())
    stay = next((n for n, axis in enumerate(reversed(order)) if axis != len(order) - 1 - n), len(order))
    return math.prod(shape[: len(order) - stay]) if shape and 0 < stay < len(order) else 0


def _weight(node: Any, shape: tuple[int, ...] | None) -> tuple[int, int] | None:
    """`(K, N)` of a product's second matrix; None where it is no single matrix."""
    from stca.export.analysis.scope import attribute

    if node.op_type not in ("MatMul", "Gemm") or shape is None or len(shape) != 2:
        return None
    return (shape[1], shape[0]) if attribute(node, "transB", 0) else (shape[0], shape[1])


def counted(bundle: Bundle, graph: str, workload: Mapping[str, int]) -> tuple[Any, Any]:
    """A graph of a bundle without its weights, and its `NominalSizes`: what all counts of its work follow from.

    Args:
        bundle: whose.
        graph: its name.
        workload: size of each symbolic dimension of the request graph's inputs; fixed ones stay as they are.

    Raises:
        SplitError: when a size of the graph's inputs is not known.
    """
    from stca.export.analysis.cost import NominalSizes

    model = _read(bundle.file(graph))
    shown = _growth(bundle).at(workload)
    known = {USERS: 1, OFFSETS: 2, **workload}
    for spec in bundle.manifest.graphs[graph].inputs:  # a state's sizes that inference could not follow have own names
        for n, size in zip(spec.shape, shown.get(spec.name, ()), strict=False):
            known.setdefault(str(n), size)
    return model, NominalSizes(model, known, shown=shown)


_growths: dict[tuple[Path, str], Any] = {}  # of the last bundle alone


def _growth(bundle: Bundle) -> Any:
    """Of the request graph, whose values both halves have."""
    from stca.export.analysis.growth import Growth
    from stca.runtime.tables import Lookups

    key = bundle.path, bundle.manifest.weights
    if key not in _growths:
        request, workload = bundle.manifest.graphs["request"], bundle.manifest.split.get("workload", {})
        complete = Lookups(bundle, "request").complete if request.lookups else dict
        _growths.clear()
        _growths[key] = Growth(_read(bundle.file("request")), request.inputs, workload, bundle.path, complete)
    return _growths[key]


def _shape(heads: int, key_heads: int, depth: int, value_depth: int, tied: bool) -> Shape | None:
    """The operator's shape; head sizes between those of kernels count as the next, and None is beyond all of them."""
    padded = -(-depth // 16) * 16, -(-value_depth // 16) * 16
    try:
        return Shape(heads, key_heads, *padded, "float32", tied)
    except ValueError:
        return None


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
