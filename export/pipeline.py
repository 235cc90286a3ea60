"""From a checkpoint, a module or an ONNX file to a proven bundle: trace, split, write, prove, and only then name it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from torch import nn

import stca
from stca.bundle import (
    TARGETS,
    WEIGHTS,
    Bundle,
    GraphSpec,
    Manifest,
    Scope,
    StateSpec,
    TensorSpec,
    place_for,
    seal,
    sha256_of,
    writing,
)
from stca.errors import ExportError, SplitError
from stca.export.checkpoint import Checkpoint
from stca.export.config import StcaConfig
from stca.export.cost import DEFAULT_WORKLOAD, without_weights
from stca.export.cut import DEFAULT_FLOPS_PER_BYTE
from stca.export.model import AttentionForm, request_inputs
from stca.export.precision import any_sizes
from stca.export.scope import label, walk
from stca.export.split import split
from stca.export.state import not_one_users, why_not_appendable
from stca.export.to_onnx import RequestModel, to_request_graph
from stca.export.weights import externalize
from stca.plugins import onnx_function
from stca.plugins.spec import DOMAIN, OP_NAME
from stca.types import Progress

# What proves a finished bundle before it gets its name, against the module it was made from (None for an ONNX file):
# returns the parity report to record, raises when it fails.
Prover = Callable[[Bundle, nn.Module | None], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class CutOptions:
    """How to cut: the nominal request to cut for, and the work worth redoing per request to save a byte of state."""

    workload: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict(DEFAULT_WORKLOAD))
    flops_per_byte: float = DEFAULT_FLOPS_PER_BYTE


def choose_form(config: StcaConfig, targets: int) -> AttentionForm:
    """The attention form with less work for a request of `targets` that finds no state (model.md, two exact forms).

    Per layer and history token, absorbed costs 4·m·h·d and projected 4·m·d + 4·d², so they break even at
    m = d / (h - 1). With a kept state projected always works less per request, for twice the bytes of state.
    """
    absorbed = targets * config.heads
    projected = targets + config.width
    return "absorbed" if absorbed < projected else "projected"


def resolve(name: str) -> RequestModel:
    """Call what `package.module:callable` names; it must return a `RequestModel`.

    Raises:
        ExportError: when there is no such callable, it fails, or it returns something else.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does: the user's module is usually right here
    try:
        call = getattr(importlib.import_module(module), attribute)
    except Exception as e:  # no such module, no such name, or what the module itself raises
        if place := _place_in_their_code(e):
            raise ExportError(f"--model {name}: your module raised {_said(e)}{place}; mend it there") from e
        raise ExportError(f"--model {name}: {_said(e)}; expected PACKAGE.MODULE:CALLABLE") from e
    try:
        made = call()
    except Exception as e:
        raise ExportError(
            f"--model {name}: your function raised {_said(e)}{_place_in_their_code(e)}; mend it there, or call it in "
            "Python for the traceback"
        ) from e
    if not isinstance(made, RequestModel):
        raise ExportError(f"--model {name}: returned {type(made).__name__}, expected stca.export.RequestModel")
    return made


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _place_in_their_code(error: BaseException) -> str:
    """` at file:line` of the innermost call that is neither ours, the standard library's nor an installed package's."""
    paths = sysconfig.get_paths()
    others = (str(Path(stca.__file__).parent), "<", *(paths[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(others)]
    return f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""


def export_checkpoint(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    *,
    prove: Prover,
    form: AttentionForm | Literal["auto"] = "auto",
    max_history: int | None = None,
    cut: CutOptions | None = None,
    progress: Progress = lambda _: None,
) -> Bundle:
    """A trained reference STCA → a proven bundle at `out`.

    Args:
        checkpoint: from `load_checkpoint`.
        out: directory of the bundle; an existing bundle there is replaced at the very end, or stays as it was.
        prove: runs on the finished bundle before it gets its name, with the checkpoint's own module; use
            `stca.verify.prove`.
        form: attention form, or `auto` to take the one with less work at the cut's nominal request.
        max_history: longest history to serve, in tokens; None takes the config's.
        cut: how to split.
        progress: told each step as it starts.

    Raises:
        CheckpointError, ExportError, SplitError, BundleError, ParityError: one line; `out` is untouched.
    """
    config = checkpoint.config
    cut = cut or CutOptions()
    chosen = choose_form(config, cut.workload.get(TARGETS, 1)) if form == "auto" else form
    progress(f"checkpoint: {sum(t.numel() for t in checkpoint.tensors.values()):,} parameters, {chosen} attention")
    model = RequestModel(checkpoint.build(chosen), request_inputs(config))
    return export_module(
        model,
        out,
        prove=lambda bundle, _: prove(bundle, checkpoint.build("projected")),
        source={"kind": "stca", "config": json.loads(config.to_json())},
        attention=chosen,
        max_history=max_history or config.max_history,
        cut=cut,
        progress=progress,
    )


def export_module(
    model: RequestModel,
    out: str | os.PathLike[str],
    *,
    prove: Prover,
    source: Mapping[str, Any],
    attention: str | None = None,
    max_history: int | None = None,
    cut: CutOptions | None = None,
    progress: Progress = lambda _: None,
) -> Bundle:
    """Any torch module with scoped inputs → a proven bundle; see `export_checkpoint`.

    Args:
        source: recorded as the manifest's `model`.
        attention: recorded as the manifest's `attention`.
        max_history: longest history to serve, in tokens; None for no limit.
    """
    place_for(out)
    progress("tracing the request graph")
    graph = to_request_graph(model)
    proof = lambda bundle: prove(bundle, model.module)  # noqa: E731
    return _write(graph, model.inputs, out, proof, source, attention, max_history, cut or CutOptions(), progress)


def split_onnx(
    file: str | os.PathLike[str],
    scopes: Mapping[str, Scope],
    out: str | os.PathLike[str],
    *,
    prove: Prover,
    max_history: int | None = None,
    cut: CutOptions | None = None,
    progress: Progress = lambda _: None,
) -> Bundle:
    """Any ONNX model → a proven bundle with its two halves.

    Args:
        file: the model; external data must lie inside its directory.
        scopes: scope of each input, by name.
        out, prove, max_history, cut, progress: as in `export_module`.

    Raises:
        SplitError: when the file is no valid ONNX model, an input has no scope, or nothing can be cached.
    """
    place_for(out)
    progress("reading the model")
    graph = load_onnx(file)
    unknown = [name for name in scopes if name not in {i.name for i in graph.graph.input}]
    if unknown:
        names = ", ".join(i.name for i in graph.graph.input)
        raise SplitError(f"the model has no input {unknown[0]!r}; its inputs are {names}")
    specs = tuple(
        dataclasses.replace(_spec(i), scope=scopes.get(i.name), limit=_id_limit(graph.graph, i.name))
        for i in graph.graph.input
    )
    if any((n.domain, n.op_type) == (DOMAIN, OP_NAME) for n in graph.graph.node):
        onnx_function.attach(graph)
    proof = lambda bundle: prove(bundle, None)  # noqa: E731
    return _write(graph, specs, out, proof, {"kind": "onnx"}, None, max_history, cut or CutOptions(), progress)


def load_onnx(file: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read a model with its weights, refusing external data outside the model's own directory.

    Raises:
        SplitError: when there is no such file, it is no ONNX model, or its weights are missing or elsewhere.
    """
    path = Path(file)
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError as e:
        raise SplitError(f"{path}: no such ONNX file") from e
    except Exception as e:  # protobuf's DecodeError is not importable from a stable place
        raise SplitError(f"{path}: is not an ONNX model ({' '.join(str(e).split())[:200]})") from e
    onnx_function.register_schema()
    home = path.resolve().parent
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and home not in (home / entry.value).resolve().parents:
                raise SplitError(
                    f"{path}: weight {tensor.name!r} lies outside the model's directory; move it beside it"
                )
    try:
        onnx.load_external_data_for_model(model, str(home))
        onnx.checker.check_model(without_weights(model))
    except Exception as e:
        raise SplitError(f"{path}: is not a valid ONNX model ({' '.join(str(e).split())[:300]})") from e
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]  # old exporters list weights there too
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 4)  # the first in which a weight need not be an input
    return model


def _write(
    graph: onnx.ModelProto,
    specs: tuple[TensorSpec, ...],
    out: str | os.PathLike[str],
    prove: Callable[[Bundle], Mapping[str, Any]],
    source: Mapping[str, Any],
    attention: str | None,
    max_history: int | None,
    cut: CutOptions,
    progress: Progress,
) -> Bundle:
    for tensor in graph.graph.initializer:
        weight = onnx.numpy_helper.to_array(tensor)
        if weight.dtype.kind == "f" and not np.isfinite(weight).all():
            raise SplitError(f"weight {tensor.name!r} has NaN or infinite values; export an earlier step")
    known = {"", "ai.onnx", "ai.onnx.ml", *(f.domain for f in graph.functions)}
    for node in walk(graph.graph.node):
        if node.domain not in known:
            raise SplitError(
                f"node {label(node)!r} is {node.op_type!r} of domain {node.domain!r}, which no check here can run; "
                "give the model a function body for it, or express it in standard operators"
            )
    # As `Sizes` counts them: one without a name goes by its input and axis.
    dims = any_sizes(graph.graph)
    if unknown := [n for n in cut.workload if n not in dims and n not in DEFAULT_WORKLOAD]:
        raise SplitError(f"no input has a dimension {unknown[0]!r} to give a size to; there are {', '.join(dims)}")
    rows = {tuple(s.shape[:1]): s.name for s in map(_spec, graph.graph.output)}
    if len(rows) > 1:
        names = " and ".join(rows.values())
        raise SplitError(f"outputs {names} differ in their first size; scores of one model must all be per target")
    for spec in map(_spec, graph.graph.output):
        if not spec.dtype.startswith(("float", "bfloat")):
            raise SplitError(
                f"output {spec.name!r} is {spec.dtype}; scores must be floating point, cast it in the model"
            )
    progress("splitting by dataflow")
    scopes = {s.name: s.scope for s in specs if s.scope is not None}
    halves = split(
        graph,
        scopes,
        workload=cut.workload,
        flops_per_byte=cut.flops_per_byte,
        never=lambda model, of: not_one_users(model, of, specs),
    )
    obstacle = why_not_appendable(halves, specs)
    report = halves.report.as_dict()
    if obstacle is not None:
        report["notes"] = (*report["notes"], f"new events cannot be appended to a state: {obstacle}")
    with writing(out) as (work, commit):
        progress("writing the bundle")
        models = {"request": graph, "user_encoder": halves.user_encoder, "target_scorer": halves.target_scorer}
        externalize(models.values(), work)
        by_name = {s.name: s for s in specs}
        graphs: dict[str, GraphSpec] = {}
        for name, model in models.items():
            file = f"{name}.onnx"
            onnx.save(model, work / file)
            _check_file(work / file)
            inputs = tuple(by_name.get(i.name) or _spec(i) for i in model.graph.input)
            graphs[name] = GraphSpec(file, inputs, tuple(_spec(o) for o in model.graph.output))
        manifest = Manifest(
            model=source,
            weights="",
            precision=_precision(graphs["request"]),
            attention=attention,
            graphs=graphs,
            state=tuple(
                StateSpec(t.name, t.dtype, t.shape, t.bytes_per_token, t.value if t.verbatim else None)
                for t in halves.state
            ),
            appendable=obstacle is None,
            max_history=max_history,
            split=report,
            parity={},
            producer={"stca": stca.__version__, "onnx": onnx.__version__},
        )
        manifest = dataclasses.replace(manifest, weights=sha256_of(work / WEIGHTS))
        parity = prove(seal(work, manifest))
        return commit(dataclasses.replace(manifest, parity=parity))


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dims: Iterable[Any] = kind.shape.dim
    shape = tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param or f"{value.name}_{axis}" for axis, d in enumerate(dims)
    )
    return TensorSpec(value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name, shape)


def _id_limit(graph: onnx.GraphProto, name: str) -> int | None:
    """Rows of the smallest table that the input indexes, as it is or cast and reshaped; None when it indexes none."""
    rows = {t.name: t.dims[0] for t in graph.initializer if len(t.dims)}
    names = {name}
    for n in graph.node:
        if n.op_type in ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity") and n.input[0] in names:
            names.add(n.output[0])
    limits = [
        rows[n.input[0]]
        for n in graph.node
        if n.op_type == "Gather"
        and n.input[1] in names
        and n.input[0] in rows
        and next((a.i for a in n.attribute if a.name == "axis"), 0) == 0
    ]
    return min(limits, default=None)


def _precision(graph: GraphSpec) -> str:
    return graph.outputs[0].dtype


def _check_file(file: Path) -> None:
    """ONNX's full checker and strict shape inference on the file as it will be read, external weights and all."""
    try:
        onnx.checker.check_model(str(file), full_check=True)
        onnx.shape_inference.infer_shapes(onnx.load(file, load_external_data=False), check_type=True, strict_mode=True)
    except Exception as e:
        raise ExportError(f"{file.name}: fails ONNX's own check: {' '.join(str(e).split())[:300]}") from e
