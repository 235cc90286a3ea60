"""Which axis of each value counts the rows of a batch, found by running: shape inference loses it in the first Reshape.

A pointwise graph is run with 3 rows and with 5, the first 3 the same. The axis that grew counts rows; where its rows of
both runs agree, they are each made of their own row alone. A third run, with the other sizes changed, tells what those
make of every shape.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import onnx

from stca import probe
from stca.arrays import Array
from stca.errors import SplitError
from stca.export.analysis.cost import Measured
from stca.export.analysis.scope import attribute, label
from stca.specs import TensorSpec

_FEW, _MORE = 3, 5
# Other sizes in the first two runs and in the third: all differences and all ratios differ, so a size tells its name.
_SIZES: Final = tuple((6 + i, 10 + 2 * i) for i in range(20))
# Integers without a limit: whatever a probe makes of them, then what is an index or a length of almost anything.
INTEGERS: Final = (None, 5, 1)
# Times the sizes of free histories: a model may pick the events that fit best, and take no fewer than it picks.
SCALES: Final = (1, 4, 16, 64)


class NeverRunsError(SplitError):
    """A graph that no other number of rows would let run; the message says what would."""


@dataclass(frozen=True)
class RowAxis:
    """The axis of a value that has `factor` entries for each row of the batch.

    Attributes:
        inner: whether the rows vary fastest, as in a Concat of batches along their own axis.
    """

    axis: int
    factor: int = 1
    inner: bool = False


class Rows:
    """What running tells of each value of a pointwise graph.

    Args:
        model: with its weights inline and no functions but the operator's.
        inputs: of the graph.
        rows: the symbolic size that counts rows.

    Attributes:
        axis: of values with one axis that counts rows.
        why_not: of values whose rows cannot be told apart, the reason; the others are the same for every batch.
        mixed: values some rows of which changed when others were added.
        counted: values whose rows differ where all rows of the inputs are the same: they hold places in the batch.
        dims: of every value that is a tensor: sizes by number, by a symbolic size's name, or None.

    Raises:
        SplitError: when the graph does not run with another number of rows; it names the node.
    """

    def __init__(self, model: onnx.ModelProto, inputs: Sequence[TensorSpec], rows: str) -> None:
        self._model, self._inputs, self._rows = model, inputs, rows
        self._free = [n for n in _symbols(inputs) if n != rows]
        self._sizes: dict[str, tuple[int, int]] = {}
        self.axis: dict[str, RowAxis] = {}
        self.why_not: dict[str, str] = {}
        self.mixed: set[str] = set()
        self.counted: set[str] = set()
        self.dims: dict[str, tuple[int | str | None, ...]] = {}
        few, more, same, other = self._runs()
        for name, a in few.items():
            self._look(name, a, more[name], same[name], other[name])

    def _runs(self) -> list[dict[str, Any]]:
        run = Everything(self._model)
        error: SplitError | None = None
        for integers, scale in attempts():
            self._sizes = {n: (a * scale, b * scale) for n, (a, b) in zip(self._free, _SIZES, strict=False)}
            more = self._feeds(_MORE, 0, integers)
            few = self._take(more, np.arange(_FEW))
            same = self._take(more, np.zeros(_FEW, np.int64))
            try:
                return [run(few), run(more), run(same), run(self._feeds(_FEW, 1, integers))]
            except SplitError as e:
                error = error or e
        assert error is not None
        raise error

    def _feeds(self, rows: int, run: int, integers: int | None) -> dict[str, Array]:
        sizes = {n: pair[run] for n, pair in self._sizes.items()} | {self._rows: rows}
        return draw(self._inputs, sizes, integers)

    def _take(self, feeds: Mapping[str, Array], rows: Array) -> dict[str, Array]:
        axes = {s.name: s.shape.index(self._rows) for s in self._inputs if self._rows in s.shape}
        return {n: x.take(rows, axes[n]) if n in axes else x for n, x in feeds.items()}

    def _look(self, name: str, few: Any, more: Any, same: Any, other: Any) -> None:
        if not all(isinstance(x, np.ndarray) and x.ndim == few.ndim for x in (few, more, same, other)):
            self.why_not[name] = "it is no tensor of a fixed rank"
            return
        self.dims[name] = tuple(map(self._size, few.shape, more.shape, other.shape))
        grown = [axis for axis, (a, b) in enumerate(zip(few.shape, more.shape, strict=True)) if a != b]
        if not grown:
            if not _alike(few, more):
                self.mixed.add(name)
            return
        axis, size = grown[0], few.shape[grown[0]]
        if len(grown) > 1 or size % _FEW or more.shape[axis] * _FEW != size * _MORE:
            self.why_not[name] = f"its shape is {list(few.shape)} for {_FEW} rows and {list(more.shape)} for {_MORE}"
            return
        factor = size // _FEW
        outer = np.moveaxis(few, axis, 0), np.moveaxis(more, axis, 0)
        inner = [x.reshape(factor, n, *x.shape[1:]) for x, n in zip(outer, (_FEW, _MORE), strict=True)]
        if _alike(outer[0], outer[1][:size]):
            self.axis[name] = RowAxis(axis, factor)
        else:
            self.axis[name] = RowAxis(axis, factor, inner=_alike(inner[0], inner[1][:, :_FEW]))
            if not self.axis[name].inner:
                self.mixed.add(name)
        if not _all_the_same(same, self.axis[name]):
            self.counted.add(name)

    def _size(self, few: int, more: int, other: int) -> int | str | None:
        if few != more:
            return self._rows if (few, more) == (_FEW, _MORE) else None
        if few == other:
            return few
        return next((n for n, pair in self._sizes.items() if pair == (few, other)), None)


def attempts() -> Iterator[tuple[int | None, int]]:
    """Integers and scales of sizes to try, until a graph runs."""
    return ((integers, scale) for scale in SCALES for integers in INTEGERS)


def draw(inputs: Sequence[TensorSpec], sizes: Mapping[str, int], integers: int | None = None) -> dict[str, Array]:
    """Random inputs of these sizes; integers without a limit are below `integers` where that is given."""
    specs = below(inputs, integers)
    return probe.single(specs, 1, 1, np.random.default_rng(0), **sizes)


def below(inputs: Sequence[TensorSpec], integers: int | None) -> list[TensorSpec]:
    """The inputs with integers without a limit below `integers`, where that is given."""
    free = {s.name for s in inputs if s.limit is None and s.dtype.startswith(("int", "uint"))}
    return [dataclasses.replace(s, limit=integers) if integers and s.name in free else s for s in inputs]


def _symbols(inputs: Sequence[TensorSpec]) -> list[str]:
    return list(dict.fromkeys(n for s in inputs for n in s.shape if isinstance(n, str)))


def _all_the_same(x: Array, rows: RowAxis) -> bool:
    shape = list(x.shape)
    parted = (rows.factor, _FEW) if rows.inner else (_FEW, rows.factor)
    parts = x.reshape(*shape[: rows.axis], *parted, *shape[rows.axis + 1 :])
    first = parts.take([0], rows.axis + rows.inner)
    return _alike(np.broadcast_to(first, parts.shape), parts)


def _alike(a: Array, b: Array) -> bool:
    """But for roundings: a product of more rows may sum in another order."""
    if a.shape != b.shape:
        return False
    if a.dtype.kind not in "fV":
        return bool(np.array_equal(a, b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    scale = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
    return bool(np.allclose(a, b, rtol=1e-4, atol=1e-5 * scale, equal_nan=True))


class Everything:
    """Runs a graph with ONNX Runtime and returns every value that a node of its top level makes.

    Args:
        model: with its weights inline, or outside in `folder`.
        values: the only ones to return; None for all.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        values: Sequence[str] | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self._model, self._folder = model, folder
        self._values = [n for node in model.graph.node for n in node.output if n] if values is None else list(values)

    @cached_property
    def _session(self) -> Any:
        import onnxruntime as ort

        copy = onnx.ModelProto()
        copy.CopyFrom(self._model)
        del copy.graph.output[:], copy.graph.value_info[:]
        for node in copy.graph.node:
            node.name = label(node)  # what an error goes by
        copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in self._values)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        if self._folder is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", os.fspath(self._folder)
            )
        return ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Any]:
        """Every value by name.

        Raises:
            SplitError: naming the node at fault and the sizes it was run with.
        """
        try:
            wanted = {i.name for i in self._session.get_inputs()}
            found = self._session.run(self._values, {n: x for n, x in feeds.items() if n in wanted})
        except Exception as e:  # ONNX Runtime's own types are not importable from a stable place
            raise self._why(e, feeds) from e
        return dict(zip(self._values, found, strict=True))

    def _why(self, error: Exception, feeds: Mapping[str, Array]) -> SplitError:
        text = " ".join(str(error).split())
        sizes = ", ".join(f"{n} {list(x.shape)}" for n, x in feeds.items())
        found = re.search(r"running (\w+) node\. Name:'([^']*)' Status Message: (?:\S*[/\\]\S+ )?(.*)", text)
        if lacks := re.search(r"find an implementation for (\w+)\(\d+\) node with name '([^']*)'", text):
            return NeverRunsError(
                f"node {lacks[2]!r}: ONNX Runtime has no {lacks[1]} for its types on a CPU; export in float32 "
                "and choose the engines' precision with `stca build --precision`"
            )
        if narrow := re.search(r"No corresponding Numpy type for Tensor Type\. (\w+)", text):
            return NeverRunsError(
                f"the model computes in {narrow[1]}, of which no value can be looked at here; export in float32 and "
                "choose the engines' precision with `stca build --precision`"
            )
        if not found:
            return SplitError(f"the model does not run with {sizes}: {text[:300]}")
        kind, name, said = found.groups()
        why = f"node {name!r} ({kind}) fails with {sizes}{self._baked(name)}: {said[:200]}"
        if kind == "Gather" and "out of data bounds" in said:
            return NeverRunsError(f"{why}; an input holds ids that its table lacks: say its limit (TensorSpec, --ids)")
        return SplitError(why)

    def _baked(self, name: str) -> str:
        """Constant sizes that a node is given, which the traced example's may be among."""
        graph = self._model.graph
        node = next((n for n in graph.node if label(n) == name), None)
        if node is None or node.op_type not in ("Reshape", "Expand", "Split"):
            return ""
        constants = {t.name: onnx.numpy_helper.to_array(t).tolist() for t in constants_of(graph)}
        sizes = constants.get(node.input[1]) if len(node.input) > 1 else attribute(node, "split", None)
        return "" if sizes is None else f"; its sizes {sizes} are baked in, those of the traced example perhaps"


def constants_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers, and the tensors of Constant nodes under their output's name."""
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant" and not node.domain and node.attribute[0].name == "value":
            tensor = onnx.TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            yield tensor


def dims_of(graph: onnx.ModelProto, specs: Sequence[TensorSpec]) -> Measured:
    """Shapes of values as runs show them, for costs: none where no size counts targets, or the graph does not run."""
    rows = next((n for s in specs if s.scope == "target" for n in s.shape if isinstance(n, str)), None)
    if rows is None or any(s.is_offsets for s in specs):
        return {}
    try:
        return Rows(graph, specs, rows).dims
    except SplitError:
        return {}
