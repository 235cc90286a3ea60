"""How large each value of a graph is for a history and a number of targets, found by running where inference loses it.

A graph runs with two lengths of the history and two numbers of targets, all small. A size that is
`a + b N_h + c N_t + d N_h N_t` follows from the four, and a ranker's layers make no others.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx

from stca import probe
from stca.arrays import Array
from stca.errors import SplitError
from stca.export.analysis.cost import NominalSizes, Shown, any_sizes
from stca.export.analysis.rows import Everything, attempts, below
from stca.specs import OFFSETS, USERS, TensorSpec

_TOKENS: Final = (6, 10)
_TARGETS: Final = (3, 5)
_SHAPE: Final = " shape"


class Growth:
    """Shapes of a graph's values for any request, of those that shape inference does not know.

    Args:
        model: with its weights inline, or outside in `folder`; not changed.
        inputs: of requests, with their scopes.
        workload: sizes of symbolic dimensions that count neither events nor targets; 1 where not given.
        folder: where the weights' file lies, for a model without its weights.
        complete: makes the graph's own inputs of a request's, where rows of tables are among them.

    A graph that does not run here has no shapes but the inferred ones.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        inputs: Sequence[TensorSpec],
        workload: Mapping[str, int],
        folder: str | os.PathLike[str] | None = None,
        complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda feeds: feeds,
    ) -> None:
        self._inputs, self._complete = inputs, complete
        counted = probe.row_sizes(inputs, 2, 3)
        self._rows = {n: size for n, size in counted.items() if size > 1 and n != OFFSETS}
        self._sizes = {n: size for n, size in workload.items() if n not in self._rows and n not in (USERS, OFFSETS)}
        self._factors: dict[str, Array] = {}
        inferred = NominalSizes(model, {**any_sizes(model.graph), **workload})
        unknown = set(inferred.guesses)
        names = [n for node in model.graph.node for n in node.output if n in unknown and inferred.element_type(n)]
        if names:
            self._fit(names, Everything(_telling_shapes(model, names), [n + _SHAPE for n in names], folder))

    def _fit(self, names: Sequence[str], run: Everything) -> None:
        for integers, scale in attempts():
            sizes = list(itertools.product((scale * n for n in _TOKENS), _TARGETS))
            try:
                shapes = [run(self._feeds(*size, integers)) for size in sizes]
            except SplitError:
                continue
            terms = np.array([[1, n, m, n * m] for n, m in sizes], np.float64)
            for name in names:
                found = [shape[name + _SHAPE] for shape in shapes]
                if len({len(shape) for shape in found}) == 1:
                    self._factors[name] = np.linalg.solve(terms, np.array(found, np.float64).reshape(len(terms), -1))
            return

    def _feeds(self, tokens: int, targets: int, integers: int | None) -> Mapping[str, Any]:
        one = probe.single(below(self._inputs, integers), tokens, targets, np.random.default_rng(0), **self._sizes)
        return self._complete(probe.pack(self._inputs, [one]))

    def at(self, workload: Mapping[str, int]) -> Shown:
        """Shapes by value, for a request of these sizes of symbolic dimensions."""
        tokens, targets = (
            next((workload[n] for n, size in self._rows.items() if size == kind and n in workload), 1)
            for kind in (2, 3)
        )
        terms = np.array([1, tokens, targets, tokens * targets], np.float64)
        return {
            name: tuple(max(0, round(float(n))) for n in terms @ factors) for name, factors in self._factors.items()
        }


def _telling_shapes(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy that makes the shapes of these values besides, which keeps none of the values themselves."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.node.extend(onnx.helper.make_node("Shape", [n], [n + _SHAPE], n + _SHAPE) for n in names)
    return copy
