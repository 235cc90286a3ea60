"""What of a bundle is quantized, and how: which tensors of its state, which tables, which matrices of products."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import onnx

from stca.arrays import Array
from stca.bundle import Bundle, scratch
from stca.calibration.collectors import Collector, Granularity, Method
from stca.calibration.quantized_bundle import Formats, write_watched
from stca.calibration.quantized_products import Activations, ProductFormat, quantizable_products
from stca.calibration.quantized_state import Kind, StateFormat, levels, quantizable
from stca.calibration.quantized_weights import LEAST_TABLE, RowFormat, quantizable_files, quantizable_tables
from stca.errors import StcaError, UsageError
from stca.export.analysis.operators import MOVES, VIEWS
from stca.export.analysis.scope import label
from stca.specs import StateSpec
from stca.trace import Traced

# Requests from which activations' ranges are taken: of many thousand rows each, and all that they are is in memory.
_RANGED: Final = 32
# What has one tensor's numbers, as they were.
_KEEPS: Final = (VIEWS | MOVES | {"Cast", "Identity"}) - {"Concat"}


class Runner(Protocol):
    """Runs bundles on a trace; `stca.checks.trace_runs` has one."""

    def scores(self, bundle: Bundle, requests: Iterable[Traced]) -> Iterator[Array]:
        """Scores `(targets, tasks)` of each request."""
        ...

    def states(self, bundle: Bundle, requests: Iterable[Traced]) -> Iterator[Mapping[str, Array]]:
        """The user state of each request, by tensor."""
        ...

    def watched(self, bundle: Bundle, requests: Iterable[Traced]) -> Iterator[Mapping[str, Array]]:
        """All that the graphs of both halves give, of each request, by name."""
        ...


@dataclass(frozen=True)
class Options:
    """What is quantized, and how.

    Attributes:
        kind: int8 or fp8, of the state; None leaves it.
        granularity: what has a scale of its own; all but `token` are constants, taken from the trace by `method`.
        method: how a range is chosen; of `token` it is absmax.
        tables: of the embedding tables' rows; None leaves them. Those in graphs can be int8 alone.
        weights: of the matrices of products; None leaves them. Those of fp8 are multiplied with float32 alone.
        activations: what those are multiplied with: float32, or int8 with a step for each row or, from the trace by
            `method`, for all.
    """

    kind: Kind | None
    granularity: Granularity = "token"
    method: Method = "absmax"
    tables: Kind | None = None
    weights: Kind | None = None
    activations: Activations = "none"


def state_choices(bundle: Bundle, options: Options, weights: Formats) -> tuple[StateSpec, ...]:
    """The tensors of the state to quantize."""
    summed = next((s.name for s in bundle.manifest.state if s.append), None)
    if options.kind is not None and summed is not None:
        raise UsageError(
            f"{bundle.path}: its state {summed!r} is a sum that is added to, and is of one size whatever the history; "
            "there is nothing to gain in 8 bits"
        )
    found = quantizable(bundle.manifest.state) if options.kind is not None else ()
    if options.kind is not None and not (found or weights):
        raise UsageError(
            f"{bundle.path}: its state has no computed float32 tensor with several values a row, so there is nothing "
            "to quantize"
        )
    return found


def weight_choices(bundle: Bundle, options: Options) -> dict[str, StateFormat | RowFormat | ProductFormat]:
    """The weights to quantize, tables first, and how."""
    if bundle.manifest.quantization is not None:
        raise UsageError(f"{bundle.path}: is quantized already; calibrate the bundle that it was made from")
    if options.kind is None and options.tables is None and options.weights is None:
        raise UsageError("nothing is to be quantized; ask for 8 bits of the state, of tables or of weights")
    if options.activations != "none" and options.weights is None:
        raise UsageError(f"--activations {options.activations}: is of products with 8-bit weights; add --weights int8")
    if options.activations != "none" and options.weights == "fp8":
        raise UsageError(
            f"--activations {options.activations}: products of 8-bit numbers are of int8; take --weights int8"
        )
    if options.tables is None and options.weights is None:
        return {}
    graphs = [onnx.load(bundle.file(name), load_external_data=False) for name in bundle.manifest.graphs]
    made: dict[str, StateFormat | RowFormat | ProductFormat] = {}
    if options.tables is not None:
        made.update(dict.fromkeys(_tables(bundle, options.tables, graphs), RowFormat(options.tables)))
    if options.weights is not None:
        if not (names := quantizable_products(graphs)):
            raise UsageError(f"{bundle.path}: has no float32 matrix that is a product's second factor alone")
        made.update(dict.fromkeys(names, ProductFormat(options.activations, kind=options.weights)))
    return made


def _tables(bundle: Bundle, kind: Kind, graphs: Sequence[onnx.ModelProto]) -> tuple[str, ...]:
    files, inside = quantizable_files(bundle.manifest.tables or ()), quantizable_tables(graphs)
    if kind == "fp8" and inside:
        raise UsageError(
            f"--tables fp8: table {inside[0]!r} is in the graphs, where ONNX looks up no 8-bit floats; take int8, or "
            "export with --tables-above, so that tables leave the graphs"
        )
    if not (files or inside):
        raise UsageError(
            f"{bundle.path}: has no embedding table in float32 of 8 numbers a row or more and over "
            f"{LEAST_TABLE >> 10} KiB that is read by look-ups alone, so --tables has nothing to quantize"
        )
    return files + inside


def with_ranges(
    bundle: Bundle, formats: Formats, method: Method, run: Runner, requests: Iterable[Traced]
) -> dict[str, ProductFormat]:
    """Formats of matrices, with the ranges of what they are multiplied with.

    Args:
        bundle: in float32.
        formats: of its parts; those of no matrices are left out.
        method: how a range is chosen.
        run: what computes the graphs.
        requests: of the trace; so many of them are looked at as a range takes.

    Raises:
        UsageError: when an activation holds NaN, naming it.
    """
    products = {n: f for n, f in formats.items() if isinstance(f, ProductFormat)}
    with scratch("stca-calibrate") as folder:
        watched, factors = write_watched(bundle, products, folder / "watched")
        seen = {name: Collector("tensor") for names in factors.values() for name in names}
        for values in run.watched(watched, itertools.islice(requests, _RANGED)):
            for name, collector in seen.items():
                try:
                    collector.add(values[name])
                except StcaError as e:
                    raise UsageError(f"activation {name!r} {e}") from e
    ranges = {name: float(c.ranges(method, levels("int8")).max()) for name, c in seen.items()}
    return {
        name: dataclasses.replace(f, largest={x: ranges[x] for x in factors.get(name, ())})
        for name, f in products.items()
    }


def formats_of(
    bundle: Bundle, candidates: Sequence[StateSpec], options: Options, states: Iterable[Mapping[str, Array]]
) -> dict[str, StateFormat]:
    """How each of a state's tensors is to be kept, by name.

    Args:
        bundle: whose state, for messages.
        candidates: the tensors.
        options: of all of them.
        states: of a trace's users.

    Raises:
        UsageError: when a state holds NaN, naming the tensor and its node, or there is none.
    """
    if options.kind is None:
        return {}
    collectors = {s.name: Collector(options.granularity) for s in candidates}
    for state in states:
        for name, collector in collectors.items():
            try:
                collector.add(state[name])
            except StcaError as e:
                raise UsageError(f"state {name!r} (made by {maker_of(bundle, name)}) {e}") from e
    method = "absmax" if options.granularity == "token" else options.method
    made = {}
    for name, collector in collectors.items():
        try:
            ranges = collector.ranges(method, levels(options.kind))
        except StcaError as e:
            raise UsageError(f"state {name!r}: {e}") from e
        made[name] = StateFormat(options.kind, options.granularity, ranges)
    return made


def maker_of(bundle: Bundle, name: str) -> str:
    """The node of the user encoder that makes the numbers of a tensor of the state, for a message.

    Nodes behind it that give them another shape, place or type are passed over.
    """
    graph = onnx.load(bundle.file("user_encoder"), load_external_data=False).graph
    writers = {value: node for node in graph.node for value in node.output}
    if (node := writers.get(name)) is None:
        return "no node"
    while not node.domain and node.op_type in _KEEPS and (before := writers.get(node.input[0])) is not None:
        node = before
    return f"node {label(node)!r} ({node.op_type})"
