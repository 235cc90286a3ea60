"""Things that execute a graph. ONNX Runtime on a CPU is the embedded default."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from stca.errors import BuildError, EngineError
from stca.types import Array


class Engine(Protocol):
    """Executes one graph. Safe to call from several threads at once."""

    name: str
    outputs: tuple[str, ...]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name; `inputs` has exactly the graph's inputs, as contiguous arrays of their dtypes.

        All are numpy's, but for a state's tensors: those may be of a kind that the two halves' engines share, see
        `stca.runtime.state.StateArray`.
        """
        ...


def scores_of(outputs: Sequence[Array]) -> Array:
    """A model's outputs as one array of scores: one output as it is, several side by side as columns `(N_t, …)`."""
    if len(outputs) == 1:
        return outputs[0]
    return np.concatenate([x.reshape(len(x), int(np.prod(x.shape[1:]))) for x in outputs], axis=1)


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
        threads: threads of one run; None leaves it to ONNX Runtime (one per core).
        providers: execution providers in order of preference. One that cannot be loaded is an error, because ONNX
            Runtime itself would fall back to the CPU without a word.

        literal: compute quantize and dequantize nodes as they stand, for a check of the graph. Otherwise ONNX Runtime
            turns them into integer kernels, which is faster, and at opset 23 breaks graphs (1.31 moves such nodes over
            a Reshape and forgets their type).

    Raises:
        BuildError: when ONNX Runtime refuses the graph or a provider is not to be had.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        threads: int | None = None,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
        literal: bool = False,
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, once, and not printed besides
        if literal:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        for provider in providers:
            require_provider(provider)
        try:
            self._session = ort.InferenceSession(str(model), options, providers=list(providers))
        except Exception as e:  # ONNX Runtime's exceptions share no base class of their own
            raise BuildError(
                f"{Path(model).name}: ONNX Runtime cannot load it: {' '.join(str(e).split())[:300]}"
            ) from e
        missing = [p for p in providers if p not in self._session.get_providers()]
        if missing:
            raise BuildError(
                f"{missing[0]} could not be loaded and ONNX Runtime would fall back to the CPU; install its libraries, "
                "or ask for CPUExecutionProvider"
            )
        self.name = f"onnxruntime {ort.__version__} ({providers[0].removesuffix('ExecutionProvider')})"
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`. Inputs are read in place, without a copy."""
        try:
            values = self._session.run(self.outputs, dict(inputs))
        except Exception as e:
            shapes = ", ".join(f"{name} {list(np.shape(x))}" for name, x in inputs.items())
            said = " ".join(str(e).split())[:300]
            raise EngineError(f"ONNX Runtime failed on {shapes}: {said}; send less at once or free memory") from e
        return dict(zip(self.outputs, values, strict=True))
