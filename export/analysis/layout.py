"""How the elements of one value lie in another: found by moving indices, so that no spelling needs a case of its own.

A graph is run at two small requests. A view, a Transpose or an Expand then moves the places of its input's elements,
as numpy does, and what comes out says where each element came from. Along one axis those places are strides: an axis
that merges targets and heads falls apart into two *atoms*, each with one stride in each value that is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

import numpy as np
import onnx

from stca.arrays import Array
from stca.errors import SplitError
from stca.export.analysis.rows import Everything, attempts, draw
from stca.export.analysis.scope import Dataflow, Scope, attribute
from stca.specs import OFFSETS, TARGETS, USERS, ScopeName, TensorSpec

# Places of elements in a value, in the shape of another value that is made of them.
Places: TypeAlias = Array

# Of targets, and of the other symbolic sizes: primes, so that no other size of a small model is one of them by chance.
_TARGETS: Final = (23, 29)
_OTHERS: Final = ((11, 13), (17, 19), (31, 37), (41, 43), (47, 53))
_AS_IT_IS: Final = frozenset(("Identity", "Dropout"))
_VIEWS: Final = frozenset(("Flatten", "Reshape", "Squeeze", "Unsqueeze"))


class Layout(SplitError):
    """Elements lie in no way that strides can tell."""


@dataclass(frozen=True)
class Tried:
    """Every value of a graph in one small run; weights included."""

    values: Mapping[str, Any]
    targets: int

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value in this run."""
        found = self.values.get(name)
        if not isinstance(found, np.ndarray):
            raise Layout(f"{name!r} is no tensor")
        return tuple(found.shape)


def tried(model: onnx.ModelProto, inputs: Mapping[str, Scope | str]) -> tuple[Tried, Tried]:
    """Two runs of `model`, of other sizes wherever its inputs leave them free.

    Raises:
        Layout: when it does not run at sizes as small as these.
    """
    specs = [_spec(value, Scope.of(inputs[value.name])) for value in model.graph.input if value.name in inputs]
    names = dict.fromkeys(n for s in specs for n in s.shape if isinstance(n, str))
    others = dict(zip((n for n in names if n not in (TARGETS, OFFSETS, USERS)), _OTHERS, strict=False))
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    run, error = Everything(model), SplitError("it has no inputs")
    for integers, scale in attempts():
        try:
            made = []
            for i, targets in enumerate(_TARGETS):
                sizes = {n: pair[i] * scale for n, pair in others.items()} | {TARGETS: targets}
                feeds = draw(specs, sizes, integers)
                made.append(Tried({**weights, **feeds, **run(feeds)}, targets))
            return made[0], made[1]
        except SplitError as e:
            error = e
    raise Layout(str(error))


def _spec(value: onnx.ValueInfoProto, scope: Scope) -> TensorSpec:
    kind = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or value.name for d in kind.shape.dim]
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
    return TensorSpec(value.name, dtype, tuple(dims), cast(ScopeName, str(scope)))


def places(shape: Sequence[int]) -> Places:
    """Each element's own place."""
    return np.arange(math.prod(shape)).reshape(tuple(shape))


def before(node: onnx.NodeProto, run: Tried) -> tuple[str, Places] | None:
    """Of which value `node` only moves the elements, and whence each came; None where it does more than that."""
    if node.domain or not node.input:
        return None
    source, op, out = node.input[0], node.op_type, run.shape(node.output[0])
    own = places(run.shape(source))
    if op in _AS_IT_IS:
        return source, own
    if op in _VIEWS:
        return source, own.reshape(out)
    if op == "Transpose":
        return source, own.transpose(attribute(node, "perm", None))
    if op == "Expand":
        return source, np.broadcast_to(own, out)
    if op == "Tile":
        return source, np.tile(own, run.values[node.input[1]])
    if op == "Gather" and own.ndim and own.shape[attribute(node, "axis", 0)] == 1 == np.size(run.values[node.input[1]]):
        return source, own.reshape(out)  # the only one there is along an axis: `x[:, 0]`
    return None


def trace(flow: Dataflow, run: Tried, name: str) -> tuple[str, Places]:
    """The value that `name` is but another arrangement of, as far up as there is one, and whence each element came."""
    found = places(run.shape(name))
    while name in flow.writer and (step := before(flow.graph.node[flow.writer[name]], run)) is not None:
        name, moved = step
        found = moved.ravel()[found]
    return name, found


@dataclass(frozen=True)
class Product:
    """A product of two values as an Einsum: a label for each axis, summed over where the result has it not."""

    left: str
    right: str
    out: str
    left_labels: tuple[int, ...]
    right_labels: tuple[int, ...]
    out_labels: tuple[int, ...]

    @property
    def summed(self) -> tuple[int, ...]:
        """Labels that are summed over."""
        return tuple(x for x in dict.fromkeys((*self.left_labels, *self.right_labels)) if x not in self.out_labels)

    def at(self, name: str, labels: Sequence[int], run: Tried, where: Mapping[int, Places]) -> Places:
        """Places in an operand or the result at these coordinates by label; an axis of size 1 is broadcast."""
        shape = run.shape(name)
        steps = [math.prod(shape[i + 1 :]) if n > 1 else 0 for i, n in enumerate(shape)]
        return np.asarray(sum((where.get(x, np.int64(0)) * s for x, s in zip(labels, steps, strict=True)), np.int64(0)))

    def size(self, label: int, run: Tried) -> int:
        """How many coordinates a label has."""
        sides = ((self.left, self.left_labels), (self.right, self.right_labels))
        return max(n for name, labels in sides for x, n in zip(labels, run.shape(name), strict=True) if x == label)


