"""What holds a bundle together: its manifest, its user state and its two halves speak of the same tensors.

Checked once, when a manifest is read, so that nothing after it has to ask: a state tensor is what the user encoder
gives and the target scorer takes; offsets are integers; the encoder sees users alone; scores have a row per target.
Then, when engines are open, the manifest is held against what each engine says of itself. The C++ runtime checks the
same (`contract.cpp`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Final

from stca.errors import BundleError
from stca.manifest import EngineEntry, Manifest
from stca.pieces import PIECES, pieces_of
from stca.specs import (
    FLOAT8,
    GROWER,
    HALVES,
    ITEM_BYTES,
    OFFSETS,
    SUM,
    TABLE_DTYPES,
    TARGETS,
    TOKENS,
    USERS,
    GraphSpec,
    StateSpec,
    TensorSpec,
)

_KNOWN: Final = frozenset({TOKENS, TARGETS, USERS, OFFSETS})
# More under the first axis is no row of a request or a state.
_LARGEST_ROW: Final = 1 << 30
# More are no table's: ids have 64 bits, and offsets of bytes too.
_MOST_ROWS: Final = 1 << 40
# More is no file's, and sizes of 64 bits would begin at 0 again: a few bytes could pass for all of them.
_MOST_BYTES: Final = 1 << 62
# Real ones have some hundreds.
_MOST_TENSORS: Final = 2000


def check_contract(manifest: Manifest) -> None:
    """Hold the parts of a manifest against one another.

    Args:
        manifest: parsed, its graphs all there, its dtypes known.

    Raises:
        ValueError: naming the tensor, what it is in one place and what in the other.
        BundleError: when its int8 matrices are of an older stca, which some processors would fail on.
    """
    matrices = (manifest.quantization or {}).get("weights")
    if isinstance(matrices, Mapping) and matrices.get("kind") == "int8" and matrices.get("zero_points") is not True:
        raise BundleError(
            "the bundle's int8 matrices have no zero points of their own, without which processors that lack VNNI fail"
            "; calibrate the float32 bundle again"
        )
    for name, graph in manifest.graphs.items():
        if (count := max(len(graph.inputs), len(graph.outputs), len(manifest.state))) > _MOST_TENSORS:
            raise ValueError(f"graphs.{name} or state has {count} tensors, the limit is {_MOST_TENSORS}")
        for specs in (graph.inputs, graph.outputs):
            if (twice := _twice(specs)) is not None:
                raise ValueError(f"{twice!r} comes twice in graphs.{name}")
        for spec in (*graph.inputs, *graph.outputs):
            _check_tensor(spec, f"graphs.{name}")
            for what, value in (("a least value", spec.low), ("a blank", spec.blank)):
                if value is not None and not -(1 << 63) <= value < 1 << 63:
                    raise ValueError(f"{spec.name!r} in graphs.{name} has {what} of more than 64 bits")
            if spec.dtype == FLOAT8 and name != PIECES and not any(spec.name == s.name for s in manifest.state):
                raise ValueError(f"{spec.name!r} in graphs.{name} is {_said(spec)}; that type is for states alone")
    for state in manifest.state:
        _check_tensor(state, "state")
    given = {s.name: s for s in manifest.graphs["request"].inputs}
    for spec in given.values():
        if spec.scope is None:
            raise ValueError(f"input {spec.name!r} has no scope")
        if spec.scope == "request" and OFFSETS in spec.shape:
            raise ValueError(f"offsets {spec.name!r} are of scope request; they count tokens of a user, or targets")
        if spec.limit and not spec.dtype.startswith(("int", "uint")):
            raise ValueError(f"input {spec.name!r} is {spec.dtype} and has a limit of ids")
    _check_halves(manifest, given)
    _check_tables(manifest)
    for entry in manifest.engines:
        check_entry(entry)
    if (twice := _twice(manifest.state)) is not None:
        raise ValueError(f"state {twice!r} comes twice")
    _check_states(manifest)
    _check_grower(manifest)
    pieces_of(manifest)
    for half in ("request", "target_scorer"):
        for spec in manifest.graphs[half].outputs:
            if not spec.shape or not spec.dtype.startswith(("float", "bfloat")) or TARGETS in spec.shape[1:]:
                raise ValueError(
                    f"graphs.{half}: output {spec.name!r} is {_said(spec)}, not a row of floating-point scores for "
                    "each target"
                )
    _check_scores(manifest.graphs["request"].outputs, manifest.graphs["target_scorer"].outputs)


def _check_tables(manifest: Manifest) -> None:
    """Tables that can be files of their sizes, and look-ups of tables that there are by ids that there are."""
    tables = {t.name: t for t in manifest.tables or ()}
    if len(tables) != len(manifest.tables or ()):
        raise ValueError("tables: two have one name")
    for table in tables.values():
        where = f"table {table.name!r:.80}"
        if table.dtype not in TABLE_DTYPES:
            known = f"{', '.join(TABLE_DTYPES[:-1])} or {TABLE_DTYPES[-1]}"
            raise ValueError(f"{where}: dtype is {table.dtype!r:.60}, expected {known}")
        small = 0 < table.rows < _MOST_ROWS and 0 < table.row_bytes <= _LARGEST_ROW
        if not small or table.rows * table.row_bytes > _MOST_BYTES:
            raise ValueError(f"{where}: has the shape [{table.rows}, {table.width}], which is no table's")
        if not 0 < table.block_rows <= _LARGEST_ROW or table.block_rows & (table.block_rows - 1):
            raise ValueError(f"{where}: block_rows is {table.block_rows}, expected a power of two")
        for file in (table.file, table.digests):
            if file in ("", ".", "..") or "/" in file or "\\" in file:
                raise ValueError(f"{where}: {file!r:.80} is no name of a file in the bundle")
    for name, graph in manifest.graphs.items():
        inputs = _by_name(graph.inputs)
        for lookup in graph.lookups or ():
            what = f"graphs.{name}: rows {lookup.rows!r:.80}"
            if lookup.table not in tables:
                raise ValueError(f"{what} are of table {lookup.table!r:.80}, which the bundle does not have")
            if lookup.rows in inputs:
                raise ValueError(f"{what} have the name of an input")
            if lookup.ids not in inputs and graph.ids is None:
                raise ValueError(f"{what} are looked up by {lookup.ids!r:.80}, which is no input")
            if lookup.ids in inputs and "int" not in inputs[lookup.ids].dtype:
                raise ValueError(f"{what} are looked up by {lookup.ids!r:.80}, which holds no ids")


def check_entry(entry: EngineEntry) -> None:
    """Whether a manifest's entry can be an engine's.

    Raises:
        ValueError: naming the field.
    """
    where = f"engine {entry.file!r:.80}"
    if entry.graph not in HALVES:
        raise ValueError(f"{where}: graph is {entry.graph!r:.60}, not one of {', '.join(HALVES)}")
    if entry.requests == 0:
        raise ValueError(f"{where}: requests is 0, expected at least 1, or null for any number")
    for tensor in (*entry.inputs, *entry.outputs):
        if tensor["dtype"] not in ITEM_BYTES:
            raise ValueError(
                f"{where}: inputs and outputs: {tensor['name']!r:.60} has the unknown dtype {tensor['dtype']!r:.60}"
            )
    for profile in entry.profiles:
        for dim, sizes in profile.items():
            if len(sizes) != 3 or list(sizes) != sorted(sizes):
                raise ValueError(
                    f"{where}: profiles: {dim!r:.60} has sizes {list(sizes)!r:.60}, expected three that rise"
                )
    for dim in entry.padded:
        if any(dim not in profile for profile in entry.profiles):
            raise ValueError(f"{where}: padded: {dim!r:.60} is not in every profile")


def _check_tensor(spec: TensorSpec | StateSpec, where: str) -> None:
    row = math.prod(max(n, 1) for n in spec.shape if isinstance(n, int)) * ITEM_BYTES[spec.dtype]
    if row > _LARGEST_ROW:
        raise ValueError(f"{spec.name!r} in {where} is {_said(spec)}, larger than any row")
    if "" in spec.shape:
        raise ValueError(f"{spec.name!r} in {where} is {_said(spec)}, with a size that has no name")
    if OFFSETS in spec.shape and (spec.shape != (OFFSETS,) or spec.dtype not in ("int32", "int64")):
        raise ValueError(f"{spec.name!r} in {where} is {_said(spec)}; offsets are int32 or int64 [{OFFSETS}]")


def _check_halves(manifest: Manifest, given: Mapping[str, TensorSpec]) -> None:
    states = {s.name for s in manifest.state}
    for half, of_user in (("user_encoder", True), ("target_scorer", False)):
        for spec in manifest.graphs[half].inputs:
            if not of_user and spec.name in states:
                continue
            known, where = given[spec.name], f"graphs.{half}"
            _require_same(spec, where, known, "graphs.request")
            if spec.scope not in (None, known.scope):
                there = f"scope {known.scope} in graphs.request"
                raise ValueError(f"{spec.name!r} has scope {spec.scope} in {where}, {there}")
            if (known.scope == "user") != of_user:
                raise ValueError(f"{where}: input {spec.name!r} is {'not ' if of_user else ''}of scope user")
    if extra := [o.name for o in manifest.graphs["user_encoder"].outputs if o.name not in states]:
        raise ValueError(f"the user encoder gives {extra[0]!r}, which is no state")


def _check_states(manifest: Manifest) -> None:
    encoder = manifest.graphs["user_encoder"]
    inputs, outputs = _by_name(encoder.inputs), _by_name(encoder.outputs)
    scorer = _by_name(manifest.graphs["target_scorer"].inputs)
    counted = {n for s in encoder.inputs for n in s.shape}
    counted |= {USERS} if OFFSETS in counted else set()
    for state in manifest.state:
        what = f"state {state.name!r}"
        made, taken = outputs.get(state.name), scorer.get(state.name)
        if made is None or (taken is None and state.append != SUM):
            misses = "user encoder does not give" if made is None else "target scorer does not take"
            raise ValueError(f"the {misses} the {what}")
        _require_same(state, "state", made, "graphs.user_encoder")
        if taken is not None:
            _require_same(state, "state", taken, "graphs.target_scorer")
        if state.input is not None:
            copied = inputs.get(state.input)
            if copied is None:
                raise ValueError(f"{what} copies {state.input!r}, which is no input of the user encoder")
            if copied.dtype != state.dtype or not _same_shape(copied.shape, state.shape):
                raise ValueError(f"{what} is {_said(state)}, and copies {state.input!r}, {_said(copied)}")
        elif OFFSETS in state.shape:
            raise ValueError(f"{what} is of offsets, and copies no input")
        for symbol in (TOKENS, USERS):
            if symbol in state.shape and symbol not in counted:
                raise ValueError(f"{what} counts {symbol}, which no input of the encoder does")
        if TARGETS in state.shape:
            raise ValueError(f"{what} counts targets")
        if state.append == SUM:
            _check_sum(manifest, state)
        if manifest.appendable and TOKENS in state.shape[1:]:
            raise ValueError(f"{what} has its history tokens on another axis than the first, and cannot be appended to")


def kept_sums(manifest: Manifest) -> dict[str, TensorSpec]:
    """By name of the sum in the state: the input of the user grower that takes the kept one.

    Raises:
        ValueError: when they do not go together.
    """
    grower, sums = manifest.graphs.get(GROWER), [s for s in manifest.state if s.append == SUM]
    taken = [s for s in grower.inputs if s.scope is None] if grower else []
    if len(taken) != len(sums):
        raise ValueError(f"graphs: {GROWER} takes {len(taken)} sums, the state has {len(sums)}")
    return {s.name: kept for s, kept in zip(sums, taken, strict=True)}


def _check_grower(manifest: Manifest) -> None:
    """It gives what the encoder gives, of the sums that are kept and of users' inputs."""
    kept, encoder, grower = kept_sums(manifest), manifest.graphs["user_encoder"], manifest.graphs.get(GROWER)
    if grower is None:
        return
    given, where = _by_name(manifest.graphs["request"].inputs), f"graphs.{GROWER}"
    for state in manifest.state:
        if state.name in kept:
            _require_same(kept[state.name], where, TensorSpec(state.name, state.dtype, state.shape), "state")
    for spec in grower.inputs:
        if spec.scope is not None:
            if spec.name not in given or given[spec.name].scope != "user":
                raise ValueError(f"{where}: input {spec.name!r} is no user input of the request graph")
            _require_same(spec, where, given[spec.name], "graphs.request")
    if [o.name for o in grower.outputs] != [o.name for o in encoder.outputs]:
        raise ValueError(f"{where}: its outputs are not those of the user encoder")
    for made, its in zip(grower.outputs, encoder.outputs, strict=True):
        _require_same(made, where, its, "graphs.user_encoder")


