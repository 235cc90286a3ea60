"""Graphs to cut: random ones with every shape of dataflow the split must survive, and the operator's own."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser

from stca.plugins import onnx_function

SIZES = {"N_h": 6, "N_t": 3, "one": 1}
FLOATS = (TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE)
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Value:
    name: str
    dtype: int
    shape: Shape  # always two axes; a string is symbolic


@dataclass
class Case:
    """A model, the scopes of its inputs, and the sizes to feed it with."""

    model: onnx.ModelProto
    scopes: dict[str, str]
    tables: dict[str, int] = field(default_factory=dict)  # id inputs and the rows of the table they look up

    def feeds(self, seed: int = 0, **sizes: int) -> dict[str, NDArray[np.generic]]:
        rng = np.random.default_rng(seed)
        made: dict[str, NDArray[np.generic]] = {}
        for value in self.model.graph.input:
            dims = value.type.tensor_type.shape.dim
            shape = [{**SIZES, **sizes}[d.dim_param] if d.dim_param else d.dim_value for d in dims]
            if value.name in self.tables:
                made[value.name] = rng.integers(0, self.tables[value.name], shape)
            else:
                dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                made[value.name] = rng.standard_normal(shape).astype(dtype)
        return made


def _broadcast(a: Shape, b: Shape) -> Shape | None:
    """The shape two values broadcast to; None when they do not."""
    if any(x != y and 1 not in (x, y) for x, y in zip(a, b, strict=True)):
        return None
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


class _Builder:
    """Grows a graph one operator at a time; every value has two axes, so that any two can meet."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.values: list[Value] = []
        self.tables: dict[str, int] = {}

    def pick(self, *, among: list[Value] | None = None) -> Value:
        values = self.values if among is None else among
        return values[self.draw(st.integers(0, len(values) - 1))]

    def weight(self, dtype: int, *shape: int) -> str:
        rng = np.random.default_rng(len(self.weights))
        array = rng.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(dtype))
        return self.constant(array)

    def constant(self, array: NDArray[np.generic]) -> str:
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def node(self, op: str, inputs: list[str], outputs: int = 1, **attributes: object) -> list[str]:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, f"n{len(self.nodes)}_{op}", **attributes))
        return names

    def value(self, dtype: int, shape: Shape, op: str, inputs: list[str], **attributes: object) -> Value:
        made = Value(self.node(op, inputs, **attributes)[0], dtype, shape)
        self.values.append(made)
        return made

    def input(self, scope: str, index: int) -> str:
        rows = {"user": "N_h", "request": "one", "target": "N_t"}[scope]
        width = self.draw(st.sampled_from((1, 2, 4)))
        name = f"{scope}_{index}"
        if self.draw(st.integers(0, 3)) == 0:  # ids, which a table widens
            self.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, [rows]))
            self.tables[name] = 5
            self.value(TensorProto.FLOAT, (rows, width), "Gather", [self.weight(TensorProto.FLOAT, 5, width), name])
        else:
            dtype = self.draw(st.sampled_from(FLOATS))
            self.inputs.append(helper.make_tensor_value_info(name, dtype, [rows, width]))
            self.values.append(Value(name, dtype, (rows, width)))
        return name

    # Each of the following adds one operator (or the few it needs) on values drawn from those there are.

    def unary(self) -> None:
        a = self.pick()
        self.value(a.dtype, a.shape, self.draw(st.sampled_from(("Neg", "Abs", "Tanh"))), [a.name])

    def cast(self) -> None:
        a = self.pick()
        to = self.draw(st.sampled_from([t for t in FLOATS if t != a.dtype]))
        self.value(to, a.shape, "Cast", [a.name], to=to)

    def transpose(self) -> None:
        a = self.pick()
        self.value(a.dtype, a.shape[::-1], "Transpose", [a.name], perm=[1, 0])

    def binary(self) -> None:
        a = self.pick()
        b = self.pick(among=[v for v in self.values if v.dtype == a.dtype and _broadcast(a.shape, v.shape)])
        shape = _broadcast(a.shape, b.shape)
        assert shape is not None
        self.value(a.dtype, shape, self.draw(st.sampled_from(("Add", "Mul"))), [a.name, b.name])

    def matmul(self) -> None:
        a = self.pick()
        partners = [v for v in self.values if v.dtype == a.dtype and v.shape[0] == a.shape[1]]
        if isinstance(a.shape[1], int) and (not partners or self.draw(st.booleans())):
            width = self.draw(st.sampled_from((1, 2, 4)))
            self.value(a.dtype, (a.shape[0], width), "MatMul", [a.name, self.weight(a.dtype, a.shape[1], width)])
        elif partners:
            b = self.pick(among=partners)
            self.value(a.dtype, (a.shape[0], b.shape[1]), "MatMul", [a.name, b.name])

    def concat(self) -> None:
        a = self.pick()
        if isinstance(a.shape[1], int) and a.shape[1] < 16:
            alike = [v for v in self.values if (v.dtype, v.shape[0]) == (a.dtype, a.shape[0])]
            b = self.pick(among=[v for v in alike if isinstance(v.shape[1], int)])
            assert isinstance(b.shape[1], int)
            self.value(a.dtype, (a.shape[0], a.shape[1] + b.shape[1]), "Concat", [a.name, b.name], axis=1)

    def split(self) -> None:
        a = self.pick()
        if isinstance(a.shape[1], int) and a.shape[1] % 2 == 0:
            for name in self.node("Split", [a.name], outputs=2, axis=1, num_outputs=2):
                self.values.append(Value(name, a.dtype, (a.shape[0], a.shape[1] // 2)))

    def mean(self) -> None:
        a = self.pick()
        self.value(a.dtype, (1, a.shape[1]), "ReduceMean", [a.name, self.constant(np.array([0]))], keepdims=1)

    def expand(self) -> None:
        """A value made as large as another, through that one's shape: a dependency that carries no numbers."""
        a = self.pick()
        b = self.pick(among=[v for v in self.values if _broadcast(a.shape, v.shape)])
        shape = _broadcast(a.shape, b.shape)
        assert shape is not None
        size = self.node("Shape", [b.name])[0]
        self.value(a.dtype, shape, "Expand", [a.name, size])

    def branch(self) -> None:
        """An If whose branches read outer values that are not among its inputs."""
        a, b = self.pick(), self.pick()
        c = self.pick(among=[v for v in self.values if (v.dtype, v.shape) == (b.dtype, b.shape)])
        total = self.node("ReduceSum", [a.name], keepdims=0)[0]
        condition = self.node("Greater", [total, self.constant(np.zeros((), helper.tensor_dtype_to_np_dtype(a.dtype)))])
        bodies = []
        for op, name in (("Add", "then"), ("Mul", "else")):
            out = f"{name}_{len(self.nodes)}"
            info = helper.make_tensor_value_info(out, b.dtype, list(b.shape))
            bodies.append(helper.make_graph([helper.make_node(op, [b.name, c.name], [out])], name, [], [info]))
        self.value(b.dtype, b.shape, "If", condition, then_branch=bodies[0], else_branch=bodies[1])


_STEPS = ("unary", "cast", "transpose", "binary", "matmul", "concat", "split", "mean", "expand", "branch")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A random graph of up to about 25 nodes, with at least one user input and a target-scope output."""
    b = _Builder(draw)
    scopes: dict[str, str] = {}
    # Most steps come before there are other inputs than the user's, so that there is something to cut.
    for scope, least, steps in (("user", 1, 6), ("request", 0, 2), ("target", 1, 3)):
        for i in range(draw(st.integers(least, 2))):
            scopes[b.input(scope, i)] = scope
        for _ in range(draw(st.integers(0, steps))):
            getattr(b, draw(st.sampled_from(_STEPS)))()
    target = next(v for v in b.values if v.shape[0] == "N_t")
    score = b.node("ReduceSum", [target.name], keepdims=0)[0]
    outputs = [helper.make_tensor_value_info(score, target.dtype, [])]
    made = [v for v in b.values if v.name not in scopes]
    unread = [v for v in b.values if not any(v.name in node.input for node in b.nodes)]
    # Ends meet the targets as they are, so that they cross at full size; or are outputs; or are dead.
    for v in (*unread, *draw(st.lists(st.sampled_from(made), max_size=3))) if made else unread:
        end = draw(st.sampled_from(("meet", "meet", "output", "dead")))
        if end == "meet":
            factor = b.node("Cast", [score], to=v.dtype)[0]
            v = Value(b.node("Mul", [v.name, factor])[0], v.dtype, v.shape)
        if end != "dead" and v.name not in {*scopes, *(o.name for o in outputs)}:
            outputs.append(helper.make_tensor_value_info(v.name, v.dtype, list(v.shape)))
    graph = helper.make_graph(b.nodes, "random", b.inputs, outputs, b.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return Case(model, scopes, b.tables)


_LN = "LayerNormalization <axis: int = -1>"


def attention_graph(form: str = "absorbed", *, d: int = 32, heads: int = 4, delta: bool = False) -> Case:
    """The STCA layer in small: ids → embedding → MLP → LayerNorm → the operator, `absorbed` or `projected`.

    With `delta`, a per-event time difference to the request is added to the embeddings, before the MLP.
    """
    d_h = d // heads
    keys = {
        "absorbed": """
            key = Unsqueeze (encoded, one)
            query_rows = MatMul (target, to_wide)
            query = Reshape (query_rows, by_head_wide)
            attended = stca.TargetHistoryAttention <scale: float = 0.25>
                (query, key, key, target_offsets, history_offsets, lengths)""",
        "projected": """
            key_rows = MatMul (encoded, to_key)
            key = Reshape (key_rows, by_head)
            value_rows = MatMul (encoded, to_value)
            value = Reshape (value_rows, by_head)
            query_rows = MatMul (target, to_key)
            query = Reshape (query_rows, by_head)
            attended = stca.TargetHistoryAttention <scale: float = 0.25>
                (query, key, value, target_offsets, history_offsets, lengths)""",
    }[form]
    time = (
        """
            waited = Sub (request_time, history_time)
            waited_float = Cast <to: int = 1> (waited)
            waited_column = Unsqueeze (waited_float, one)
            tokens = Add (embedded, waited_column)"""
        if delta
        else """
            tokens = Identity (embedded)"""
    )
    inputs = ", int64[N_h] history_time, int64[B] request_time" if delta else ""
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 18, "stca": 1]>
        request (int64[N_h] history_item, int32[B_plus_1] history_offsets, int64[N_t] target_item,
                 int32[B_plus_1] target_offsets{inputs}) => (float[N_t, k] scores)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] last = {{-1}}, int64[1] end = {{9223372036854775807}},
         int64[3] by_head = {{0, {heads}, {d_h}}}, int64[3] by_head_wide = {{0, {heads}, {d}}},
         int64[2] rows = {{0, {heads * d if form == "absorbed" else d}}}>
        {{
            embedded = Gather <axis: int = 0> (table, history_item){time}
            hidden = MatMul (tokens, to_hidden)
            gated = Tanh (hidden)
            projected = MatMul (gated, to_model)
            encoded = {_LN} (projected, gain)
            target = Gather <axis: int = 0> (table, target_item)
            begin = Slice (history_offsets, zero, last)
            finish = Slice (history_offsets, one, end)
            lengths = Sub (finish, begin){keys}
            flat = Reshape (attended, rows)
            scores = Sigmoid (flat)
        }}""")
    rng = np.random.default_rng(0)
    shapes = {
        "table": (50, d),
        "to_hidden": (d, 4 * d),
        "to_model": (4 * d, d),
        "to_key": (d, d),
        "to_value": (d, d),
        "to_wide": (d, heads * d),
    }
    used = {name for node in model.graph.node for name in node.input}
    for name, shape in {**shapes, "gain": (d,)}.items():
        if name in used:
            array = (rng.standard_normal(shape) / np.sqrt(d)).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx_function.attach(model)
    scopes = {v.name: v.name.split("_")[0].replace("history", "user") for v in model.graph.input}
    return Case(model, scopes, {"history_item": 50, "target_item": 50})


def packed_feeds(case: Case, histories: list[int], targets: list[int]) -> dict[str, NDArray[np.generic]]:
    """Feeds of `attention_graph` for requests with these numbers of history tokens and targets."""
    sizes = {"N_h": sum(histories), "N_t": sum(targets), "B": len(histories), "B_plus_1": len(histories) + 1}
    feeds = case.feeds(**sizes)
    feeds["history_offsets"] = np.cumsum([0, *histories]).astype(np.int32)
    feeds["target_offsets"] = np.cumsum([0, *targets]).astype(np.int32)
    return feeds
