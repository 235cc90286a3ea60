"""What a bundle says of itself: the schema of `manifest.json`, checked when it is read.

`docs/bundle_format.md` is the specification. `stca.bundle` keeps the directory that a manifest describes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from stca import typed_json
from stca.errors import BundleError, UsageError
from stca.specs import GRAPHS, ITEM_BYTES, SUM, GraphSpec, Padding, StateSpec, TableSpec, TensorSpec

FORMAT = "stca-bundle"
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"

# Stands where the manifest's own digest goes while it is computed: the digest is of the text with this in its place.
_NO_DIGEST = "0" * 64
# Real ones have tens of kilobytes and some ten files.
MOST_BYTES, _MOST_FILES = 16 << 20, 10_000
# Fields that came after the first bundles were written.
_ADDED = frozenset(
    {
        "low",
        "length_of",
        "blank",
        "min_history",
        "padding",
        "provider",
        "fused_layers",
        "tables",
        "lookups",
        "ids",
        "quantization",
        "append",
    }
)


class FileEntry(TypedDict):
    """A file of the bundle: its digest in hex, and its size."""

    sha256: str
    bytes: int


class EngineTensor(TypedDict):
    """An input or output of an engine: a state has the engine's precision, and a size that varies is a string."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """An engine that `stca build` added to a bundle; `docs/engines.md` has each field's meaning.

    Attributes:
        graph: the half it computes, of `HALVES`. file: where it is.
        flavour, version, sm, provider: what runs it: the library and its version, the GPU's compute capability (89 for
            8.9; None where any will do), ONNX Runtime's execution provider.
        precision: of weights and activations: `fp32`, `bf16`, `fp16`.
        lowering: how the operator got into it: `function`, `plugin`, `quick`, `fused`, `decomposed`; None in a
            half without one.
        requests: most requests of one run; None for any number.
        refit: `none`, `identical` or `weights`.
        profiles: for each dimension that varies the smallest, best and largest size.
        inputs, outputs: of the engine, where they are not the graph's own.
        padded: dimensions that may have rows beyond those the offsets count.
        memory: bytes at the largest sizes. seconds: of building. bytes: of its files.
        layers, fused_layers: what the library tells of it.
        key: all that went into it, by which the same engine is found again.
    """

    graph: str
    file: str
    flavour: str
    precision: str
    version: str = ""
    sm: int | None = None
    provider: str | None = None
    lowering: str | None = None
    requests: int | None = None
    refit: str = "none"
    profiles: tuple[Mapping[str, tuple[int, ...]], ...] = ()
    inputs: tuple[EngineTensor, ...] = ()
    outputs: tuple[EngineTensor, ...] = ()
    padded: tuple[str, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    bytes: int = 0
    layers: Mapping[str, int] = field(default_factory=dict)
    fused_layers: Any = None
    key: Mapping[str, Any] = field(default_factory=dict)

    @property
    def carries_code(self) -> bool:
        """Whether opening its plan runs native code that lies in it: our plugin's library, or what calls itself so."""
        return self.lowering == "plugin"

    @classmethod
    def of(cls, raw: Any) -> EngineEntry:
        """Parse and check an entry, also one that an earlier release wrote.

        Raises:
            TypeError, ValueError: naming the field.
        """
        from stca.contract import check_entry  # which knows what an entry is

        entry: EngineEntry = typed_json.as_type(cls, _whole(raw), "engine")
        check_entry(entry)
        return entry


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All a bundle says of itself; `docs/bundle_format.md` has each field's meaning.

    Attributes:
        model: `{"kind": "stca", "config": {…}}`, `{"kind": "callable", "name": …}` or `{"kind": "onnx"}`.
        weights: the weights' version: the SHA-256 of the weights file or, where tables left, `weights_version`.
        precision: dtype of the floating-point graph.
        attention: `projected` or `absorbed` where the operator is used, else None.
        graphs: `request`, `user_encoder` and `target_scorer`; `pointwise` too where `request` was lifted from it, and
            `user_grower` where states hold sums.
        state: the tensors of a user state.
        appendable: whether encoding new events alone and joining them to a state was shown exact at export.
        max_history: longest history served, in tokens; None for no limit.
        min_history: shortest history served, in tokens; None where an empty one is.
        padding: the histories that are not packed; None where there is none.
        split: the cut's report. parity: the report of the export's own checks. producer: versions that made it.
        engines: what `build` added.
        tables: embedding tables that left the graphs; None where there is none.
        quantization: the parts in 8 bits (`state`, `tables`, `weights`), and their budget; None where nothing is.
        files: name → `{"sha256", "bytes"}` for every file but the manifest and the tables' rows.
    """

    model: Mapping[str, Any]
    weights: str
    precision: str
    attention: str | None
    graphs: Mapping[str, GraphSpec]
    state: tuple[StateSpec, ...]
    appendable: bool
    max_history: int | None
    split: Mapping[str, Any]
    parity: Mapping[str, Any]
    producer: Mapping[str, str]
    min_history: int | None = None
    padding: tuple[Padding, ...] | None = None
    quantization: Mapping[str, Any] | None = None
    engines: tuple[EngineEntry, ...] = ()
    tables: tuple[TableSpec, ...] | None = None
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Every file of the bundle but the manifest."""
        return {*self.files, *(t.file for t in self.tables or ())}

    @property
    def cached(self) -> float:
        """The share of a request's work that a kept state saves, as the cut counted it at its nominal request."""
        whole = sum(int(self.split.get(f"{scope}_work", 0)) for scope in ("user", "request", "target"))
        return (int(self.split.get("user_work", 0)) - int(self.split.get("recomputed_work", 0))) / max(1, whole)

    @property
    def rounding(self) -> str | None:
        """The 8-bit kind that the halves round to as they compute; None where at most their weights were rounded."""
        told = self.quantization or {}
        products = told.get("weights", {})
        kind: str | None = products["kind"] if products.get("activations", "none") != "none" else None
        return told["state"]["kind"] if "state" in told else kind

    def to_json(self) -> str:
        """The manifest as JSON: `format`, `version`, `digest`, then the fields."""
        newest = any(s.append == SUM for s in self.state) or any(t.has_scales for t in self.tables or ())
        version = FORMAT_VERSION if newest else 2 if self.tables else 1  # the oldest that reads it
        head = {"format": FORMAT, "version": version, "digest": _NO_DIGEST}
        fields = dataclasses.asdict(self, dict_factory=_present)
        text = json.dumps({**head, **fields}, indent=1, allow_nan=False) + "\n"
        return text.replace(_NO_DIGEST, _digest_of(text), 1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            BundleError: when it is not ours, newer than this library, or lacks a field or has one of the wrong kind.
        """
        from stca.contract import check_contract  # which knows what a manifest is

        if len(text) > MOST_BYTES:
            raise BundleError(f"{MANIFEST} is larger than {MOST_BYTES >> 20} MiB; export the bundle again")
        try:
            raw = typed_json.parse(text)
        except (ValueError, RecursionError) as e:  # a number of 5,000 digits is a plain ValueError
            raise BundleError(f"{MANIFEST} is not JSON ({e}); export the bundle again") from e
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise BundleError(f"{MANIFEST} does not say format {FORMAT!r}; this is not a bundle")
        version = raw.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise BundleError(f"{MANIFEST} has version {version!r}; expected an integer from 1")
        if version > FORMAT_VERSION:
            raise BundleError(
                f"bundle has manifest version {version}, this stca reads up to {FORMAT_VERSION}; upgrade stca"
            )
        try:
            fields = {k: v for k, v in raw.items() if k not in ("format", "version", "digest")}
            if isinstance(engines := fields.get("engines"), list):
                fields["engines"] = [_whole(entry) for entry in engines]
            manifest: Manifest = typed_json.as_type(cls, fields, MANIFEST)
            _check_names(manifest)
            check_contract(manifest)
        except (TypeError, ValueError, KeyError, UsageError) as e:
            raise BundleError(f"{MANIFEST} is malformed ({e}); export the bundle again") from e
        return manifest


def _check_names(manifest: Manifest) -> None:
    """What the runtime looks up must be there: the three graphs, their inputs, and dtypes that are known.

    Raises:
        ValueError: naming what is missing.
    """
    if len(manifest.files) > _MOST_FILES:
        raise ValueError(f"files: has {len(manifest.files)} entries, more than {_MOST_FILES}")
    if missing := [g for g in GRAPHS if g not in manifest.graphs]:
        raise ValueError(f"graphs: misses {missing[0]!r}")
    for name, graph in manifest.graphs.items():
        if not graph.outputs:
            raise ValueError(f"graphs.{name}: has no outputs")
    tensors = [t for g in manifest.graphs.values() for t in (*g.inputs, *g.outputs)]
    for tensor in [*tensors, *(TensorSpec(s.name, s.dtype, s.shape) for s in manifest.state)]:
        if tensor.dtype not in ITEM_BYTES:
            raise ValueError(f"{tensor.name}: has the unknown dtype {tensor.dtype!r}")
    state, given = {s.name for s in manifest.state}, {t.name for t in manifest.graphs["request"].inputs}
    for name, known in (("user_encoder", given), ("target_scorer", given | state)):
        if unknown := [t.name for t in manifest.graphs[name].inputs if t.name not in known]:
            raise ValueError(f"graphs.{name}: input {unknown[0]!r} is no input of the request graph and no state")
    for history in manifest.padding or ():
        _check_padding(history, {t.name: t for t in manifest.graphs["request"].inputs})
    for spec in manifest.state:
        if spec.input is not None and spec.input not in given:
            raise ValueError(f"state {spec.name!r}: copies {spec.input!r}, which is no input of the request graph")


def _span(dtype: str) -> tuple[int, int]:
    """The least and the largest integer of a type; of a float, integers that it has without a doubt."""
    bits = 8 * ITEM_BYTES[dtype]
    if dtype == "bool":
        return 0, 1
    if dtype.startswith("uint"):
        return 0, (1 << bits) - 1
    if dtype.startswith("int"):
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return -(1 << 15), 1 << 15


def _check_padding(history: Padding, inputs: Mapping[str, TensorSpec]) -> None:
    """Raises ValueError, naming the input, unless the history's inputs are there and have one size along their axes."""
    if all(e.event is not None for e in history.inputs):
        raise ValueError("padding: a history has no inputs but masks")
    for name in (*(e.name for e in history.inputs), *([history.lengths] if history.lengths else [])):
        if name not in inputs or inputs[name].scope != "user":
            raise ValueError(f"padding: {name!r} is no user input of the request graph")
    first = history.inputs[0]
    for event in history.inputs:
        shape = inputs[event.name].shape
        if event.axis > 1 or event.axis >= len(shape) or shape[event.axis] != inputs[first.name].shape[first.axis]:
            raise ValueError(f"padding: {event.name!r} has no axis {event.axis} of the size of {first.name!r}")
        dtype = inputs[event.name].dtype
        least, most = _span(dtype)
        for value in (event.value, *([event.event] if event.event is not None else [])):
            if not least <= value <= most:
                raise ValueError(f"padding: {event.name!r} is {dtype}, which does not hold {value!r:.60}")
    if history.lengths and inputs[history.lengths].dtype[:3] not in ("int", "uin"):
        raise ValueError(f"padding: {history.lengths!r} is no integer")


def _whole(raw: Any) -> Any:
    """An engine's entry with every field, as this release names them."""
    if not isinstance(raw, Mapping):
        return raw  # and is refused
    defaults = {f.name: f.default for f in dataclasses.fields(EngineEntry) if f.default is not dataclasses.MISSING}
    given = {"lowering" if name == "attention" else name: value for name, value in raw.items()}
    if isinstance(outputs := given.get("outputs"), list | tuple) and all(isinstance(name, str) for name in outputs):
        given["outputs"] = ()  # the graph's own, by name
    if isinstance(key := given.get("key"), Mapping) and "name" in key:
        renamed = {"name": "graph", "graph": "graph_sha256", "attention": "lowering"}
        given["key"] = {renamed.get(name, name): value for name, value in key.items()}
    return {**defaults, "memory": {}, "layers": {}, "key": {}, **given}


def _present(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dataclass as JSON, without what came to the format later and says nothing: older readers do without it."""
    return {k: v for k, v in fields if v is not None or k not in _ADDED}


def weights_version(weights: str, digests: Sequence[str]) -> str:
    """What names a bundle's weights.

    Args:
        weights: SHA-256 of the weights file, hex.
        digests: of the digests file of each table that left the graphs, in order.
    """
    return _digest_of("\n".join([weights, *digests])) if digests else weights


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_sealed(text: str) -> bool:
    """Whether a manifest's text is what its own digest says, so that no changed byte of it goes unseen."""
    found = re.match(r'\{\s*"format": "[\w-]+",\s*"version": \d+,\s*"digest": "([0-9a-f]{64})"', text)
    return found is not None and found[1] == _digest_of(text[: found.start(1)] + _NO_DIGEST + text[found.end(1) :])
