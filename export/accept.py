"""What a graph must be to become a bundle, whoever made it, and the sizes that a cut assumes for it."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter

from stca import probe
from stca.errors import SplitError, said
from stca.export.analysis import operators
from stca.export.analysis.cost import DEFAULT_WORKLOAD, any_sizes, without_weights
from stca.export.analysis.ranges import Range, input_ranges
from stca.export.analysis.scope import Dataflow, label, opset_of, walk
from stca.export.one_name import inline, lift_weights, name_once
from stca.export.tables import Large
from stca.near import did_you_mean
from stca.plugins import onnx_function
from stca.specs import ITEM_BYTES, OFFSETS, TARGETS, TOKENS, TensorSpec

# The first IR version in which a weight need not be an input, and the last that ONNX Runtime 1.31 reads.
_OLDEST_IR, _NEWEST_IR = 4, 13
# The first set of operators of which ONNX's reference has those that quantize.
_QUANTIZED = 19


def load_onnx(file: str | os.PathLike[str], large: Large | None = None) -> onnx.ModelProto:
    """Read a model with its weights, refusing external data outside the model's own directory.

    Args:
        file: the model.
        large: takes the weights that are to be kept out of it; None for none.

    Raises:
        SplitError: when there is no such file, it is no ONNX model, or its weights are missing or elsewhere.
    """
    path = Path(file)
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError as e:
        raise SplitError(f"{path}: no such ONNX file") from e
    except Exception as e:  # protobuf's DecodeError is not importable from a stable place
        raise SplitError(f"{path}: is not an ONNX model; name a file as torch.onnx.export writes it") from e
    onnx_function.register_schema()
    home = path.resolve().parent
    model.ir_version = min(max(model.ir_version, _OLDEST_IR), _NEWEST_IR)
    try:
        name_once(model)
        inline(model)
        lift_weights(model)
        _refuse_elsewhere(model, home)
        if large is not None:
            large.hollow_external(model, home)
        onnx.load_external_data_for_model(model, str(home))
        onnx.checker.check_model(without_weights(model))
    except SplitError as e:
        raise SplitError(f"{path}: {e}") from e
    except Exception as e:
        raise SplitError(f"{path}: is not a valid ONNX model ({said(e)})") from e
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]  # old exporters list weights there too
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return modern(model)


def _refuse_elsewhere(model: onnx.ModelProto, home: Path) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and home not in (home / entry.value).resolve().parents:
                raise SplitError(f"weight {tensor.name!r} lies outside the model's directory; move it beside it")


def refuse_types(inputs: Sequence[TensorSpec]) -> None:
    """Raises SplitError naming the first input of a type that requests do not carry, and what to change."""
    for spec in inputs:
        if spec.dtype not in ITEM_BYTES:
            what = "string" if spec.dtype == "object" else spec.dtype
            raise SplitError(
                f"input {spec.name!r} is {what}, which requests do not carry; cast in the model from one of "
                f"{', '.join(ITEM_BYTES)}"
            )


def refuse_unservable(model: onnx.ModelProto, outputs: Sequence[TensorSpec]) -> None:
    """Refuse what no check or runtime here could take, naming the first such weight, node or output.

    Raises:
        SplitError: with what to change in the model.
    """
    for tensor in model.graph.initializer:
        weight = onnx.numpy_helper.to_array(tensor)
        # Masks are made of -inf; where it does harm, the proof finds scores that are not finite.
        if weight.dtype.kind == "f" and (np.isnan(weight) | np.isposinf(weight)).any():
            raise SplitError(
                f"weight {tensor.name!r} has NaN or infinite values; export an earlier step, or mend what makes it"
            )
    known = {"", "ai.onnx", "ai.onnx.ml", *(f.domain for f in model.functions)}
    for node in walk(model.graph.node):
        if node.domain not in known:
            raise SplitError(
                f"node {label(node)!r} is {node.op_type!r} of domain {node.domain!r}, which no check here can run; "
                "give the model a function body for it, or express it in standard operators"
            )
        if node.op_type in operators.RANDOM and not node.domain:
            raise SplitError(
                f"node {label(node)!r} ({node.op_type}) draws at random; take it out of the model, or export it in "
                "evaluation mode"
            )
    rows = {tuple(s.shape[:1]): s.name for s in outputs}
    if len(rows) > 1:
        names = " and ".join(rows.values())
        raise SplitError(f"outputs {names} differ in their first size; scores of one model must all be per target")
    for spec in outputs:
        if spec.dtype not in ("bfloat16", "float16", "float32", "float64"):
            raise SplitError(
                f"output {spec.name!r} is {spec.dtype}; scores must be floating point, cast it in the model"
            )


def require_known(inputs: Sequence[TensorSpec], ids: Collection[str], sizes: Collection[str]) -> None:
    """Raises SplitError for the first name that no input, or no size of an input, has: asked before long work."""
    names = [s.name for s in inputs]
    if unknown := sorted(set(ids) - set(names)):
        has = f"{', '.join(names)}{did_you_mean(unknown[0], names)}"
        raise SplitError(f"--ids {unknown[0]}: the model has no such input; it has {has}")
    free = [(s.name, axis, n) for s in inputs for axis, n in enumerate(s.shape) if isinstance(n, str)]
    # One without a name goes by its input and axis, as `any_sizes` has it.
    dims = dict.fromkeys(f"{name}.{axis}" if n == f"{name}_{axis}" else n for name, axis, n in free)
    if unknown := sorted(set(sizes) - {*dims, *DEFAULT_WORKLOAD}):
        known = f"there are {', '.join(dims)}{did_you_mean(unknown[0], dims)}"
        raise SplitError(f"no input has a dimension {unknown[0]!r} to give a size to; {known}")


def with_ranges(model: onnx.ModelProto, inputs: Sequence[TensorSpec], ids: Mapping[str, int]) -> tuple[TensorSpec, ...]:
    """The inputs with the integers that each may hold: as asked for, as declared, or as the graph's look-ups tell.

    Args:
        model: the whole graph.
        inputs: of the graph.
        ids: how many ids an input has, by name: 0 to that number, less one.

    Raises:
        SplitError: for the first that is asked for or declared to hold more ids than the graph can look up.
    """
    ranges = input_ranges(onnx.inliner.inline_local_functions(without_weights(model)))
    made = []
    for spec in inputs:
        found = ranges.get(spec.name)
        if spec.name in ids:
            spec = dataclasses.replace(spec, limit=ids[spec.name])
            _refuse_beyond(spec, found, f"--ids {spec.name}=")
        elif "int" in spec.dtype and spec.limit is None and spec.low is None and found:
            spec = _within(spec, found)
        else:
            _refuse_beyond(spec, found, f"{spec.name}: limit=")
        made.append(spec)
    return tuple(made)


def _refuse_beyond(spec: TensorSpec, found: Range | None, given: str) -> None:
    """Raises SplitError where an id below the limit, `given` so, would be beyond the table it is looked up in."""
    if spec.limit is None or found is None or found.guarded or not 0 <= found.high < spec.limit - 1:
        return
    ids = int(found.high) + 1
    raise SplitError(
        f"{given}{spec.limit}, but the graph looks it up in a table that has rows for {ids:,} ids, 0 to {ids - 1}; say "
        f"{given.split()[-1]}{ids}, or give the table {spec.limit - ids:,} more"
    )


def _within(spec: TensorSpec, found: Range) -> TensorSpec:
    low = max(int(found.low), -(1 << 31)) if found.low > -math.inf else -(1 << 31)
    limit = int(found.high) + 1 if found.high < math.inf else None
    of = found.size if found.short == 0 else None
    return dataclasses.replace(spec, limit=limit, low=low if low else None, length_of=of)


def modern(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in a set of operators that passes can add to; as it is where it has one, or cannot be converted."""
    opset = opset_of(model, onnx_function.OPSET)
    quantized = any(
        n.op_type in ("QuantizeLinear", "DequantizeLinear") and not n.domain for n in walk(model.graph.node)
    )
    oldest, wanted = (_QUANTIZED,) * 2 if quantized else (onnx_function.OLDEST_OPSET, onnx_function.OPSET)
    if opset >= oldest:
        return model
    try:
        converted = onnx.version_converter.convert_version(model, wanted)
        onnx.checker.check_model(without_weights(converted))
    except Exception:  # an operator without an adapter, or a model beyond protobuf's 2 GB
        return model
    converted.ir_version = model.ir_version
    return converted


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove, in place, the nodes that no output needs: a check would run them, and what they refuse is no reason."""
    used, _ = Dataflow(model.graph).needed(o.name for o in model.graph.output)
    kept = [node for i, node in enumerate(model.graph.node) if i in used]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def name_history(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> tuple[tuple[TensorSpec, ...], str]:
    """Call the size that counts events `N_h`, in the graph in place and in its inputs, whatever it was called before.

    Returns:
        The inputs, and what it was called: `N_h` where there is no such size, more than one, or one of that name.
    """
    counts = {n for n, size in probe.row_sizes(inputs, 2, 3).items() if size == 2 and n != OFFSETS}
    if len(counts) != 1 or any(TOKENS in s.shape for s in inputs):
        return tuple(inputs), TOKENS
    (name,) = counts
    for spec in inputs:
        dims = next(v for v in model.graph.input if v.name == spec.name).type.tensor_type.shape.dim
        for axis, size in enumerate(spec.shape):
            if size == name:
                dims[axis].dim_param = TOKENS
    for value in (*model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{re.escape(name)}\b", TOKENS, dim.dim_param)

    def named(size: int | str | None) -> Any:
        return TOKENS if size == name else size

    return tuple(
        dataclasses.replace(s, shape=tuple(map(named, s.shape)), length_of=named(s.length_of)) for s in inputs
    ), name


def nominal_sizes(
    graph: onnx.GraphProto, inputs: Sequence[TensorSpec], given: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """A size for every symbolic dimension of the inputs and no others, and those of them that were assumed.

    Which are not given follow from the inputs' scopes, as `probe.row_sizes` says: events of a history, targets, or 1.
    """
    dims = any_sizes(graph)  # one without a name goes by its input and axis
    by_scope = probe.row_sizes(inputs, *({**DEFAULT_WORKLOAD, **given}[n] for n in (TOKENS, TARGETS)))
    unnamed = {f"{s.name}.{axis}": n for s in inputs for axis, n in enumerate(s.shape) if isinstance(n, str)}
    assumed = {n: by_scope.get(unnamed.get(n, n), 1) for n in dims if n not in given}
    return {**{n: size for n, size in given.items() if n in dims}, **assumed}, assumed
