"""TensorRT and TensorRT-RTX: plans of graphs that were checked before, built and refitted in a process of their own."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stca.arrays import Progress
from stca.bundle import Bundle
from stca.engines.builder import Plan, Wish
from stca.engines.cache import EngineCache
from stca.engines.files import digest_of_sources, keep
from stca.errors import BuildError
from stca.manifest import EngineEntry
from stca.plugins.driver import device_sm
from stca.tensorrt_flavours import FLAVOURS, Flavour, Job, build_plan, installed_version


@dataclass(frozen=True)
class TensorRTBuilder:
    """See `stca.engines.builder.Builder`."""

    name: str
    sized: bool = True

    @property
    def flavour(self) -> Flavour:
        return FLAVOURS[self.name]

    def parts(self, wish: Wish) -> dict[str, Any]:
        flavour, engine, requests = self.flavour, self.flavour.name, wish.workload.requests_max
        if wish.provider != "CPUExecutionProvider":
            raise BuildError(f"provider {wish.provider}: is ONNX Runtime's; {engine} has none")
        if wish.sm is None and flavour.ahead_of_time:
            raise BuildError(
                f"SM not given: {engine} builds for a GPU that need not be here; say which with --sm, 89 for 8.9"
            )
        own = "decomposed" if wish.precision == "fp32" and flavour.ahead_of_time else flavour.lowerings[0]
        # NVIDIA/TensorRT#4849: engines with quick plugins leak at each change of shape, and batches have many.
        chosen = wish.lowering or ("plugin" if requests > 1 else own)
        if chosen not in flavour.lowerings:
            raise BuildError(f"{engine} has no lowering {chosen!r}; it has {', '.join(flavour.lowerings)}")
        if requests > 1 and chosen not in ("plugin", "quick"):
            raise BuildError(
                f"{engine} serves one request per run with {chosen} attention, not {requests}: leave "
                "--requests-max at 1; take the plugin"
            )
        parts = {
            "version": installed_version(flavour),
            "sm": self._sm_here() if wish.sm is None else wish.sm,
            "lowering": chosen,
            "refit": wish.refit or flavour.refit,
            "requests": requests,
        }
        if chosen in ("plugin", "quick"):
            parts["plugin"] = digest_of_sources("plugins")
            parts["triton"] = importlib.metadata.version("triton")  # compiles the kernels
        return parts

    def _sm_here(self) -> int:
        try:
            return device_sm()
        except BuildError as e:
            raise BuildError(
                f"{self.flavour.name} builds on the GPU that is to run it: {e}; --sm NN --dry-run forecasts"
            ) from e

    def file_name(self, half: str, graph_file: str, parts: Mapping[str, Any]) -> str:
        return f"{half}.{self.flavour.name}.sm{parts['sm']}.{parts['precision']}.plan"

    def forecast(self, bundle: Bundle, plan: Plan, progress: Progress) -> None:
        if self.flavour.ahead_of_time:
            build_plan(_job(bundle, plan.parts, plan=None), progress)

    def check(self, bundle: Bundle, plan: Plan, folder: Path, progress: Progress) -> Mapping[str, Sequence[str]]:
        from stca.checks.engines import check_graphs

        progress("checking the engines' graphs on ONNX Runtime")
        return check_graphs(bundle, plan.parts["lowering"], folder, one_request=plan.parts["requests"] == 1)

    def build(
        self,
        bundle: Bundle,
        plan: Plan,
        padded: Sequence[str],
        folder: Path,
        cache: EngineCache | None,
        progress: Progress,
    ) -> tuple[dict[str, Any], Path | None]:
        parts, file = plan.parts, folder / plan.file
        timing = cache.timing(parts["flavour"], parts["version"], parts["sm"]) if cache else None
        job = _job(bundle, parts, plan=str(file), timing_cache=str(timing) if timing else None)
        built = build_plan(job, progress)
        entry = {
            **plan.entry(),
            "lowering": parts["lowering"] if built.attention_nodes else None,
            "version": built.version,
            "sm": built.sm,
            "requests": parts["requests"],
            "padded": list(padded),
            "refit": parts["refit"],
            "inputs": [{"name": n, "dtype": d, "shape": s} for n, d, s in built.inputs],
            "outputs": [{"name": n, "dtype": d, "shape": s} for n, d, s in built.outputs],
            "layers": built.layers,
            "fused_layers": built.fused_layers,
            "memory": built.memory,
            "seconds": round(built.seconds, 3),
            "bytes": file.stat().st_size,
        }
        keep(cache, plan.key, EngineEntry.of(entry), file, progress)
        return entry, file

    def refit(self, fresh: Bundle, entry: EngineEntry, before: Path, progress: Progress) -> None:
        plan = str(fresh.path / entry.file)
        build_plan(_job(fresh, entry.key, plan=plan, refit_from=str(before.absolute())), progress)


def _job(bundle: Bundle, parts: Mapping[str, Any], **more: Any) -> Job:
    """What the building process is asked for an engine with these parts, over the graphs of `bundle`.

    Raises:
        BuildError: when a part is not known.
    """
    asked = ("flavour", "precision", "lowering", "profiles", "sm", "refit", "requests")
    if missing := [name for name in ("graph", *asked) if name not in parts]:
        raise BuildError(f"the manifest does not say with which {missing[0]} the engine was built; build it again")
    return Job(
        graph=str(bundle.file(parts["graph"]).absolute()),
        state=[s.name for s in bundle.manifest.state],
        **{name: parts[name] for name in asked},
        **more,
    )


TENSORRT: Final = TensorRTBuilder("tensorrt")
TENSORRT_RTX: Final = TensorRTBuilder("tensorrt-rtx")
