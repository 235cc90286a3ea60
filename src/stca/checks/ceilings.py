"""What this CPU reaches in ONNX Runtime, measured now: the rates that `stca.checks.forecast` needs.

One tiny graph for each kind of work. They are measured with the threads that requests will have, and just before or
after them, because on a machine that does other things, too, yesterday's rates are another machine's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stca.arrays import Array
from stca.bundle import Bundle, scratch
from stca.checks.forecast import Item, Kind, items
from stca.plugins import onnx_function
from stca.plugins.spec import DOMAIN, OP_NAME, OP_VERSION
from stca.plugins.tiling import Shape
from stca.runtime import OnnxRuntimeEngine
from stca.specs import HALVES

_WIDTH = 512  # of a matrix as products without a constant side have it
_MOVED: Final = 1 << 21  # elements of an array, beyond the caches of one core
_ROW = 32  # elements of a softmax's rows
# Pieces that change places: of as many axes as heads of tokens have, in an array that stays in the caches.
_TARGETS, _TOKENS, _HEAD = 1200, 21, 8
_PAIRS, _SIDE = 2048, 16  # of small matrices, multiplied in one product
# Targets and tokens of the attentions that are measured: none to speak of, many tokens, and as many logits of fewer.
_ATTENTIONS: Final = ((1, 16), (32, 8192), (256, 4096))
# Rows of products: few; some, whose results stay in the caches; and many, as far as multiply-adds allow, to leave them.
_FEW, _SOME, _MANY, _MOST = 32, 512, 8192, 1 << 29


@dataclass(frozen=True)
class CpuCeilings:
    """Rates of this CPU, and of each attention and each constant matrix of a bundle.

    Attributes:
        rates: of each kind of node: operations/s of a matrix product, elements/s through a sigmoid and a softmax,
            byte/s of two arrays multiplied element by element, pieces/s of axes that change places.
        matrix: seconds of a pair of matrices among many in one product, besides its operations.
        requests: seconds of each stage of `bench` for the smallest request: what is spent around the arithmetic.
        weights: for each `(K, N)` seconds of few rows, of a row more up to some, and of one beyond.
        attentions: for each shape seconds of a token more, and of a logit more.
    """

    rates: Mapping[Kind, float]
    matrix: float
    requests: Mapping[str, float]
    weights: Mapping[tuple[int, int], tuple[float, float, float]]
    attentions: Mapping[Shape, tuple[float, float]]

    def least(self, stage: str) -> float:
        """See `Rates.least`."""
        return self.requests[stage]

    def seconds(self, item: Item) -> float:
        """See `Rates.seconds`."""
        if item.shape is not None and item.sizes is not None:
            token, logit = self.attentions[item.shape]
            return item.sizes.tokens * (token + item.sizes.targets * item.shape.heads * logit)
        if item.weight is not None:
            few, more, beyond = self.weights[item.weight]
            most = few * min(item.rows, _FEW) / _FEW + more * max(0, min(item.rows, _SOME) - _FEW)
            return most + beyond * max(0, item.rows - _SOME)
        if item.kind == "product":
            return self.matrix * (item.matrices - 1) + item.operations / self.rates["product"]
        moved = item.bytes / self.rates["move"]
        if item.kind == "move":
            return moved
        spent = item.operations / self.rates[item.kind]
        return max(spent, moved) if item.kind == "transpose" else spent


def measure_ceilings(
    bundle: Bundle,
    requests: Mapping[str, float],
    threads: int | None = None,
    *,
    seconds: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
) -> CpuCeilings:
    """Measure the rates, and the bundle's own attentions and matrices at small sizes.

    Args:
        bundle: whose.
        requests: seconds of each stage for the smallest request, measured before.
        threads: of a run; None takes every core.
        seconds: time for each figure; a run is repeated at least 5 times.
        clock: what tells the time.
    """
    with scratch("stca-ceilings") as folder:

        def spent(model: onnx.ModelProto, feeds: dict[str, Array]) -> float:
            onnx.save(model, file := folder / "graph.onnx")
            engine = OnnxRuntimeEngine(file, threads=threads)
            return _median(lambda: engine.run(feeds), seconds, clock)

        rng = np.random.default_rng(0)

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape, np.float32)

        def product(rows: int, weight: tuple[int, int]) -> float:
            x = normal(rows, weight[0])
            return spent(_one("MatMul", {"x": x}, {"w": normal(*weight)}), {"x": x})

        large = {"x": normal(_MOVED), "y": normal(_MOVED)}
        rows = {"x": normal(_MOVED // _ROW, _ROW)}
        heads = {"x": normal(_TOKENS, _TARGETS, _HEAD)}
        pairs = {"x": normal(_PAIRS, _SIDE, _SIDE), "y": normal(_PAIRS, _SIDE, _SIDE)}
        best = 2 * _WIDTH**3 / product(_WIDTH, (_WIDTH, _WIDTH))
        rates: dict[Kind, float] = {
            "product": best,
            "function": _MOVED / spent(_one("Sigmoid", {"x": large["x"]}), {"x": large["x"]}),
            "along axis": _MOVED / spent(_one("Softmax", rows), rows),
            "transpose": _TOKENS * _TARGETS / spent(_one("Transpose", heads, perm=[1, 0, 2]), heads),
            "move": 3 * 4 * _MOVED / spent(_one("Mul", large), large),
        }
        matrix = max(0.0, spent(_one("MatMul", pairs), pairs) / _PAIRS - 2 * _SIDE**3 / best)
        has = [item for half in HALVES for item in items(bundle, half, 1, 1)]
        weights = {}
        for weight in {item.weight for item in has if item.weight is not None}:
            many = max(2 * _FEW, min(_MANY, _MOST // math.prod(weight)))
            sizes = (_FEW, *([_SOME] if many > _SOME else []), many)
            times = [product(rows, weight) for rows in sizes]
            more = np.maximum(0, np.diff(times) / np.diff(sizes))
            weights[weight] = times[0], float(more[0]), float(more[-1])
        attentions = {}
        for shape in {item.shape for item in has if item.shape is not None}:
            feeds = [_attention_feeds(shape, *sizes, rng) for sizes in _ATTENTIONS]
            attentions[shape] = _fit(shape, [spent(_attention(shape), one) for one in feeds])
    return CpuCeilings(rates, matrix, requests, weights, attentions)


def _median(run: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    for _ in range(2):  # the first allocates, the second finds what the first left
        run()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < seconds and len(times) < 1000):
        start = clock()
        run()
        times.append(clock() - start)
    return float(np.median(times))


def _fit(shape: Shape, times: Sequence[float]) -> tuple[float, float]:
    """Seconds of a token and of a logit, from the three sizes; none is below nothing."""
    logits = [targets * tokens * shape.heads for targets, tokens in _ATTENTIONS]
    tokens = [tokens for _, tokens in _ATTENTIONS]
    token, logit = np.linalg.lstsq(np.diff([tokens, logits]).T, np.diff(times))[0]
    return max(0.0, float(token)), max(0.0, float(logit))


def _one(
    op: str, inputs: Mapping[str, Array], weights: Mapping[str, Array] | None = None, **attributes: Any
) -> onnx.ModelProto:
    """A graph of one node, whose inputs are these, and then the weights."""
    names = [*inputs, *(weights or {})]
    return _model([helper.make_node(op, names, ["out"], **attributes)], inputs, weights or {})


def _attention(shape: Shape) -> onnx.ModelProto:
    feeds = _attention_feeds(shape, 1, 1, np.random.default_rng(0))
    node = helper.make_node(OP_NAME, list(feeds), ["out"], domain=DOMAIN, scale=shape.depth**-0.5)
    model = _model([node], feeds, {})
    onnx_function.attach(model)
    return model


def _attention_feeds(shape: Shape, targets: int, tokens: int, rng: np.random.Generator) -> dict[str, Array]:
    """The operator's arguments for one request."""
    sizes = {
        "query": (targets, shape.heads, shape.depth),
        "key": (tokens, shape.key_heads, shape.depth),
        "value": (tokens, shape.key_heads, shape.value_depth),
    }
    floats: dict[str, Array] = {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}
    ends = {"target_offsets": [0, targets], "history_offsets": [0, tokens], "history_lengths": [tokens]}
    return floats | {name: np.array(x, np.int32) for name, x in ends.items()}


def _model(nodes: Sequence[Any], inputs: Mapping[str, Array], weights: Mapping[str, Array]) -> onnx.ModelProto:
    """A graph whose inputs have any size along their first axis."""
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32}
    values = [helper.make_tensor_value_info(n, types[x.dtype], [None, *x.shape[1:]]) for n, x in inputs.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    made = [numpy_helper.from_array(x, name) for name, x in weights.items()]
    imports = [helper.make_opsetid("", onnx_function.OPSET), helper.make_opsetid(DOMAIN, OP_VERSION)]
    graph = helper.make_graph(list(nodes), "graph", values, [out], made)
    return helper.make_model(graph, opset_imports=imports, ir_version=10)
