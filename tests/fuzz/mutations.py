"""Changes to the files of a bundle, with its digests made right again: what an honest but broken writer might leave."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import onnx

from stca.manifest import MANIFEST, WEIGHTS, EngineEntry
from stca.specs import ITEM_BYTES

# A bundle in memory: its manifest, and its other files' bytes by name.
Manifest: TypeAlias = dict[str, Any]
Files: TypeAlias = dict[str, bytes]

WORDS = (
    *("", "N_h", "N_t", "B", "B_plus_1", "rows", "x\ny", "\x01", "../a", "/etc/passwd", "token", "scores", "no.onnx"),
    *("user", "request", "target", "left", "right", "none", "onnxruntime", "tensorrt", "CPUExecutionProvider", "fp32"),
    *ITEM_BYTES,
)
NUMBERS = (0, 1, -1, 2, 3, 5, 64, 255, 1 << 31, 1 << 40, 1 << 62, 1 << 64, 0.5, -0.0, 1e300)
PARTS = (
    "graphs",
    "state",
    "engines",
    "padding",
    "tables",
    "max_history",
    "min_history",
    "appendable",
    "split",
    "precision",
)


def read(folder: Path) -> tuple[Manifest, Files]:
    """A bundle's manifest and its other files."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != MANIFEST}
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8")), files


def write(folder: Path, manifest: Manifest, files: Files) -> None:
    """The bundle on disk, every digest made right."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    digests = {n: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for n, c in files.items()}
    fields = {k: v for k, v in manifest.items() if k not in ("format", "version", "digest", "files")}
    head = {"format": manifest["format"], "version": manifest["version"], "digest": "0" * 64}
    text = json.dumps({**head, **fields, "files": digests}, indent=1)
    text = text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def with_weights(manifest: Manifest, files: Files) -> Manifest:
    """The manifest of weights that were changed."""
    return manifest | {"weights": hashlib.sha256(files[WEIGHTS]).hexdigest()}


def add_engines(manifest: Manifest, files: Files) -> None:
    """Engines of both halves as `stca build` adds them: copies of the graphs for ONNX Runtime."""
    entries = []
    for half in ("user_encoder", "target_scorer"):
        name = f"{half}.built.onnx"
        files[name] = files[manifest["graphs"][half]["file"]]
        entry = EngineEntry(
            graph=half, file=name, flavour="onnxruntime", precision="fp32", provider="CPUExecutionProvider"
        )
        entries.append(json.loads(json.dumps(dataclasses.asdict(entry))))
    manifest["engines"] = entries


def change(rng: random.Random, manifest: Manifest, files: Files) -> None:
    """One change of a random kind."""
    kinds: Sequence[Callable[[random.Random, Manifest, Files], None]] = (
        *(_anywhere,) * 4,
        *(_everywhere,) * 4,
        _engine,
        *(_graph,) * 3,
        _weights,
        _bytes,
    )
    rng.choice(kinds)(rng, manifest, files)


def change_text(rng: random.Random, text: str) -> str:
    """A manifest's text with one or two changes to what it says; its digest is not made right."""
    manifest: Manifest = json.loads(text)
    if rng.random() < 0.3:
        add_engines(manifest, {spec["file"]: b"" for spec in manifest["graphs"].values()})
    for _ in range(rng.randint(1, 2)):
        kind = rng.choice((_anywhere, _everywhere))
        try:
            kind(rng, manifest, {})
        except (KeyError, TypeError, IndexError, AttributeError):  # an earlier change left nothing of the kind
            break
    return json.dumps(manifest, indent=1)