def _check_sum(manifest: Manifest, state: StateSpec) -> None:
    """A sum is of one user, of one size whatever the history, and made."""
    what = f"state {state.name!r}"
    if not manifest.appendable or any(s.is_offsets for s in manifest.graphs["user_encoder"].inputs):
        raise ValueError(f"{what} is a sum over tokens, in a bundle whose states are not appended to as such")
    if state.input is not None or state.dtype not in ("float32", "float64") or _KNOWN & set(state.shape):
        raise ValueError(f"{what} is {_said(state)}, and no sum over tokens is: float32 or float64, of one size")


def _check_scores(promised: Sequence[TensorSpec], given: Sequence[TensorSpec]) -> None:
    """A column that is another output's would be a wrong score under a right name."""
    for place, (spec, its) in enumerate(zip_longest(promised, given)):
        if spec is None or its is None or spec.name != its.name:
            names = [repr(one.name) if one is not None else "missing" for one in (its, spec)]
            raise ValueError(f"output {place} is {names[0]} in graphs.target_scorer, {names[1]} in graphs.request")
        _require_same(its, "graphs.target_scorer", spec, "graphs.request")


# The type of an engine's states, by its precision.
_STATES: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


# The sizes of one request, which an engine that takes no more may have instead of the names.
_ONE_REQUEST: Final = {USERS: 1, OFFSETS: 2}