def product(flow: Dataflow, run: Tried, node: onnx.NodeProto) -> Product | None:
    """`node` as a product of two values: MatMul, Gemm, Einsum, or a sum over a product; None for anything else."""
    if node.domain:
        return None
    if node.op_type == "MatMul":
        return _matmul(run, node)
    if node.op_type == "Gemm" and len(node.input) == 2 and attribute(node, "alpha", 1.0) == 1.0:
        a, b = (-1 if attribute(node, name, 0) else 1 for name in ("transA", "transB"))
        return Product(node.input[0], node.input[1], node.output[0], (0, 2)[::a], (2, 1)[::b], (0, 1))
    if node.op_type == "Einsum" and len(node.input) == 2:
        return _einsum(node)
    if node.op_type == "ReduceSum" and (i := flow.writer.get(node.input[0])) is not None:
        inner = flow.graph.node[i]
        return _sum(run, node, inner) if inner.op_type == "Mul" and not inner.domain else None
    return None


def _matmul(run: Tried, node: onnx.NodeProto) -> Product | None:
    left, right = node.input
    a, b = len(run.shape(left)), len(run.shape(right))
    if not a or not b:
        return None
    rank = max(a, b, 2) - 2  # batch labels count from the left of the longer one
    row, column, summed = rank, rank + 1, rank + 2
    batch = tuple(range(rank))
    left_labels = (summed,) if a == 1 else (*batch[rank - a + 2 :], row, summed)
    right_labels = (summed,) if b == 1 else (*batch[rank - b + 2 :], summed, column)
    out = (*batch, *((row,) if a > 1 else ()), *((column,) if b > 1 else ()))
    return Product(left, right, node.output[0], left_labels, right_labels, out)


def _einsum(node: onnx.NodeProto) -> Product | None:
    equation = attribute(node, "equation", b"").decode().replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = [*left.split(","), out]
    if not arrow or "." in equation or len(terms) != 3 or any(len(set(t)) < len(t) for t in terms):
        return None
    a, b, c = (tuple(map(ord, t)) for t in terms)
    return Product(node.input[0], node.input[1], node.output[0], a, b, c) if set(c) <= {*a, *b} else None


def _sum(run: Tried, node: onnx.NodeProto, times: onnx.NodeProto) -> Product:
    rank = len(run.shape(times.output[0]))
    axes = attribute(node, "axes", None) if len(node.input) < 2 else np.ravel(run.values[node.input[1]]).tolist()
    gone = {axis % rank for axis in axes or range(rank)}
    kept = attribute(node, "keepdims", 1)
    out = tuple(rank + axis if axis in gone else axis for axis in range(rank) if kept or axis not in gone)
    a, b = (tuple(range(rank - len(run.shape(n)), rank)) for n in times.input)
    return Product(times.input[0], times.input[1], node.output[0], a, b, out)


@dataclass(frozen=True)
class Atom:
    """A part of an axis along which each value that is looked at has one stride.

    Attributes:
        sizes: in both runs.
        strides: by value, in the first run.
    """

    sizes: tuple[int, int]
    strides: Mapping[str, int]

    @property
    def dim(self) -> int:
        """Its size where that is fixed, -1 where it is not."""
        return self.sizes[0] if self.sizes[0] == self.sizes[1] else -1


def atoms(lines: Sequence[Mapping[str, Places]]) -> list[Atom]:
    """An axis in parts, the innermost last; `lines` hold the places of each value along the axis, for both runs.

    Raises:
        Layout: when a value has no strides, or others in the two runs.
    """
    parted = [_parted(run) for run in lines]
    if len(parted[0]) != len(parted[1]):
        raise Layout("an axis is made of other parts at another size")
    return [Atom((a[0], b[0]), a[1]) for a, b in zip(parted[0], parted[1], strict=True) if a[0] != 1 or b[0] != 1]


def _parted(line: Mapping[str, Places]) -> list[tuple[int, dict[str, int]]]:
    n = len(next(iter(line.values())))
    cuts = sorted({n}.union(*(_cuts(x) for x in line.values())))
    found, inner = [], 1
    for cut in cuts:
        if cut % inner:
            raise Layout("axes are merged in different ways")
        if cut > inner:
            found.append((cut // inner, {name: int(x[inner]) for name, x in line.items()}))
        inner = cut
    for name, x in line.items():
        coordinates = np.unravel_index(np.arange(n), [size for size, _ in reversed(found)] or [1])
        steps = [strides[name] for _, strides in reversed(found)] or [0]
        if not np.array_equal(x, sum(c * s for c, s in zip(coordinates, steps, strict=True))):
            raise Layout("elements do not lie in strides")
    return found[::-1]


def _cuts(x: Places) -> set[int]:
    """Where a line's strides change: sizes of its inner parts, the whole included."""
    n, inner, found = len(x), 1, set()
    while inner < n:
        run = 1
        while inner * run < n and x[inner * run] == x[inner] * run:
            run += 1
        inner *= run
        found.add(inner)
    return found | {n}
