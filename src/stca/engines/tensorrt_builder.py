"""The process that builds one TensorRT plan: `python -m stca.engines.tensorrt_builder JOB.json REPLY.json`.

It may die; `stca.tensorrt_flavours.build_plan` starts it and turns its death into an error. Nothing here degrades: an
engine without its fused attention is not written.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from stca.errors import BuildError, StcaError, said
from stca.plugins.driver import device_sm
from stca.tensorrt_flavours import FLAVOURS, PROGRESS, Built, Flavour, Job, largest_sizes, load, look_into, runtime_for

if TYPE_CHECKING:
    import onnx

    from stca.export.engine_graph import EngineGraph


def main(argv: Sequence[str]) -> int:
    """Do one job and write what came of it."""
    request, reply = map(Path, argv)
    job = Job(**json.loads(request.read_text()))
    try:
        answer = dataclasses.asdict(_refit(job) if job.refit_from else _build(job))
    except StcaError as e:
        answer = {"error": str(e)}
    reply.write_text(json.dumps(answer))
    return 2 if "error" in answer else 0


def _say(text: str) -> None:
    print(f"{PROGRESS}{text}", flush=True)


def _build(job: Job) -> Built:
    flavour = FLAVOURS[job.flavour]
    trt = load(flavour)
    sm = _target(trt, flavour, job.sm)
    if job.plan is None:
        return Built(trt.__version__, sm)
    graph = _graph(job, sm)
    began = time.monotonic()
    log = _logger(trt)
    try:
        builder = trt.Builder(log)
    except TypeError as e:  # how the bindings report a null builder
        raise BuildError(f"{job.flavour} {trt.__version__} makes no builder: is its full library installed?") from e
    flags = trt.NetworkDefinitionCreationFlag
    wanted = ["STRONGLY_TYPED"] + (["PREFER_AOT_PYTHON_PLUGINS"] if job.lowering == "quick" else [])
    network = builder.create_network(sum(1 << int(getattr(flags, name)) for name in wanted))
    parser = trt.OnnxParser(network, log)
    config = _config(trt, builder, graph, job, flavour, sm)
    if job.lowering == "plugin" and graph.attention_nodes:
        config.plugins_to_serialize = [_plugin_library(trt, graph, sm, Path(job.folder))]  # the plan carries it
    _say("parsing")
    keep_alive = _parse(parser, graph, Path(job.graph).name)
    layers = collections.Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    _require_attention(job.lowering, graph.attention_nodes, layers)
    _say("building")
    plan = builder.build_serialized_network(network, config)
    del keep_alive
    if plan is None:
        raise BuildError(_explain(job, log.errors))
    told = None if flavour.ahead_of_time else _look_into(trt, log, plan, job.lowering)
    layers_built = told["layers"] if told else log.layers or None
    if layers_built and job.lowering in ("plugin", "quick"):
        _require_plugins(layers_built, graph.attention_nodes)
    Path(str(job.plan)).write_bytes(memoryview(plan))
    if flavour.timing_cache and job.timing_cache and (timings := config.get_timing_cache()) is not None:
        _save(Path(job.timing_cache), memoryview(timings.serialize()))

    return Built(
        version=trt.__version__,
        sm=sm,
        seconds=time.monotonic() - began,
        layers=dict(layers),
        attention_nodes=graph.attention_nodes,
        memory=_memory(graph, job, told),
        fused_layers=layers_built,
        inputs=_tensors(graph.model.graph.input),
        outputs=_tensors(graph.model.graph.output),
    )


def _graph(job: Job, sm: int) -> EngineGraph:
    """The graph of a job, quick plugins registered: the parser looks for them, and so does a plan that is loaded."""
    if job.lowering == "quick":
        importlib.import_module("stca.plugins.tensorrt_plugin").settings.sm = sm
    from stca.export.engine_graph import engine_graph  # once it is known that there is something to build with

    return engine_graph(
        Path(job.graph),
        state=job.state,
        precision=cast(Any, job.precision),
        lowering=cast(Any, job.lowering),
        one_request=job.requests == 1,
        sizes={dim: sizes[1] for dim, sizes in job.profiles[-1].items()},
        sm=sm,
    )


def _plugin_library(trt: Any, graph: EngineGraph, sm: int, folder: Path) -> str:
    """A plugin library for the graph's attentions, built now and registered."""
    from stca.plugins import plugin_library, tensorrt_graph

    _say("compiling kernels")
    library = str(plugin_library.build(tensorrt_graph.operators(graph.model), [sm], folder))
    trt.get_plugin_registry().load_library(library)
    return library


