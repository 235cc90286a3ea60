"""A bundle with parts in 8 bits, as files: its graphs, weights and tables, and what its manifest says of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import onnx

from stca import folders, probe
from stca.bundle import Bundle, seal, sha256_of
from stca.calibration.quantized_products import ProductFormat, factors, quantize_products, watch
from stca.calibration.quantized_state import StateFormat, quantize
from stca.calibration.quantized_weights import RowFormat, quantize_tables, write_rows
from stca.export.pieces import in_pieces
from stca.export.weights import externalize
from stca.manifest import WEIGHTS, Manifest
from stca.pieces import PIECES, inputs_in_pieces, pieces_of
from stca.specs import HALVES, ITEM_BYTES, OFFSETS, POINTWISE, TOKENS, GraphSpec, TableSpec, TensorSpec

# Of tensors of the state and of weights, by name.
Formats: TypeAlias = Mapping[str, StateFormat | RowFormat | ProductFormat]

# The graphs of the model as it is, which those that are served are held against.
_WHOLE = frozenset({"request", POINTWISE})


def write_quantized(bundle: Bundle, formats: Formats, folder: Path) -> Bundle:
    """Write a bundle with parts in other formats as a new directory; nothing is proven of it.

    Args:
        bundle: in float32.
        formats: of the parts that change, by name; the state's are of one kind, and so are the weights'.
        folder: to make.
    """
    folder.mkdir()
    return seal(folder, write_files(bundle, formats, folder))


def write_files(bundle: Bundle, formats: Formats, folder: Path) -> Manifest:
    """Write the files of a quantized bundle; engines are left behind, they have the old state and weights.

    Args:
        bundle, formats: as of `write_quantized`.
        folder: an empty one.

    Returns:
        The manifest, without digests.
    """
    pieces, whole = len(pieces_of(bundle.manifest)), dict(bundle.manifest.graphs)
    in_place = whole.pop(PIECES, None)  # which is made anew of the changed scorer
    manifest = dataclasses.replace(bundle.manifest, graphs=whole)
    state = {n: f for n, f in formats.items() if isinstance(f, StateFormat)}
    tables = tuple(_table(bundle, t, formats, folder) for t in manifest.tables or ()) or None
    inside = formats.keys() - state.keys() - {t.name for t in tables or ()}
    changed = tuple(manifest.graphs) if inside else HALVES
    models = {name: onnx.load(bundle.file(name), load_external_data=bool(inside)) for name in changed}
    if inside:
        products = {n: f for n, f in formats.items() if isinstance(f, ProductFormat)}
        for name, model in models.items():
            quantize_tables(model, inside - products.keys())
            quantize_products(model, products, half=name not in _WHOLE)
    kept = quantize(models["user_encoder"], models["target_scorer"], manifest.state, state)
    graphs = _with_state(manifest, [TensorSpec(s.name, s.dtype, s.shape) for s in kept])
    if in_place is not None:
        scorer, offsets = graphs["target_scorer"], {s.name for s in kept if s.shape == (OFFSETS,)}
        models[PIECES] = in_pieces(models["target_scorer"], offsets, pieces + 1)
        graphs[PIECES] = dataclasses.replace(in_place, inputs=inputs_in_pieces(scorer, in_place, pieces + 1))
        manifest = dataclasses.replace(manifest, graphs=graphs)
    weights = manifest.weights
    if inside:
        externalize(models.values(), folder)
        weights = sha256_of(folder / WEIGHTS)
    _save(bundle, models, folder)
    for name in models:
        onnx.checker.check_model(str(folder / manifest.graphs[name].file), full_check=True)
    return dataclasses.replace(
        manifest, weights=weights, graphs=graphs, state=kept, tables=tables, engines=(),
        quantization=formats_told(formats),
    )  # fmt: skip


def _save(bundle: Bundle, models: Mapping[str, onnx.ModelProto], folder: Path) -> None:
    """Write graphs, and share the bundle's other files, where they are not written yet."""
    manifest = bundle.manifest
    engines = {name for e in manifest.engines for name in (e.file, str(Path(e.file).with_suffix(".weights")))}
    own = {graph.file for graph in manifest.graphs.values()}
    for name in manifest.names - {manifest.graphs[name].file for name in models} - (engines - own):
        if not (folder / name).exists():
            folders.share(bundle.path / name, folder / name)
    for name, model in models.items():
        onnx.save(model, folder / manifest.graphs[name].file)