def as_built(manifest: Manifest, half: str, precision: str, *, requests: int | None = None) -> GraphSpec:
    """What an engine of a half takes and gives.

    Args:
        manifest: of the bundle.
        half: of `HALVES`.
        precision: it was built with: states have that type.
        requests: most of one run; an engine of one has the sizes of one.
    """
    states, graph = {s.name for s in manifest.state if s.dtype == "float32"}, manifest.graphs[half]
    fixed = _ONE_REQUEST if requests == 1 else {}

    def built(spec: TensorSpec) -> TensorSpec:
        dtype = _STATES.get(precision, spec.dtype) if spec.name in states else spec.dtype
        return replace(spec, dtype=dtype, shape=tuple(fixed.get(str(n), n) for n in spec.shape))

    return replace(graph, inputs=tuple(map(built, graph.inputs)), outputs=tuple(map(built, graph.outputs)))


def check_engine(
    who: str,
    promised: GraphSpec,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    may_leave_out: bool = False,
    remedy: str = "export the bundle again",
) -> None:
    """Hold a graph of the manifest against what an engine says of itself.

    Args:
        who: the engine's graph, for the message.
        promised: the manifest's.
        inputs, outputs: the engine's; a string in a shape is a size that varies.
        may_leave_out: whether it may lack inputs: those that nothing in it reads.
        remedy: what to do when it differs.

    Raises:
        BundleError: naming the first tensor that differs.
    """
    sizes: dict[str, int | str] = {}
    for what, specs, found in (
        ("input", promised.inputs, _by_name(inputs)),
        ("output", promised.outputs, _by_name(outputs)),
    ):
        for spec in specs:
            its = found.get(spec.name)
            if its is None:
                if may_leave_out and what == "input":
                    continue
                raise BundleError(f"{who}: has no {what} {spec.name!r}; {remedy}")
            fits = its.dtype == spec.dtype and len(its.shape) == len(spec.shape)
            if not fits or any(_contradicts(p, f, what) for p, f in zip(spec.shape, its.shape, strict=True)):
                raise BundleError(
                    f"{who}: its {what} {spec.name!r} is {_said(its)}, the manifest says {_said(spec)}; {remedy}"
                )
            for p, f in zip(spec.shape, its.shape, strict=True):
                if isinstance(f, str) and f and sizes.setdefault(f, p) != p and int in (type(p), type(sizes[f])):
                    raise BundleError(
                        f"{who}: {f} of its {what} {spec.name!r} is one size, the manifest says {p} and {sizes[f]}; "
                        f"{remedy}"
                    )
    known = _by_name(promised.inputs)
    if extra := [s.name for s in inputs if s.name not in known]:
        raise BundleError(f"{who}: takes {extra[0]!r}, of which the manifest says nothing; {remedy}")