def _tensors(values: Iterable[onnx.ValueInfoProto]) -> list[list[Any]]:
    """`(name, dtype, shape)` of each, in the words of a manifest."""
    from onnx import helper

    found: list[list[Any]] = []
    for value in values:
        kind = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        found.append([value.name, dtype, [d.dim_param or d.dim_value for d in kind.shape.dim]])
    return found


def _refit(job: Job) -> Built:
    """Give a finished engine the present weights of the graph it was built from.

    NVIDIA's own refitter finds which of the engine's weights an initializer became. Needs the GPU that the engine was
    built for; not run without one.
    """
    flavour = FLAVOURS[job.flavour]
    trt = load(flavour)
    sm = _target(trt, flavour, job.sm)
    graph = _graph(job, sm)
    began = time.monotonic()
    log = _logger(trt)
    engine = runtime_for(trt, log, job.lowering).deserialize_cuda_engine(Path(str(job.refit_from)).read_bytes())
    if engine is None:
        why = f": {said(log.errors[0])}" if log.errors else ""
        raise BuildError(f"{job.flavour} cannot load the engine here to refit it{why}")
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    _say("refitting")
    keep_alive = _give(parser, graph, Path(job.graph).name)
    if not parser.refit_model_proto():
        raise BuildError(f"{job.flavour} does not take the new weights: {_first_error(parser)}; build it anew")
    if missing := refitter.get_missing_weights():
        raise BuildError(f"{job.flavour} wants new weights for {missing[0]!r}, which the graph has not; build it anew")
    if not refitter.refit_cuda_engine():
        raise BuildError(f"{job.flavour} cannot refit the engine: {' '.join(log.errors[:1])[:300]}; build it anew")
    del keep_alive
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)  # or this was the last time
    Path(str(job.plan)).write_bytes(memoryview(engine.serialize_with_config(config)))
    return Built(trt.__version__, sm, time.monotonic() - began)


def _give(parser: Any, graph: EngineGraph, name: str) -> list[Any]:
    """Hand a parser or a refitter the model and each weight in memory; returns what must outlive their use."""
    arrays = []
    if not parser.load_model_proto(graph.model.SerializeToString()):
        raise BuildError(f"{name}: the parser refuses it: {_first_error(parser)}")
    for tensor in graph.model.graph.initializer:
        if tensor.name in graph.weights:
            array = graph.array(tensor)
            arrays.append(array)
            if not parser.load_initializer(tensor.name, array.ctypes.data, array.nbytes):
                raise BuildError(f"{name}: the parser does not take weight {tensor.name!r}; export the bundle anew")
    return arrays


def _parse(parser: Any, graph: EngineGraph, name: str) -> list[Any]:
    """Parse the graph; returns what must outlive the build."""
    arrays = _give(parser, graph, name)
    if not parser.parse_model_proto():
        at = "it"
        if parser.num_errors:
            error = parser.get_error(0)
            at = f"node {error.node_name()!r} ({error.node_operator()})"
        raise BuildError(f"{name}: the parser refuses {at}: {_first_error(parser)}")
    return arrays


def _first_error(parser: Any) -> str:
    return said(parser.get_error(0).desc()) if parser.num_errors else "it gives no reason"


def _require_attention(attention: str, nodes: int, layers: Mapping[str, int]) -> None:
    """Whether parsing kept every attention in one piece. A network is not an engine: the builder has the last word."""
    plugin = ("PLUGIN_V3", "PLUGIN")
    kinds = {"fused": ("ATTENTION_INPUT",), "plugin": plugin, "quick": plugin}.get(attention)
    if kinds and (found := sum(layers.get(kind, 0) for kind in kinds)) < nodes:
        raise BuildError(
            f"{nodes} attentions in the graph, {found} {kinds[0]} layers in the network: is the plugin registered?"
        )


def _look_into(trt: Any, log: Any, plan: Any, lowering: str) -> dict[str, Any]:
    """As `look_into`, of the finished engine; only where it can be loaded."""
    _say("looking into the engine")
    engine = runtime_for(trt, log, lowering).deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError("the engine that was just built cannot be loaded; is this the GPU it was built for?")
    return look_into(trt, engine)