def write_watched(bundle: Bundle, matrices: Collection[str], folder: Path) -> tuple[Bundle, dict[str, set[str]]]:
    """Write a bundle whose halves give what they multiply matrices with, besides their outputs.

    Args:
        bundle: in float32.
        matrices: names of the weights.
        folder: to make.

    Returns:
        The bundle, and of each matrix the activations that it is multiplied with, in either half.
    """
    folder.mkdir()
    models = {half: onnx.load(bundle.file(half), load_external_data=False) for half in HALVES}
    found: dict[str, set[str]] = {}
    for model in models.values():
        for name, given in factors(model, matrices).items():
            found.setdefault(name, set()).update(given)
    for model in models.values():
        watch(model, sorted(set().union(*found.values())))
    _save(bundle, models, folder)
    return seal(folder, dataclasses.replace(bundle.manifest, engines=())), found


def _table(bundle: Bundle, table: TableSpec, formats: Formats, folder: Path) -> TableSpec:
    """A table in a file, its rows in 8 bits where that is asked for."""
    format = formats.get(table.name)
    return table if format is None else write_rows(bundle.path, table, format.kind, folder)


def _with_state(manifest: Manifest, new: Collection[TensorSpec]) -> dict[str, GraphSpec]:
    encoder, scorer = (manifest.graphs[half] for half in HALVES)
    old, given = {s.name for s in manifest.state}, {i.name for i in scorer.inputs}
    inputs = [i for i in scorer.inputs if i.name not in old]
    read = [s for s in new if s.name not in old or s.name in given]  # sums are kept for the next event alone
    return {
        **manifest.graphs,
        "user_encoder": dataclasses.replace(encoder, outputs=tuple(new)),
        "target_scorer": dataclasses.replace(scorer, inputs=(*read, *inputs)),
    }


def formats_told(formats: Formats) -> dict[str, Any] | None:
    """What a manifest says of the parts in 8 bits."""
    told: dict[str, Any] = {}
    for name, format in formats.items():
        about: dict[str, Any] = {"kind": format.kind}
        if isinstance(format, StateFormat):
            part, about["granularity"] = "state", format.granularity
        elif isinstance(format, RowFormat):
            part = "tables"
        else:
            part, about["activations"] = "weights", format.activations
            if format.kind == "int8":
                about["zero_points"] = True  # bundles from before had none, and readers refuse those
        told.setdefault(part, {**about, "tensors": []})["tensors"].append(name)
    return told or None


def weights_bytes(manifest: Manifest) -> int:
    """Bytes of the weights file and of the tables in files."""
    files = manifest.files.get(WEIGHTS, {"bytes": 0})["bytes"]
    return int(files) + sum(t.bytes for t in manifest.tables or ())


def state_tokens(manifest: Manifest, tokens: int = 10_000) -> int:
    """History tokens of a state: no more than are served, and those of a fixed history; 0 where there is none."""
    return probe.history_of(manifest.graphs["request"].inputs, min(tokens, manifest.max_history or tokens))


def state_bytes(manifest: Manifest, tokens: int = 10_000) -> int:
    """Bytes of a user's state at `state_tokens` history tokens, its other sizes as the cut took them."""
    workload = manifest.split.get("workload", {})
    sizes = {**workload, TOKENS: state_tokens(manifest, tokens)}
    return sum(
        math.prod(n if isinstance(n, int) else int(sizes.get(n, 1)) for n in s.shape) * ITEM_BYTES[s.dtype]
        for s in manifest.state
    )
