"""ONNX Runtime compiles when it loads, so what is built is the typed graph; float32 is the bundle's own file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnxruntime

from stca.arrays import Progress
from stca.bundle import Bundle
from stca.engines.builder import Plan, Wish, Workload
from stca.engines.cache import EngineCache
from stca.engines.files import with_weights
from stca.errors import BuildError
from stca.export.engine_graph import engine_graph
from stca.manifest import EngineEntry
from stca.runtime import engine as runtime_engine


class OnnxRuntimeBuilder:
    """See `stca.engines.builder.Builder`."""

    sized = False

    def parts(self, wish: Wish) -> dict[str, Any]:
        if wish.sm is not None or wish.refit is not None or wish.workload != Workload():
            raise BuildError("onnxruntime engines are for any GPU, any size and no refit: leave such options out")
        runtime_engine.require_provider(wish.provider)
        if wish.lowering not in (None, "function"):
            raise BuildError(f"onnxruntime runs the operator's function body; it has no lowering {wish.lowering!r}")
        version = onnxruntime.__version__
        return {"version": version, "sm": None, "lowering": "function", "provider": wish.provider}

    def file_name(self, half: str, graph_file: str, parts: Mapping[str, Any]) -> str:
        if parts["precision"] == "fp32":
            return graph_file
        provider = parts["provider"].removesuffix("ExecutionProvider").lower()
        return f"{half}.onnxruntime.{provider}.{parts['precision']}.onnx"

    def forecast(self, bundle: Bundle, plan: Plan, progress: Progress) -> None:
        """It builds anything that it runs."""

    def check(self, bundle: Bundle, plan: Plan, folder: Path, progress: Progress) -> Mapping[str, Sequence[str]]:
        return {}  # the graphs are the bundle's own, typed

    def build(
        self,
        bundle: Bundle,
        plan: Plan,
        padded: Sequence[str],
        folder: Path,
        cache: EngineCache | None,
        progress: Progress,
    ) -> tuple[dict[str, Any], Path | None]:
        began = time.monotonic()
        file, precision, provider = bundle.file(plan.graph), plan.parts["precision"], plan.parts["provider"]
        graph = engine_graph(file, state=[s.name for s in bundle.manifest.state], precision=precision)
        if precision != "fp32":
            file = graph.save(folder / plan.file)
        try:
            runtime_engine.OnnxRuntimeEngine(file, threads=1, providers=(provider,))
        except BuildError as e:
            if "Could not find an implementation" not in str(e):
                raise
            raise BuildError(f"ONNX Runtime's {provider} has no {precision} kernels for {plan.graph}; take fp32") from e
        entry = {
            **plan.entry(),
            "lowering": "function" if graph.attention_nodes else None,
            "provider": provider,
            "seconds": round(time.monotonic() - began, 3),
            "bytes": sum(p.stat().st_size for p in with_weights(file)),
        }
        return entry, None if file == bundle.file(plan.graph) else file

    def refit(self, fresh: Bundle, entry: EngineEntry, before: Path, progress: Progress) -> None:
        raise BuildError("onnxruntime engines are built anew")


BACKEND: Final = OnnxRuntimeBuilder()
