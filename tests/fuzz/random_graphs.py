"""Seeded random recommenders as ONNX graphs: pointwise ones whose batch axis users and targets share, and others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from cases import Case
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int | str, ...]
OPSET, TABLE, EVENTS, TARGETS = 20, 11, 9, 7
UNARY = ("Relu", "Tanh", "Sigmoid", "Neg", "Abs", "Softplus", "Erf", "Identity", "Sin")
REDUCE = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2")


@dataclass(frozen=True)
class Value:
    """A float32 value: its sizes, and whether it depends on the user's and on the targets' inputs."""

    name: str
    shape: Shape
    user: bool
    target: bool


def random_case(seed: int) -> Case:
    """The case of that number: always the same graph and the same request."""
    rng = np.random.default_rng(seed)
    return _Grower(rng, pointwise=bool(rng.integers(0, 3))).case(f"random/{seed}")


class _Grower:
    """Adds inputs, then operators on values drawn from those there are, then an output per target."""

    def __init__(self, rng: np.random.Generator, pointwise: bool) -> None:
        self.rng, self.pointwise = rng, pointwise
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.values: list[Value] = []
        self.scopes: dict[str, str] = {}
        self.request: dict[str, NDArray[Any]] = {}
        self.ids: list[tuple[str, Shape]] = []
        self.width = int(rng.choice([2, 4]))

    def case(self, name: str) -> Case:
        rows = ("B", "B") if self.pointwise else (1, "N_t")
        history = ("B", "L") if self.pointwise else ("N_h",)
        self.id_input("history", "user", history)
        if self.chance(0.5):
            self.float_input("profile", "user", (rows[0], self.width))
        if self.chance(0.3):
            self.float_input("mask", "user", history)
        if self.chance(0.2):
            self.float_input("context", "request", (rows[0], self.width))
        self.id_input("item", "target", (rows[1],))
        if self.chance(0.3):
            self.float_input("price", "target", (rows[1], self.width))
        moves = [getattr(self, m) for m in dir(type(self)) if m.startswith("add_")]
        for _ in range(int(self.rng.integers(3, 16))):
            moves[self.rng.integers(len(moves))]()
        output = self.output()
        graph = helper.make_graph(self.nodes, "fuzz", self.inputs, [output], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        whole = dict(self.request)
        if self.pointwise:
            copied = [n for n, scope in self.scopes.items() if scope != "target"]
            whole |= {n: np.repeat(self.request[n], TARGETS, axis=0) for n in copied}
        return Case(name, model, self.scopes, self.request, whole)

    # Small helpers.

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, good: Callable[[Value], bool] = lambda _: True) -> Value | None:
        found = [v for v in self.values if good(v)]
        # Late values more often, so that chains grow long.
        return found[int(len(found) * self.rng.random() ** 0.5)] if found else None

    def constant(self, array: NDArray[Any]) -> str:
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def weight(self, *shape: int) -> str:
        return self.constant((self.rng.standard_normal(shape) * 0.7).astype(np.float32))

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def node(self, op: str, inputs: list[str], outputs: int = 1, **attributes: Any) -> list[str]:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, f"n{len(self.nodes)}_{op}", **attributes))
        return names

    def value(self, op: str, inputs: list[str], shape: Shape, *of: Value, **attributes: Any) -> Value:
        return self.named(self.node(op, inputs, **attributes)[0], shape, *of)

    def named(self, name: str, shape: Shape, *of: Value) -> Value:
        made = Value(name, shape, any(v.user for v in of), any(v.target for v in of))
        self.values.append(made)
        return made

    def sized(self, shape: Shape, scope: str) -> list[int]:
        known = {"B": TARGETS if scope == "target" else 1, "L": EVENTS, "N_h": EVENTS, "N_t": TARGETS}
        return [n if isinstance(n, int) else known[n] for n in shape]

    def float_input(self, name: str, scope: str, shape: Shape) -> None:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        self.scopes[name] = scope
        self.request[name] = self.rng.standard_normal(self.sized(shape, scope)).astype(np.float32)
        self.values.append(Value(name, shape, scope == "user", scope == "target"))

    def id_input(self, name: str, scope: str, shape: Shape) -> None:
        kind = TensorProto.INT32 if self.chance(0.2) else TensorProto.INT64
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        self.scopes[name] = scope
        ids = self.rng.integers(0, TABLE, self.sized(shape, scope))
        self.request[name] = ids.astype(helper.tensor_dtype_to_np_dtype(kind))
        of = Value(name, shape, scope == "user", scope == "target")
        self.ids.append((name, shape))
        table = TABLE
        if self.chance(0.2):  # fields share a table, told apart by offsets
            offset = self.constant(np.array(3, helper.tensor_dtype_to_np_dtype(kind)))
            name, table = self.node("Add", [name, offset])[0], TABLE + 3
        self.value("Gather", [self.weight(table, self.width), name], (*shape, self.width), of)

    # Each adds one thing that models do; one that finds no value to do it on adds nothing.

    def add_unary(self) -> None:
        if v := self.pick():
            self.value(str(self.rng.choice(UNARY)), [v.name], v.shape, v)

    def add_linear(self) -> None:
        if v := self.pick(lambda v: isinstance(v.shape[-1], int)):
            width = int(self.rng.choice([1, 2, 4]))
            made = self.value("MatMul", [v.name, self.weight(v.shape[-1], width)], (*v.shape[:-1], width), v)
            self.value("Add", [made.name, self.weight(width)], made.shape, made)

    def add_gemm(self) -> None:
        if v := self.pick(lambda v: len(v.shape) == 2 and isinstance(v.shape[1], int)):
            width = int(self.rng.choice([1, 2, 4]))
            weight = self.weight(width, v.shape[1])
            self.value("Gemm", [v.name, weight, self.weight(width)], (v.shape[0], width), v, transB=1)

    def add_norm(self) -> None:
        if v := self.pick(lambda v: isinstance(v.shape[-1], int) and v.shape[-1] > 1):
            self.value("LayerNormalization", [v.name, self.weight(v.shape[-1])], v.shape, v, axis=-1)

    def add_softmax(self) -> None:
        if v := self.pick(lambda v: len(v.shape) > 1):
            self.value("Softmax", [v.name], v.shape, v, axis=int(self.rng.integers(1, len(v.shape))))

    def add_reduce(self) -> None:
        # Over the first axis rows would see each other: pointwise models must not, and some do.
        first = 0 if not self.pointwise or self.chance(0.05) else 1
        if v := self.pick(lambda v: len(v.shape) > 1):
            axis, keep = int(self.rng.integers(first, len(v.shape))), self.chance(0.5)
            shape = tuple(1 if i == axis else n for i, n in enumerate(v.shape) if keep or i != axis)
            self.value(str(self.rng.choice(REDUCE)), [v.name, self.ints(axis)], shape, v, keepdims=int(keep))

    def add_binary(self) -> None:
        a, b = self.pick(), self.pick()
        if a and b and (shape := _broadcast(a.shape, b.shape)):
            self.value(str(self.rng.choice(["Add", "Mul", "Sub", "Max", "Min"])), [a.name, b.name], shape, a, b)

    def add_concat(self) -> None:
        a = self.pick(lambda v: len(v.shape) > 1)
        if a and (b := self.pick(lambda v: len(v.shape) == len(a.shape))):
            for axis in self.rng.permutation(len(a.shape)):
                if all(i == axis or n == m for i, (n, m) in enumerate(zip(a.shape, b.shape, strict=True))):
                    size = _sum(a.shape[axis], b.shape[axis])
                    shape = tuple(size if i == axis else n for i, n in enumerate(a.shape))
                    if axis or not self.pointwise:
                        self.value("Concat", [a.name, b.name], shape, a, b, axis=int(axis))
                    return

    def add_axis(self) -> None:
        if v := self.pick(lambda v: len(v.shape) < 4):
            axis = int(self.rng.integers(1, len(v.shape) + 1))
            self.value("Unsqueeze", [v.name, self.ints(axis)], (*v.shape[:axis], 1, *v.shape[axis:]), v)

    def add_transpose(self) -> None:
        if v := self.pick(lambda v: len(v.shape) > 2):
            order = [0, *(1 + self.rng.permutation(len(v.shape) - 1)).tolist()]
            self.value("Transpose", [v.name], tuple(v.shape[i] for i in order), v, perm=order)

    def add_expand(self) -> None:
        """Over another value's events, by its Shape."""
        v = self.pick(lambda v: len(v.shape) == 3 and v.shape[1] == 1)
        if v and (like := self.pick(lambda w: len(w.shape) == 3 and w.shape[0] == v.shape[0] and w.shape[1] != 1)):
            (size,) = self.node("Shape", [like.name], start=1, end=2)
            (shape,) = self.node("Concat", [self.ints(1), size, self.ints(1)], axis=0)
            self.value("Expand", [v.name, shape], (v.shape[0], like.shape[1], v.shape[2]), v, like)

    def add_flat_rows(self) -> None:
        """As layers for tables are put over sequences: all rows in one axis, and back."""
        if v := self.pick(lambda v: len(v.shape) == 3 and isinstance(v.shape[2], int)):
            (flat,) = self.node("Reshape", [v.name, self.ints(-1, v.shape[2])])
            (made,) = self.node("MatMul", [flat, self.weight(v.shape[2], 2)])
            (sizes,) = self.node("Shape", [v.name], start=0, end=2)
            (shape,) = self.node("Concat", [sizes, self.ints(2)], axis=0)
            self.value("Reshape", [made, shape], (*v.shape[:2], 2), v)

    def add_heads(self) -> None:
        if v := self.pick(lambda v: len(v.shape) in (2, 3) and v.shape[-1] in (4, 8)):
            size = v.shape[-1] // 2
            shape = self.ints(*(0 for _ in v.shape[:-1]), 2, size)
            self.value("Reshape", [v.name, shape], (*v.shape[:-1], 2, size), v)

    def add_attention(self) -> None:
        """A target, or what stands for one, to the events of its row."""
        keys = self.pick(lambda v: len(v.shape) == (3 if self.pointwise else 2) and isinstance(v.shape[-1], int))
        if not keys or keys.shape[-2] in (1, "N_t"):
            return
        q = self.pick(lambda v: len(v.shape) == 2 and v.shape[1] == keys.shape[-1] and v.shape[0] in ("B", "N_t"))
        if not q:
            return
        one, two = ("bd,bld->bl", "bl,bld->bd") if self.pointwise else ("bd,ld->bl", "bl,ld->bd")
        logits = self.value("Einsum", [q.name, keys.name], (q.shape[0], keys.shape[-2]), q, keys, equation=one)
        weights = self.value("Softmax", [logits.name], logits.shape, logits, axis=-1)
        self.value("Einsum", [weights.name, keys.name], q.shape, weights, keys, equation=two)

    def add_scores_by_product(self) -> None:
        a = self.pick(lambda v: len(v.shape) == 3 and isinstance(v.shape[2], int))
        if a and (
            b := self.pick(lambda v: len(v.shape) == 3 and v.shape[0] == a.shape[0] and v.shape[2] == a.shape[2])
        ):
            (turned,) = self.node("Transpose", [b.name], perm=[0, 2, 1])
            self.value("MatMul", [a.name, turned], (*a.shape[:2], b.shape[1]), a, b)

    def add_last_event(self) -> None:
        axis = 1 if self.pointwise else 0
        if v := self.pick(lambda v: len(v.shape) == axis + 2 and v.shape[axis] in ("L", "N_h")):
            if self.chance(0.5):
                made = self.value("Gather", [v.name, self.ints(-1)], _put(v.shape, axis, 1), v, axis=axis)
                if self.pointwise:
                    self.value("Squeeze", [made.name, self.ints(1)], (v.shape[0], v.shape[2]), made)
            else:
                inputs = [v.name, self.ints(-4), self.ints(1 << 40), self.ints(axis)]
                self.value("Slice", inputs, _put(v.shape, axis, 4), v)

    def add_mask(self) -> None:
        """Events of id 0 are padding."""
        name, shape = self.ids[self.rng.integers(len(self.ids))]
        if v := self.pick(lambda v: len(v.shape) == len(shape) + 1 and v.shape[:-1] == shape):
            (cast,) = self.node("Cast", [name], to=TensorProto.INT64)
            (real,) = self.node("Greater", [cast, self.ints(0)])
            (real,) = self.node("Unsqueeze", [real, self.ints(-1)])
            self.value("Where", [real, v.name, self.constant(np.float32(-3.0))], v.shape, v)

    def add_same_category(self) -> None:
        """Which events share the target's id, as hard search asks."""
        if self.pointwise and self.request["history"].dtype == self.request["item"].dtype:
            (target,) = self.node("Unsqueeze", ["item", self.ints(1)])
            (same,) = self.node("Equal", ["history", target])
            both = (Value("history", (), True, False), Value("item", (), False, True))
            self.value("Cast", [same], ("B", "L"), *both, to=TensorProto.FLOAT)

    def add_double(self) -> None:
        if v := self.pick():
            (wide,) = self.node("Cast", [v.name], to=int(self.rng.choice([TensorProto.DOUBLE, TensorProto.FLOAT16])))
            self.value("Cast", self.node("Tanh", [wide]), v.shape, v, to=TensorProto.FLOAT)

    def add_split(self) -> None:
        if v := self.pick(lambda v: v.shape[-1] in (2, 4)):
            half = v.shape[-1] // 2
            for name in self.node("Split", [v.name], 2, axis=-1, num_outputs=2):
                self.named(name, (*v.shape[:-1], half), v)

    def add_top_k(self) -> None:
        if v := self.pick(lambda v: len(v.shape) > 1 and v.shape[-1] in ("L", "N_h", 4)):
            values, _ = self.node("TopK", [v.name, self.ints(2)], 2, axis=-1)
            self.named(values, (*v.shape[:-1], 2), v)

    def add_cumulative(self) -> None:
        if v := self.pick(lambda v: len(v.shape) > 1):
            axis = self.constant(np.array(self.rng.integers(1, len(v.shape)), np.int64))
            self.value("CumSum", [v.name, axis], v.shape, v)

    def add_recurrent(self) -> None:
        v = self.pick(lambda v: len(v.shape) == 3 and isinstance(v.shape[2], int) and v.shape[1] in ("L", 4))
        if v and self.pointwise:
            hidden = 2
            (turned,) = self.node("Transpose", [v.name], perm=[1, 0, 2])
            weights = [self.weight(1, 3 * hidden, v.shape[2]), self.weight(1, 3 * hidden, hidden)]
            every, last = self.node("GRU", [turned, *weights], 2, hidden_size=hidden)
            if self.chance(0.5):
                self.value("Squeeze", [last, self.ints(0)], (v.shape[0], hidden), v)
            else:
                (flat,) = self.node("Squeeze", [every, self.ints(1)])
                self.value("Transpose", [flat], (v.shape[0], v.shape[1], hidden), v, perm=[1, 0, 2])

    def add_positions(self) -> None:
        axis = 1 if self.pointwise else 0
        if v := self.pick(lambda v: len(v.shape) == axis + 2 and v.shape[axis] in ("L", "N_h")):
            (size,) = self.node("Shape", [v.name], start=axis, end=axis + 1)
            (size,) = self.node("Squeeze", [size])
            zero, one = (self.constant(np.array(n, np.int64)) for n in (0, 1))
            (places,) = self.node("Range", [zero, size, one])
            (places,) = self.node("Cast", [places], to=TensorProto.FLOAT)
            (places,) = self.node("Unsqueeze", [places, self.ints(1)])
            self.value("Add", [v.name, self.node("Sin", [places])[0]], v.shape, v)

    def add_zeros_like(self) -> None:
        if v := self.pick(lambda v: len(v.shape) == 2):
            (shape,) = self.node("Shape", [v.name])
            fill = numpy_helper.from_array(np.array([0.5], np.float32))
            self.value("ConstantOfShape", [shape], v.shape, v, value=fill)

    def output(self) -> onnx.ValueInfoProto:
        """One or two scores for each target, from a value that depends on both sides where there is one."""
        rows = "B" if self.pointwise else "N_t"

        def per_target(v: Value) -> bool:
            return v.shape[:1] == (rows,) and v.target

        best = self.pick(lambda v: per_target(v) and v.user) or self.pick(per_target)
        assert best is not None, "the target's own embedding is always there"
        axes = list(range(1, len(best.shape)))
        (score,) = self.node("ReduceMean", [best.name, self.ints(*axes)], keepdims=0) if axes else [best.name]
        user = self.pick(lambda v: v.user and not v.target)
        if user and (not best.user or self.chance(0.3)):
            first = 1 if self.pointwise else 0
            axes = list(range(first, len(user.shape)))
            pooled = self.node("ReduceMean", [user.name, self.ints(*axes)], keepdims=0)[0] if axes else user.name
            (score,) = self.node("Mul", [score, pooled])
        if self.chance(0.3):
            (score,) = self.node("Unsqueeze", [score, self.ints(1)])
            shape: Shape = (rows, 1)
        else:
            shape = (rows,)
        self.nodes.append(helper.make_node("Sigmoid", [score], ["score"], "score"))
        return helper.make_tensor_value_info("score", TensorProto.FLOAT, shape)


def _broadcast(a: Shape, b: Shape) -> Shape | None:
    """What two shapes broadcast to, when sizes of other names never meet; None when they do not."""
    longest = max(len(a), len(b))
    a, b = ((1,) * (longest - len(s)) + s for s in (a, b))
    if any(x != y and 1 not in (x, y) for x, y in zip(a, b, strict=True)):
        return None
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


def _sum(a: int | str, b: int | str) -> int | str:
    return a + b if isinstance(a, int) and isinstance(b, int) else f"{a}+{b}"


def _put(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])
