"""Embedding tables beside the graphs: engines that are given ids, look up the rows, and hand those on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from stca.arrays import Array
from stca.bundle import Bundle
from stca.errors import EngineError, UsageError, told
from stca.runtime.engine import Engine, OnnxRuntimeEngine
from stca.runtime.options import POOL_PAGES
from stca.runtime.row_cache import RowCache
from stca.specs import TableSpec, TensorSpec
from stca.tables import TableFile, row_numbers


@runtime_checkable
class RowSource(Protocol):
    """Where a table's rows come from: a bundle's file, or the caller's own parameter server."""

    def rows(self, ids: Array) -> ArrayLike:
        """Rows `(n, width)` of numbers, in the order of the ids; called from any of a session's threads.

        Args:
            ids: `(n,)` int64, each in `[0, rows)` of its table.
        """
        ...


def sources(
    bundle: Bundle, own: Mapping[str, RowSource] | None = None, page_bytes: int | None = None
) -> dict[str, RowSource]:
    """Where the rows of each of a bundle's tables come from.

    Args:
        bundle: a loaded one.
        own: the caller's, by table; the others are the bundle's files.
        page_bytes: of the pages of rows kept in memory before each file; None for none. Of the caller's rows nothing is
            kept: they may change.

    Raises:
        UsageError: when the bundle has no such table.
        BundleError: when a file is not of its table's size.
    """
    tables, own = bundle.manifest.tables or (), own or {}
    if unknown := own.keys() - {t.name for t in tables}:
        known = ", ".join(t.name for t in tables) or "none"
        raise UsageError(f"tables: the bundle has no table {min(unknown)!r:.80} outside its graphs; it has {known}")
    files = {t.name: TableFile(bundle.path, t) for t in tables if t.name not in own}
    if page_bytes is None:
        return {t.name: own.get(t.name) or files[t.name] for t in tables}
    kept = {t.name: RowCache(files[t.name], t, page_bytes, POOL_PAGES) for t in tables if t.name in files}
    # A table whose rows are larger than a page would have pages for nothing.
    return {**files, **{name: one for name, one in kept.items() if one.places}, **own}


class Lookups:
    """What a graph's file takes in place of ids.

    Args:
        bundle: a loaded one.
        graph: name of the graph.
        rows: from `sources`; None opens the bundle's files.
    """

    def __init__(self, bundle: Bundle, graph: str, rows: Mapping[str, RowSource] | None = None) -> None:
        self.graph = bundle.manifest.graphs[graph]
        self._lookups = self.graph.lookups or ()
        self._specs = {t.name: t for t in bundle.manifest.tables or ()}
        self._sources = rows if rows is not None else sources(bundle)
        self._ids = OnnxRuntimeEngine(bundle.path / self.graph.ids, threads=1) if self.graph.ids else None

    @property
    def names(self) -> set[str]:
        """Inputs of the file that are rows."""
        return {one.rows for one in self._lookups}

    def complete(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs, and the rows that they ask for.

        Args:
            inputs: of the graph, by name; others are handed on.

        Raises:
            RequestError: when an id is no row of its table.
            BundleError: when a table's file was changed.
            EngineError: when the caller's source gives something else than rows.
        """
        made = dict(inputs)
        ids = made
        if self._ids is not None:
            ids = {**made, **self._ids.run({n: _on_host(made[n]) for n in self._ids.inputs})}
        found: dict[tuple[str, str], Array] = {}
        for one in self._lookups:
            key = (one.table, one.ids)
            if key not in found:
                found[key] = self._rows(one.table, _on_host(ids[one.ids]))
            made[one.rows] = found[key]
        return made

    def _rows(self, table: str, ids: Array) -> Array:
        spec, source = self._specs[table], self._sources[table]
        numbers = row_numbers(spec, ids)
        rows = source.rows(numbers) if isinstance(source, TableFile | RowCache) else _asked(spec, source, numbers)
        return rows.reshape(*ids.shape, spec.width)


def _asked(spec: TableSpec, source: RowSource, numbers: Array) -> Array:
    """Rows of the caller's source, which may give or raise anything."""
    if not len(numbers):
        return np.empty((0, spec.width), np.float32)
    try:
        rows = np.ascontiguousarray(source.rows(numbers), np.float32)
    except Exception as e:
        raise EngineError(f"table {spec.name!r}: its source failed for {len(numbers)} ids: {told(e)}") from e
    if rows.shape != (len(numbers), spec.width):
        raise EngineError(
            f"table {spec.name!r}: its source gave shape {list(rows.shape)} for {len(numbers)} ids, expected "
            f"[{len(numbers)}, {spec.width}]"
        )
    return rows


class TableEngine:
    """An engine of a graph some of whose inputs are rows of tables: it takes the graph's own inputs, ids among them."""

    def __init__(self, engine: Engine, lookups: Lookups) -> None:
        self.engine, self._lookups = engine, lookups
        self.name, self.outputs, self.may_leave_out = engine.name, engine.outputs, engine.may_leave_out
        self._takes = {s.name for s in engine.signature()[0]}
        self.inputs = tuple(s.name for s in lookups.graph.inputs)

    def signature(self) -> tuple[Sequence[TensorSpec], Sequence[TensorSpec]]:
        """See `Engine.signature`: ids that are looked up are as the manifest says, for no engine sees them."""
        inputs, outputs = self.engine.signature()
        ids = [s for s in self._lookups.graph.inputs if s.name not in self._takes]
        return [*(s for s in inputs if s.name not in self._lookups.names), *ids], outputs

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See `Engine.run`."""
        made = self._lookups.complete(inputs)
        return self.engine.run({n: x for n, x in made.items() if n in self._takes})


def with_tables(bundle: Bundle, graph: str, engine: Engine, rows: Mapping[str, RowSource] | None = None) -> Engine:
    """The engine of a graph as the manifest tells of it: with the look-ups of rows before it, where there are any.

    Args:
        bundle: a loaded one.
        graph: name of the graph.
        engine: of its file.
        rows: from `sources`; None opens the bundle's files.
    """
    if not bundle.manifest.graphs[graph].lookups:
        return engine
    return TableEngine(engine, Lookups(bundle, graph, rows))


def on_cpu(engine: Engine) -> bool:
    """Whether ONNX Runtime runs the graph: its states lie in memory, and threads are its own."""
    return isinstance(engine.engine if isinstance(engine, TableEngine) else engine, OnnxRuntimeEngine)


def _on_host(x: Any) -> Array:
    """An engine's array where it can be looked at."""
    found: Array = x if isinstance(x, np.ndarray) else x.to_host()
    return found
