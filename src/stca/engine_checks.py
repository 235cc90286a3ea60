"""Checks of engines and of the graphs they are built from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from stca import probe
from stca.build import HALVES
from stca.bundle import Bundle
from stca.errors import BuildError
from stca.export.engine_graph import engine_graph
from stca.runtime import OnnxRuntimeEngine


def check_lowering(bundle: Bundle, form: Literal["fused", "decomposed"], folder: Path) -> None:
    """Run both lowered halves on ONNX Runtime in float32 against the bundle's own, request by request.

    The histories have 0, 1 and 9 tokens; an empty one is given as one token of zeros, as the runtime gives it.

    Raises:
        BuildError: when a score differs by more than float32 can explain.
    """
    manifest = bundle.manifest
    state = [s.name for s in manifest.state]
    specs = manifest.graphs["request"].inputs
    own = [OnnxRuntimeEngine(bundle.file(half), threads=1) for half in HALVES]
    lowered = []
    for half in HALVES:
        graph = engine_graph(bundle.file(half), state=state, attention=form)
        lowered.append(
            (
                OnnxRuntimeEngine(graph.save(folder / f"{half}.check.onnx"), threads=1),
                [i.name for i in graph.model.graph.input],
            )
        )
    for tokens in (0, 1, 9):
        feeds = probe.pack(specs, [probe.single(specs, tokens, 3, np.random.default_rng(tokens))])
        values = dict(feeds)
        for engine, half in zip(own, HALVES, strict=True):
            values |= engine.run({s.name: values[s.name] for s in manifest.graphs[half].inputs})
        if tokens == 0:
            per_token = {s.name for s in specs if s.shape[:1] == ("N_h",)}
            feeds = {n: np.zeros((1, *x.shape[1:]), x.dtype) if n in per_token else x for n, x in feeds.items()}
        given = dict(feeds)
        for engine, names in lowered:
            given |= engine.run({name: given[name] for name in names})
        for name in own[1].outputs:
            a, b = values[name].astype(np.float64), given[name].astype(np.float64)
            limit = 1e-4 * max(1.0, float(np.abs(a).max(initial=0.0)))
            if not np.allclose(a, b, rtol=0, atol=limit):
                raise BuildError(
                    f"with one request per run {name} differs by {np.abs(a - b).max():.3g} at {tokens} history tokens; "
                    "this model's engines need the plugin (--engine tensorrt) or ONNX Runtime"
                )
