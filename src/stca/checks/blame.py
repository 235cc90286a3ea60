"""Where a graph goes wrong: the first node, in order, whose output leaves its tolerance.

Three graphs that name their values alike are run with every value as an output: the bundle's own in float64, its own
in the precision in question, and the suspect. The first is the reference. The second is the yardstick: what the
precision costs at that very value. A suspect's value may be off by twice the yardstick's error there, plus a floor of a
few roundings, and the first node that makes one off by more is where the suspect differs in kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from onnx.reference.op_run import OpRun

from stca import probe
from stca.arrays import Array
from stca.bundle import Bundle
from stca.errors import BuildError, said
from stca.export.analysis.onnx_reference import reference_of
from stca.export.analysis.scope import label
from stca.export.engine_graph import EngineGraph, engine_graph
from stca.export.passes.precision import Precision
from stca.export.passes.to_double import to_double
from stca.runtime.tables import Lookups

Run = Callable[[Mapping[str, Array]], dict[str, Array]]

# Roundings of a value's largest magnitude that say nothing: sums are taken in another order.
_FLOOR: Final = 4
EPS: Final[Mapping[str, float]] = {"fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}
# Requests to look at, as (history tokens, targets).
LAYER_PROBES: Final = ((7, 5), (40, 16))


@dataclass(frozen=True)
class Divergence:
    """The first value of a graph that is further from the reference than its precision explains.

    Attributes:
        graph: which of the bundle's graphs.
        node: name of the node that makes it. op_type: of that node. value: its name.
        error: largest absolute difference from float64. limit: what was allowed.
        tokens, targets: of the request that showed it.
    """

    graph: str
    node: str
    op_type: str
    value: str
    error: float
    limit: float
    tokens: int
    targets: int

    def __str__(self) -> str:
        return (
            f"{self.graph}: node {self.node!r} ({self.op_type}) is the first to diverge: {self.value!r} is off by "
            f"{self.error:.3g}, allowed {self.limit:.3g}, at {self.tokens} history tokens and {self.targets} targets"
        )


def bisect(
    bundle: Bundle,
    graph: str,
    suspect: Path | EngineGraph,
    *,
    precision: Precision = "fp32",
    probes: Sequence[tuple[int, int]] = LAYER_PROBES,
    seed: int = 0,
) -> Divergence | None:
    """Find where a graph leaves the bundle's own.

    Args:
        bundle: whose graph is right.
        graph: which of its graphs: `request`, `user_encoder` or `target_scorer`.
        suspect: a graph made from it, as a file with its weights beside it or in memory. Values are compared where both
            have one of that name; a control-flow body is one node.
        precision: of the suspect.
        probes: requests to ask, as (history tokens, targets), each alone.
        seed: of the requests.

    Returns:
        The first divergence in the order of the suspect's nodes, over all requests; None when there is none.

    Raises:
        BuildError: when a graph cannot be run.
    """
    state = [s.name for s in bundle.manifest.state]
    own = engine_graph(bundle.file(graph), state=state).complete()
    typed = engine_graph(bundle.file(graph), state=state, precision=precision).complete()
    model = suspect.complete() if isinstance(suspect, EngineGraph) else _load(suspect)
    known = {name for node in own.graph.node for name in node.output}
    names = [name for node in model.graph.node for name in node.output if name in known]
    reference = _runner(to_double(own), names, exact=True)
    yardstick, judged = (_runner(m, names, exact=precision == "bf16") for m in (typed, model))
    found: Divergence | None = None
    for tokens, targets in probes:
        feeds = _feeds(bundle, graph, tokens, targets, seed)
        true, near, got = (run(feeds) for run in (reference, yardstick, judged))
        for name in names[: names.index(found.value) if found else len(names)]:
            largest = float(np.abs(true[name].astype(np.float64)).max(initial=0.0))
            floor = _FLOOR * EPS[precision] * largest if true[name].dtype.kind == "f" else 0.0
            limit = 2 * _error(near[name], true[name]) + floor
            if not (error := _error(got[name], true[name])) <= limit:
                node = next(n for n in model.graph.node if name in n.output)
                found = Divergence(graph, label(node), node.op_type, name, error, limit, tokens, targets)
                break
    return found


class LayerNormalization(OpRun):
    """With its float32 stash, which `onnx.reference` leaves out: in float16 alone a variance is worth little."""

    def _run(  # type: ignore[no-untyped-def]
        self, x, scale, bias=None, axis=-1, epsilon=1e-5, stash_type=1
    ) -> tuple[Array, Array, Array]:
        axes = tuple(range(axis % x.ndim, x.ndim))
        wide = x.astype(_wide(x))
        mean = wide.mean(axes, keepdims=True)
        inverse = 1 / np.sqrt(np.square(wide - mean).mean(axes, keepdims=True) + epsilon)
        normal = ((wide - mean) * inverse).astype(x.dtype) * scale
        return (normal if bias is None else normal + bias).astype(x.dtype), mean, inverse


class Sigmoid(OpRun):
    """In float32, as kernels compute it: an exponential in float16 overflows at 11."""

    def _run(self, x):  # type: ignore[no-untyped-def]
        with np.errstate(over="ignore"):
            return ((1 / (1 + np.exp(-x.astype(_wide(x))))).astype(x.dtype),)


def _wide(x: Array) -> type[np.floating[Any]]:
    return np.float64 if x.dtype == np.float64 else np.float32


def evaluator(model: onnx.ModelProto) -> Any:
    """`onnx.reference` on a typed model, with the float32 inside that kernels have and it has not."""
    return reference_of(model, [LayerNormalization, Sigmoid])


def _feeds(bundle: Bundle, graph: str, tokens: int, targets: int, seed: int) -> dict[str, Array]:
    """Inputs of one request, and the user state in float64 where the graph takes one."""
    specs = bundle.manifest.graphs["request"].inputs
    feeds: dict[str, Array] = probe.pack(specs, [probe.single(specs, tokens, targets, np.random.default_rng(seed))])
    if graph == "target_scorer":
        encoder = engine_graph(bundle.file("user_encoder"), state=[s.name for s in bundle.manifest.state]).complete()
        given = Lookups(bundle, "user_encoder").complete(feeds)
        feeds |= _runner(to_double(encoder), [o.name for o in encoder.graph.output], exact=True)(given)
    return Lookups(bundle, graph).complete(feeds)


def _runner(model: onnx.ModelProto, names: Sequence[str], *, exact: bool) -> Run:
    """Run `model` with the values `names` as outputs; `exact` asks `onnx.reference`, which has every type."""
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    del marked.graph.output[:]
    marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    types = {
        i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in marked.graph.input
    }  # an initializer that is also an input needs no feed
    for tensor in marked.graph.initializer:
        types.pop(tensor.name, None)

    def cast(feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {name: feeds[name].astype(dtype) for name, dtype in types.items()}

    if exact:
        runner = evaluator(marked)

        def evaluate(feeds: Mapping[str, Array]) -> dict[str, Array]:
            values: Any = runner.run(None, cast(feeds))
            return dict(zip(names, map(np.asarray, values), strict=True))

        return evaluate
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # every value as the graph says
    try:
        session = ort.InferenceSession(marked.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime's exceptions share no base class of their own
        raise BuildError(f"ONNX Runtime cannot load the graph to bisect: {said(e)}") from e
    return lambda feeds: dict(zip(names, session.run(list(names), cast(feeds)), strict=True))


def _error(values: Array, reference: Array) -> float:
    """Largest absolute difference; infinite where shapes differ or one of the two alone is not finite."""
    if values.shape != reference.shape:
        return float("inf")
    a, b = values.astype(np.float64), reference.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    difference = np.where(same, 0.0, np.abs(a - b))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))


def _load(file: Path) -> onnx.ModelProto:
    try:
        return onnx.load(file)
    except Exception as e:  # onnx and protobuf raise many types here
        raise BuildError(f"{file}: cannot be read to bisect: {said(e)}") from e
