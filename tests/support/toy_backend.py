"""A backend in one module, as someone else would write it: `onnx.reference` runs whole graphs, weights inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from stca.checks.blame import evaluator
from stca.errors import BuildError
from stca.export.engine_graph import engine_graph
from stca.specs import TensorSpec


def tensor_of(value):
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return TensorSpec(value.name, dtype, tuple(d.dim_param or d.dim_value for d in kind.shape.dim))


class ToyEngine:
    may_leave_out = False

    def __init__(self, file: Path) -> None:
        model = onnx.load_from_string(file.read_bytes())
        self.name, self._evaluator = "toy", evaluator(model)
        self._told = tuple([tensor_of(v) for v in values] for values in (model.graph.input, model.graph.output))
        self._inputs, self.outputs = (tuple(t.name for t in told) for told in self._told)

    def signature(self):
        return self._told

    def run(self, inputs):
        values = self._evaluator.run(None, {n: np.asarray(inputs[n]) for n in self._inputs})
        return dict(zip(self.outputs, values, strict=True))


class Server:
    name = "toy"
    ranks = (("", ("fp32",)),)

    def version(self):
        return onnx.__version__

    def obstacle(self, entries, machine):
        return None if all(e.version == machine.versions["toy"] for e in entries.values()) else "another version"

    def slow(self, provider, precision):
        return None

    def open(self, bundle, half, entry, *, threads, gpu):
        return ToyEngine(bundle.path / entry.file)


class Builder:
    sized = False

    def parts(self, wish):
        if wish.precision != "fp32":
            raise BuildError("toy engines are float32; leave --precision out")
        return {"version": onnx.__version__, "sm": None, "lowering": "function"}

    def file_name(self, half, graph_file, parts):
        return f"{half}.toy.plan"

    def forecast(self, bundle, plan, progress):
        progress("toy engines can always be built")

    def check(self, bundle, plan, folder, progress):
        return {}

    def build(self, bundle, plan, padded, folder, cache, progress):
        graph = engine_graph(bundle.file(plan.graph), state=[s.name for s in bundle.manifest.state])
        file = folder / plan.file
        file.write_bytes(graph.complete().SerializeToString())
        return {**plan.entry(), "seconds": 0.0, "bytes": file.stat().st_size}, file

    def refit(self, fresh, entry, before, progress):
        raise BuildError("toy engines are built anew")


SERVER, BUILDER = Server(), Builder()
