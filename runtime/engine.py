"""Things that execute a graph. ONNX Runtime on a CPU is the embedded default."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import onnxruntime as ort

from stca.arrays import Array
from stca.errors import BuildError, EngineError, said_by_onnxruntime
from stca.runtime.machine import processors
from stca.runtime.options import CPU, Provider
from stca.specs import FLOAT8, TensorSpec


class Engine(Protocol):
    """Executes one graph. Safe to call from several threads at once.

    Attributes:
        name: what runs the graph, for people to read.
        outputs: their names.
        may_leave_out: whether it may lack inputs of its graph that nothing reads, and leaves them aside in `run`.
    """

    name: str
    outputs: tuple[str, ...]
    may_leave_out: bool

    def signature(self) -> tuple[Sequence[TensorSpec], Sequence[TensorSpec]]:
        """Its inputs and outputs in its own words; a size that varies without a name is empty."""
        ...

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name; `inputs` has exactly the graph's inputs, as contiguous arrays of their dtypes.

        All are numpy's, but for a state's tensors: those may be of a kind that the two halves' engines share, see
        `stca.runtime.state.StateArray`.
        """
        ...


def scores_of(outputs: Sequence[Array]) -> Array:
    """A model's outputs, a row each target, as one array of scores `(N_t, tasks)`: several outputs side by side."""
    if len(outputs) == 1 and outputs[0].ndim == 2:
        return outputs[0]
    if any(x.ndim == 0 for x in outputs):
        raise EngineError("the model gives one number for all targets; let it return a row of scores for each")
    rows = [x.reshape(len(x), math.prod(x.shape[1:])) for x in outputs]
    return rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1)


def require_safe() -> None:
    """Whether this ONNX Runtime is one that a request cannot end the process with.

    Raises:
        BuildError: when it divides by zero in a matrix product without rows, as versions before 1.32 do.
    """
    if tuple(map(int, ort.__version__.split(".")[:2])) < (1, 32):
        raise BuildError(
            f"ONNX Runtime {ort.__version__} can end the process on a request without events or targets; install "
            "onnxruntime 1.32 or newer"
        )


def require_provider(name: str) -> None:
    """Whether this build of ONNX Runtime has an execution provider at all.

    Raises:
        BuildError: naming those it has.
    """
    if name not in (known := ort.get_available_providers()):
        raise BuildError(
            f"ONNX Runtime {ort.__version__} has no {name} here, and would fall back to the CPU; it has "
            f"{', '.join(known)}"
        )


class OnnxRuntimeEngine:
    """A graph in ONNX Runtime.

    Args:
        model: path of the ONNX file; its weights may lie beside it.
        threads: threads of one run; None takes every processor that this process may use.
        providers: execution providers in order of preference, each a name or `(name, options)`. One that cannot be
            loaded is an error, because ONNX Runtime itself would fall back to the CPU without a word.
        config: session configuration entries by ONNX Runtime's names; they come last, so they win.
        literal: compute quantize and dequantize nodes as they stand, for a check of the graph. Otherwise ONNX Runtime
            turns them into integer kernels, which is faster. At opset 23 that breaks graphs: 1.31 moves such nodes over
            a Reshape and forgets their type.

    Raises:
        BuildError: when ONNX Runtime refuses the graph or a provider is not to be had.
    """

    may_leave_out = False

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        threads: int | None = None,
        providers: Sequence[Provider] = (CPU,),
        config: Mapping[str, str] | None = None,
        literal: bool = False,
    ) -> None:
        require_safe()
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, once, and not printed besides
        # Each half has threads of its own. Those that spin while the other computes would take its cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Else it makes products with dequantized weights in 8 bits on both sides, which no node of the graph says.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        # Else processors without VNNI add two products of int8 in 16 bits, and cut off what is more.
        options.add_session_config_entry("session.x64quantprecision", "1")
        if literal:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.intra_op_num_threads = processors() if threads is None else threads
        names = [p if isinstance(p, str) else p[0] for p in providers]
        for name in names:
            require_provider(name)
        try:
            for key, value in (config or {}).items():
                options.add_session_config_entry(key, value)
            # Its fallback would print to stdout, and serve on another provider than was asked for.
            self._session = ort.InferenceSession(str(model), options, providers=list(providers), enable_fallback=0)
            self._signature = _specs(self._session.get_inputs()), _specs(self._session.get_outputs())
        except Exception as e:  # ONNX Runtime's exceptions share no base class of their own
            raise BuildError(f"{Path(model).name}: ONNX Runtime cannot load it: {said_by_onnxruntime(e)}") from e
        missing = [p for p in names if p not in self._session.get_providers()]
        if missing:
            raise BuildError(
                f"{missing[0]} could not be loaded and ONNX Runtime would fall back to the CPU; install its libraries, "
                "or ask for CPUExecutionProvider"
            )
        self.name = f"onnxruntime {ort.__version__} ({names[0].removesuffix('ExecutionProvider')})"
        self._float8 = [spec.name for spec in self._signature[0] if spec.dtype == FLOAT8]
        self.inputs, self.outputs = (tuple(spec.name for spec in specs) for specs in self._signature)
        # What `InferenceSession.run` does besides, on each run: it looks for inputs that are missing, of which ONNX
        # Runtime itself tells, and falls back to another provider, which was switched off.
        self._run = self._session._sess.run

    def signature(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """See `Engine.signature`."""
        return self._signature

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`. Inputs are read in place, without a copy; 8-bit floats are uint8, as numpy has none."""
        try:
            if self._float8:
                typed = {
                    n: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(inputs[n], _ONNX_FLOAT8) for n in self._float8
                }
                inputs = {**inputs, **typed}
            values = self._run(self.outputs, inputs if isinstance(inputs, dict) else dict(inputs), None)
        except Exception as e:
            shapes = ", ".join(f"{name} {list(np.shape(x))}" for name, x in inputs.items())
            said = said_by_onnxruntime(e)
            what = "send less at once or free memory" if "alloc" in said else "is that what the model takes?"
            raise EngineError(f"ONNX Runtime failed on {shapes}: {said}; {what}") from e
        return dict(zip(self.outputs, values))  # noqa: B905 (it gives what it was asked for, and a keyword takes its time)


# ONNX's number of the type.
_ONNX_FLOAT8: Final = 17
# ONNX Runtime's words for types that are not numpy's.
_TYPES: Final = {"float": "float32", "double": "float64", "float8e4m3fn": FLOAT8}


def _specs(values: Sequence[Any]) -> list[TensorSpec]:
    made = []
    for v in values:
        kind = v.type.removeprefix("tensor(").removesuffix(")")
        made.append(TensorSpec(v.name, _TYPES.get(kind, kind), tuple("" if n is None else n for n in v.shape)))
    return made