def _require_plugins(layers: Sequence[Any], nodes: int) -> None:
    """The finished engine must name our plugin once per attention; a builder's log calls it a custom layer."""
    found = sum(any(word in json.dumps(layer) for word in _OURS) for layer in layers)
    if found < nodes:
        raise BuildError(f"{nodes} attentions in the graph, {found} of our plugins in the engine; report this")


_OURS: Final = ("TargetHistoryAttention", "custom_layer")


def _memory(graph: EngineGraph, job: Job, told: Mapping[str, Any] | None) -> dict[str, int]:
    """Bytes of the engine at its largest sizes: `scratch` is the library's own figure, the others are estimates."""
    from stca.export.engine_graph import estimate_memory

    return estimate_memory(graph, largest_sizes(job.profiles)) | ({"scratch": told["device_memory"]} if told else {})


def _config(trt: Any, builder: Any, graph: EngineGraph, job: Job, flavour: Flavour, sm: int) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # a float32 graph computes in float32
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the engine can be inspected
    if job.refit != "none":
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL if job.refit == "identical" else trt.BuilderFlag.REFIT)
    if flavour.ahead_of_time:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    if flavour.timing_cache and job.timing_cache:
        file = Path(job.timing_cache)
        kept = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
        if not config.set_timing_cache(kept, False):  # of another GPU with this SM
            config.set_timing_cache(config.create_timing_cache(b""), False)
    config.progress_monitor = _monitor(trt)
    for sizes in job.profiles:
        profile = builder.create_optimization_profile()
        for value in graph.model.graph.input:
            dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            if any(isinstance(d, str) for d in dims):
                shapes = [[sizes[d][k] if isinstance(d, str) else d for d in dims] for k in range(3)]
                profile.set_shape(value.name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"{job.flavour} refuses the profile {json.dumps(sizes)}")
    return config


def _target(trt: Any, flavour: Flavour, sm: int | None) -> int:
    """The SM to build for, checked against what the library or the machine can do."""
    if flavour.ahead_of_time:
        known = sorted(int(n[2:]) for n in trt.ComputeCapability.__members__ if n.startswith("SM"))
        if sm is None or sm not in known:
            said = "which SM to build for is not given" if sm is None else f"no SM {sm}"
            raise BuildError(
                f"{flavour.name} {trt.__version__}: {said}; use --sm with one of {', '.join(map(str, known))}"
            )
        return sm
    here = device_sm()
    if sm not in (None, here):
        raise BuildError(
            f"{flavour.name} builds for the GPU it runs on, which is SM {here}; build SM {sm} on such a machine"
        )
    return here


def _explain(job: Job, errors: Sequence[str]) -> str:
    name = Path(job.graph).name
    said = " ".join(errors[0].split()) if errors else "nothing"
    if "not supported by a dedicated kernel" in said:
        return (
            f"{name}: {job.flavour} has no fused attention for this head size in {job.precision}; take another "
            "precision, export with another --form, or ask for an unfused one with --lowering decomposed"
        )
    if "Cannot compile for target" in said or "Cannot compile operation" in said:
        return f"{name}: {job.flavour} has no {job.precision} kernels for SM {job.sm}; build for a newer GPU"
    if job.refit != "none" and "CUDA_SUCCESS" in said:
        return f"{name}: {job.flavour} builds engines that can be refitted only where there is a GPU; use --refit none"
    return f"{name}: {job.flavour} cannot build it: {said[:400]}"


_LAYER: Final = re.compile(r"^Name: (?P<Name>[^,]*), LayerType: (?P<LayerType>\w+)", re.MULTILINE)


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers: list[dict[str, str]] = []  # of the engine, as its builder tells them

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                self.layers += [found.groupdict() for found in _LAYER.finditer(message)]
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and "Int64 binding" not in message:
                _say(f"warning: {said(message)}")

    return Log()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Top-level phases and, every two seconds, how far the one that runs is."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.told = time.monotonic()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            if parent is None:
                _say(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            if time.monotonic() - self.told > 2:
                self.told = time.monotonic()
                _say(f"{phase}: {step + 1} of {self.steps.get(phase, 0)}")
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _save(file: Path, data: Any) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as work:
            part = Path(work, file.name)
            part.write_bytes(data)
            part.replace(file)
    except OSError as e:
        _say(f"warning: {file} is not written ({e.strerror}); the next build measures kernels again")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
