"""The graph an engine is built from: a bundle's graph, typed and lowered, with its weights read by us and by name.

An engine's parser is handed weights in memory and never a path: TensorRT-RTX's follows symbolic links and reads outside
the model's directory. So the one place where a path in a model is believed is `read_graph`, and it believes one name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper

from stca.errors import BuildError, said
from stca.export.analysis.cost import NominalSizes
from stca.export.analysis.integers import fold_integers
from stca.export.analysis.scope import drop_unread, reads
from stca.export.passes.lower import fix_to_one_request, for_one_request, is_operator
from stca.export.passes.precision import Precision, cast_weight, to_precision
from stca.manifest import WEIGHTS
from stca.plugins import tensorrt_graph, tiling
from stca.plugins.spec import DOMAIN

# How the operator reaches the engine: its function body, a plugin (a library's, or a quick one whose kernels are in the
# engine), or standard operators for one request per run.
Lowering = Literal["function", "plugin", "quick", "fused", "decomposed"]


@dataclass(frozen=True)
class EngineGraph:
    """A typed graph without its large weights, and those weights.

    Attributes:
        model: initializers that `weights` has are empty in it.
        weights: contents by name, in the type the file has them; `array` converts.
        attention_nodes: operators of the bundle's graph; the engine must have as many fused attentions.
    """

    model: onnx.ModelProto
    weights: Mapping[str, NDArray[Any]]
    attention_nodes: int

    def array(self, tensor: TensorProto) -> NDArray[Any]:
        """Contents of a large initializer in its type in `model`, contiguous.

        Raises:
            ExportError: when they do not fit that type.
        """
        return np.ascontiguousarray(cast_weight(tensor.name, self.weights[tensor.name], tensor.data_type))

    def save(self, file: Path) -> Path:
        """Write the model to `file` and its weights beside it, to the same name with `.weights`; returns `file`."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        weights = file.with_suffix(".weights")
        with weights.open("wb") as f:
            for tensor in model.graph.initializer:
                if tensor.name in self.weights:
                    data = self.array(tensor)
                    tensor.raw_data = b""  # what says that a tensor has contents
                    external_data_helper.set_external_data(tensor, weights.name, offset=f.tell(), length=data.nbytes)
                    tensor.ClearField("raw_data")
                    f.write(data.data.cast("B") if data.dtype.kind != "V" else data.tobytes())
        file.write_bytes(model.SerializeToString())
        return file

    def complete(self) -> onnx.ModelProto:
        """The model with its weights inside, for `onnx.reference`."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for tensor in model.graph.initializer:
            if tensor.name in self.weights:
                tensor.raw_data = self.array(tensor).tobytes()
        return model


def engine_graph(
    file: Path,
    *,
    state: Collection[str],
    precision: Precision = "fp32",
    lowering: Lowering = "function",
    one_request: bool = False,
    sizes: Mapping[str, int] | None = None,
    sm: int | None = None,
) -> EngineGraph:
    """Read a graph of a bundle and make of it what an engine is built from.

    Args:
        file: the ONNX file; its weights lie in `weights.safetensors` beside it.
        state: names of the state tensors.
        precision: of the weights and activations; see `stca.export.passes.precision`.
        lowering: how the operator is written; see `stca.export.passes.lower` for `fused` and `decomposed`.
        one_request: leave out what tells requests apart; `fused` and `decomposed` serve one request in any case.
        sizes, sm: of `quick` alone: nominal sizes by dimension and the GPU, which decide into how many parts a history
            is cut.

    Raises:
        BuildError: when the file cannot be read, or a weight is not where a bundle has it.
        ExportError: when the graph cannot be typed or lowered.
    """
    model, weights = read_graph(file)
    operators = sum(map(is_operator, model.graph.node))
    model = to_precision(model, precision, state, weights)
    if lowering in ("fused", "decomposed"):
        model = for_one_request(model, lowering)
    elif one_request:
        fix_to_one_request(model)
    if lowering in ("plugin", "quick"):
        fold_integers(model)  # shapes then say the head sizes that the plugins are compiled for
        model = _for_quick(model, sizes or {}, sm) if lowering == "quick" else model
        _without_body(model)
    used = {t.name for t in model.graph.initializer}
    return EngineGraph(model, {n: w for n, w in weights.items() if n in used}, operators)


def read_graph(file: Path) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """A graph without the contents of its external weights, and those contents, mapped from the file.

    Raises:
        BuildError: for a weight outside `weights.safetensors`, or when that is not a plain file or too short.
    """
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as e:  # protobuf's DecodeError is not importable from a stable place
        raise BuildError(f"{file.name}: is not an ONNX model ({said(e)}); export the bundle anew") from e
    mapped: np.memmap[Any, Any] | None = None
    weights: dict[str, NDArray[Any]] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place.get("location") != WEIGHTS:
            where = place.get("location")
            raise BuildError(
                f"{file.name}: weight {tensor.name!r} lies in {where!r} and not in {WEIGHTS}; export the bundle anew"
            )
        if mapped is None:
            mapped = _map(file.parent / WEIGHTS)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        begin, length = int(place.get("offset", 0)), int(place.get("length", -1))
        if begin < 0 or length != int(np.prod(tensor.dims)) * dtype.itemsize or begin + length > mapped.size:
            raise BuildError(f"{file.name}: weight {tensor.name!r} does not fit {WEIGHTS}; export the bundle anew")
        weights[tensor.name] = mapped[begin : begin + length].view(dtype).reshape(tuple(tensor.dims))
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return model, weights


def estimate_memory(graph: EngineGraph, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes an engine of `graph` takes when every symbolic size is as large as `sizes` says.

    Returns:
        `weights`; `inputs_and_outputs`, which the runtime holds on host and device; and `activations`, the most that is
        alive at once when nothing is fused: an upper bound, of which a fused attention leaves little.
    """
    model = graph.model
    at = NominalSizes(model, sizes)
    bytes_of = {t.name: _bytes(t) for t in model.graph.initializer}
    edge = {v.name: at.bytes(v.name) or 0 for v in (*model.graph.input, *model.graph.output)}
    last_read = {name: i for i, node in enumerate(model.graph.node) for name in reads(node)}
    alive = peak = 0
    for i, node in enumerate(model.graph.node):
        made = {name: at.bytes(name) or 0 for name in node.output if name and name not in edge}
        alive += sum(made.values())
        peak = max(peak, alive)
        done = {n for n in (*reads(node), *made) if last_read.get(n, i) == i and n not in edge and n not in bytes_of}
        alive -= sum(at.bytes(name) or 0 for name in done)
    return {"weights": sum(bytes_of.values()), "inputs_and_outputs": sum(edge.values()), "activations": peak}


def _for_quick(model: onnx.ModelProto, sizes: Mapping[str, int], sm: int | None) -> onnx.ModelProto:
    """Nodes of the quick plugins, with as many parts as suit the sizes."""
    known = sm is not None and {"N_h", "N_t"} <= sizes.keys()
    nominal = tiling.Sizes(sizes["N_t"], sizes["N_h"], sizes.get("B", 1)) if known else None
    return tensorrt_graph.prepare(model, nominal, sm)


def _without_body(model: onnx.ModelProto) -> None:
    """Take the operator's function body away: a missing plugin is then an error, not a slow engine."""
    tensorrt_graph.mark(model)
    functions = [f for f in model.functions if f.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(functions)
    drop_unread(model.graph)


def _bytes(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _map(file: Path) -> np.memmap[Any, Any]:
    """Bytes of a plain file; a link is refused when it is opened, so that it cannot be put there in between."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        raise BuildError(f"{file}: cannot be read as a plain file ({e.strerror}); copy the bundle again") from e
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or not found.st_size:
        os.close(handle)
        raise BuildError(f"{file}: is not a plain file with weights in it; copy the bundle again")
    with os.fdopen(handle, "rb") as f:
        return np.memmap(f, dtype=np.uint8, mode="r")