def _contradicts(promised: int | str, found: int | str, what: str) -> bool:
    if isinstance(promised, int):
        return isinstance(found, int) and found != promised
    if isinstance(found, int):
        return what == "input"  # an engine may know more of what it gives, not take less than was promised
    return bool(found) and not _same_size(promised, found)


def _require_same(spec: TensorSpec | StateSpec, where: str, other: TensorSpec, there: str) -> None:
    if spec.dtype != other.dtype or not _same_shape(spec.shape, other.shape):
        raise ValueError(f"{spec.name!r} is {_said(spec)} in {where}, {_said(other)} in {there}")


def _same_shape(one: Sequence[int | str], other: Sequence[int | str]) -> bool:
    return len(one) == len(other) and all(map(_same_size, one, other))


def _same_size(one: int | str, other: int | str) -> bool:
    """Whether two sizes are the same; names without a fixed meaning are an exporter's, and may differ by graph."""
    if isinstance(one, int) or isinstance(other, int):
        return one == other
    return one == other or not _KNOWN & {one, other}


def _by_name(specs: Iterable[TensorSpec]) -> dict[str, TensorSpec]:
    return {s.name: s for s in specs}


def _twice(specs: Iterable[TensorSpec | StateSpec]) -> str | None:
    """A name that comes more than once."""
    return next((name for name, count in Counter(s.name for s in specs).items() if count > 1), None)


def _said(spec: TensorSpec | StateSpec) -> str:
    return f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"
