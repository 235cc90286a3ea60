"""A bundle's graphs as files: what is asked before they are finished, and what is written when they are."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from stca.arrays import Array
from stca.errors import ExportError, SplitError, said
from stca.export.tables import Left, put_back, with_rows
from stca.export.weights import externalize
from stca.specs import GraphSpec, TensorSpec


@contextlib.contextmanager
def askable(
    request: onnx.ModelProto, asked: onnx.ModelProto, folder: Path, apart: Mapping[str, Array]
) -> Iterator[tuple[Path, Path]]:
    """The request graph, and as it was before the rules, as files that go again.

    Tables that leave for good have stand-ins there, and take any id.

    Args:
        request, asked: the two, one model perhaps. Not changed.
        folder: where to put them.
        apart: contents of the tables that come back, by name.
    """
    with tempfile.TemporaryDirectory(prefix="asked-", dir=folder) as place:
        models = {"request": request} if asked is request else {"request": request, "asked": asked}
        copies = {name: onnx.ModelProto() for name in models}
        for name, copy in copies.items():
            copy.CopyFrom(models[name])
            put_back(copy, apart)
        save(copies, Path(place), apart)
        yield Path(place, "request.onnx"), Path(place, f"{next(reversed(copies))}.onnx")


def save(models: Mapping[str, onnx.ModelProto], folder: Path, contents: Mapping[str, Array] | None = None) -> None:
    """Write models and their weights, each checked as a file; the models' weights are in the file afterwards.

    Args:
        models: by name.
        folder: where to.
        contents: of weights that are hollow in the models, by name.

    Raises:
        ExportError: naming the file that fails ONNX's own check.
    """
    externalize(models.values(), folder, contents)
    for name, model in models.items():
        onnx.save(model, folder / f"{name}.onnx")
        _check_file(folder / f"{name}.onnx")


def finish(
    models: Mapping[str, onnx.ModelProto], left: Left, known: Sequence[TensorSpec], folder: Path
) -> dict[str, GraphSpec]:
    """Write a bundle's graphs, with inputs of rows for the tables that left for good.

    Args:
        models: by name; weights move from them into the file.
        left: the tables of which stand-ins are in the models.
        known: inputs of the request graph, with what is known of each.
        folder: the bundle's.
    """
    files: dict[str, onnx.ModelProto] = {}
    specs: dict[str, GraphSpec] = {}
    for name, model in models.items():
        own = with_rows(model, left.tables) if left.tables else None
        spec = _graph_spec(name, model, known)
        files[name] = own.model if own else model
        if left.apart:
            put_back(files[name], left.apart)
        if own and own.lookups:
            spec = dataclasses.replace(spec, lookups=own.lookups)
        if own and own.ids:
            files[f"{name}.ids"] = own.ids
            spec = dataclasses.replace(spec, ids=f"{name}.ids.onnx")
        specs[name] = spec
    save(files, folder, left.apart)
    return specs


def _graph_spec(name: str, model: onnx.ModelProto, known: Sequence[TensorSpec]) -> GraphSpec:
    by_name = {s.name: s for s in known}
    own = [spec_of(i) for i in model.graph.input]  # the pointwise graph has other shapes than the request graph
    inputs = tuple(dataclasses.replace(by_name.get(i.name, i), shape=i.shape) for i in own)
    return GraphSpec(f"{name}.onnx", inputs, tuple(spec_of(o) for o in model.graph.output))


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    """An input or output of a graph; sizes without a name go by the value's and their axis.

    Raises:
        SplitError: when it is no tensor.
    """
    kind = value.type.tensor_type
    if kind.elem_type == onnx.TensorProto.UNDEFINED:
        raise SplitError(f"{value.name!r} is no tensor of a known type; requests and scores are tensors")
    dims: Iterable[Any] = kind.shape.dim
    shape = tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param or f"{value.name}_{axis}" for axis, d in enumerate(dims)
    )
    return TensorSpec(value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name, shape)


def _check_file(file: Path) -> None:
    """ONNX's full checker and strict shape inference on the file as it will be read, external weights and all."""
    try:
        onnx.checker.check_model(str(file), full_check=True)
        onnx.shape_inference.infer_shapes(onnx.load(file, load_external_data=False), check_type=True, strict_mode=True)
    except Exception as e:
        raise ExportError(f"{file.name}: fails ONNX's own check: {said(e)}") from e