def _value(rng: random.Random) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice(([], {}, [[]], {"x": 1}, ["N_h", 2], [1] * 40))
    return "y" * 100_000 if kind == 2 and rng.random() < 0.05 else rng.choice(NUMBERS if kind < 4 else WORDS)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each place of a JSON tree as its holder and its index or key."""
    members = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, member in members:
        yield tree, key
        yield from _places(member)


def _anywhere(rng: random.Random, manifest: Manifest, files: Files) -> None:
    top = {part: manifest[part] for part in PARTS if part in manifest}
    _change_in(rng, top)
    manifest.update(top)


def _engine(rng: random.Random, manifest: Manifest, files: Files) -> None:
    if not manifest.get("engines"):
        add_engines(manifest, files)
    for _ in range(rng.randint(1, 3)):
        _change_in(rng, {"engines": manifest["engines"]})


def _change_in(rng: random.Random, tree: Any) -> None:
    holder, key = rng.choice(list(_places(tree)))
    how = rng.randrange(5)
    if how == 0 and holder is not tree:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice((*WORDS, *holder))] = holder[key]
    elif how == 1:
        holder.append(holder[key])
    elif how == 2 and isinstance(holder, list):
        holder[0], holder[key] = holder[key], holder[0]
    else:
        holder[key] = _value(rng)


def _everywhere(rng: random.Random, manifest: Manifest, files: Files) -> None:
    """One tensor changed wherever it stands, so that the manifest goes on agreeing with itself."""
    specs = [t for g in manifest["graphs"].values() for side in ("inputs", "outputs") for t in g[side]]
    specs += manifest["state"]
    name = rng.choice(specs)["name"]
    copies = [(s["name"], s.get("input")) for s in manifest["state"]]
    names = {name, *(of for own, of in copies if own == name), *(own for own, of in copies if of == name)}
    what, axis, word, number = rng.randrange(7), rng.randrange(3), rng.choice(WORDS[:10]), rng.choice(NUMBERS[:11])
    dtype, fresh = rng.choice(list(ITEM_BYTES)), rng.choice(WORDS)
    for spec in specs:
        if spec["name"] not in names:
            continue
        shape = spec["shape"]
        if what == 0:
            spec["dtype"] = dtype
        elif what in (1, 2):
            shape[axis : axis + 1] = [word if what == 1 else number]
        elif what == 3:
            del shape[axis : axis + 1]
        elif what == 4 and "scope" in spec:
            spec["limit"] = number
        elif what == 5 and spec.get("scope"):
            spec["scope"] = ("user", "request", "target")[axis]
        elif what == 6 and spec["name"] == name:
            spec["name"] = fresh


def _graph(rng: random.Random, manifest: Manifest, files: Files) -> None:
    """A change inside an ONNX file, which goes on being protobuf."""
    name = rng.choice([n for n in files if n.endswith(".onnx")])
    try:
        model = onnx.load_model_from_string(files[name])
    except Exception:
        return _bytes(rng, manifest, files)
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    values = [*model.graph.input, *model.graph.output]
    kinds: list[Callable[[], None]] = []
    if nodes:
        node = rng.choice(nodes)
        kinds += [lambda: _change_node(rng, node, nodes)] * 3
        kinds.append(lambda: model.graph.node.remove(rng.choice(model.graph.node)) if model.graph.node else None)
    if values:
        kinds.append(lambda: _change_type(rng, rng.choice(values)))
        kinds.append(lambda: setattr(rng.choice(values), "name", rng.choice(WORDS)))
    if model.graph.initializer:
        kinds += [lambda: _change_tensor(rng, rng.choice(model.graph.initializer))] * 2
    if model.functions:
        kinds.append(lambda: model.functions.remove(rng.choice(model.functions)))
    kinds.append(lambda: setattr(model, "ir_version", rng.choice((0, 3, 99))))
    kinds.append(lambda: model.opset_import.pop() and None if model.opset_import else None)
    rng.choice(kinds)()
    files[name] = model.SerializeToString()
    return None


def _change_node(rng: random.Random, node: onnx.NodeProto, nodes: Sequence[onnx.NodeProto]) -> None:
    other, side = rng.choice(nodes), rng.choice((node.input, node.output))
    how = rng.randrange(4)
    if how == 0:
        node.op_type = rng.choice((other.op_type, "Identity", "Loop", "NoSuch"))
    elif how == 1 and side:
        side[rng.randrange(len(side))] = rng.choice(("", *other.input, *other.output))
    elif how == 2 and node.attribute:
        attribute = rng.choice(node.attribute)
        attribute.i, attribute.f = rng.choice((0, 1, -1, 7, 1 << 40)), rng.choice((0.0, -1.0, float("nan"), 1e38))
    else:
        node.domain = rng.choice(("", "stca", "com.microsoft", "x"))


def _change_type(rng: random.Random, value: onnx.ValueInfoProto) -> None:
    tensor = value.type.tensor_type
    if rng.random() < 0.4 or not tensor.shape.dim:
        tensor.elem_type = rng.choice((1, 6, 7, 9, 10, 11, 16))
    elif rng.random() < 0.5:
        rng.choice(tensor.shape.dim).dim_value = rng.choice((0, 1, 2, 64, 1 << 40))
    else:
        rng.choice(tensor.shape.dim).dim_param = rng.choice(WORDS[:6])


def _change_tensor(rng: random.Random, tensor: onnx.TensorProto) -> None:
    how = rng.randrange(4)
    if how == 0:
        tensor.data_type = rng.choice((0, 1, 6, 7, 9, 10, 11, 16, 99))
    elif how == 1 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, 1, -1, 3, 1 << 20, 1 << 40, 1 << 62))
    elif how == 2 and tensor.external_data:
        entry = rng.choice(tensor.external_data)
        entry.value = rng.choice(
            (str(rng.choice(NUMBERS)), "../weights", "/etc/passwd", MANIFEST, "", "no", "-1", "9" * 30)
        )
    elif tensor.raw_data:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data))]


def _weights(rng: random.Random, manifest: Manifest, files: Files) -> None:
    """Numbers that no training leaves, or a header that says something else; the weights' version follows."""
    content = bytearray(files[WEIGHTS])
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.7 and len(content) - begin >= 4:
        for _ in range(rng.randint(1, 8)):
            at = begin + 4 * rng.randrange((len(content) - begin) // 4)
            bad = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, -1.0, 0.0))
            content[at : at + 4] = struct.pack("<f", bad)
    else:
        content = content[: rng.randrange(len(content))] if rng.random() < 0.5 else content + bytes(rng.randrange(99))
    files[WEIGHTS] = bytes(content)
    if rng.random() < 0.9:
        manifest.update(with_weights(manifest, files))


def _bytes(rng: random.Random, manifest: Manifest, files: Files) -> None:
    name = rng.choice([n for n in files if n != WEIGHTS])
    content = bytearray(files[name])
    for _ in range(rng.randint(1, 3)):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    files[name] = bytes(content[: rng.randrange(len(content) + 1)] if rng.random() < 0.2 else content)
