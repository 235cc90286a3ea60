"""New weights into a bundle whose graphs stay: a new weights file, and parity with the new checkpoint.

It works because a graph's initializers are the checkpoint's tensors, by name, shape and place in the weights file. The
graphs are shared with the old bundle as files. Engines hold weights: one built for it (`--refit weights`) gets the new
ones where its library and a GPU are at hand, every other one is left out of the new bundle, and the result says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from stca.build import HALVES, share
from stca.bundle import WEIGHTS, Bundle, Manifest, seal, sha256_of, writing
from stca.engine_cache import EngineCache, key_of
from stca.errors import BuildError, BundleError, CheckpointError
from stca.export.checkpoint import load_checkpoint, read_tensors
from stca.export.config import StcaConfig
from stca.export.weights import offsets
from stca.tensorrt_flavours import FLAVOURS, Job, build_plan
from stca.verify import verify

Progress = Callable[[str], None]
# The export proved these graphs at every size; what is new is the weights, and one wrong tensor shows in any request.
PROBES = (((40, 16),), ((5, 3), (0, 2), (40, 4)))

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# As for an export: gets the bundle and the checkpoint's own module, None where the bundle was not made from one.
Prover = Callable[[Bundle, nn.Module | None], Mapping[str, Any]]


def refit(
    bundle: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    prove: Prover | None = None,
    cache: EngineCache | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Put a checkpoint's weights into a bundle.

    Args:
        bundle: directory of the bundle the graphs are taken from.
        checkpoint: as for an export, of the same config; for a bundle that was not made from a checkpoint, safetensors
            or a state dict with the names of its weights.
        out: directory of the new bundle; None replaces the old one, in one step at the end.
        prove: runs on the finished bundle before it gets its name; None asks `stca.verify` the requests of `PROBES`.
        cache: where refitted engines are kept besides.
        progress: told each step as it starts.

    Returns:
        `weights`, the digest that a fresh export of the checkpoint has; `parity`; `bundle`; and `engines`: for each
        engine of the old bundle `file`, `kept` and, if it was not, `why`.

    Raises:
        CheckpointError: when the checkpoint does not fit the bundle.
        BundleError, ParityError: one line; both bundles are as they were.
    """
    old = Bundle.load(bundle)
    target = Path(out) if out is not None else old.path
    progress("reading the checkpoint")
    tensors, module = _read(old, Path(checkpoint))
    with writing(target) as (work, commit):
        progress("writing the weights")
        safetensors.torch.save_file(tensors, work / WEIGHTS)
        del tensors
        if offsets(work / WEIGHTS) != offsets(old.path / WEIGHTS):
            raise BundleError(f"{old.path}: its weights lie elsewhere than a fresh export puts them; export it anew")
        for graph in old.manifest.graphs.values():
            share(old.path / graph.file, work / graph.file)
        manifest = dataclasses.replace(old.manifest, weights=sha256_of(work / WEIGHTS), engines=(), parity={})
        progress("proving parity with the new checkpoint")
        fresh = seal(work, manifest)
        if prove is None:
            parity: Mapping[str, Any] = (
                verify(fresh, module=module, probes=PROBES, progress=progress).require().as_dict()
            )
        else:
            parity = prove(fresh, module)
        told: list[dict[str, Any]] = []
        engines: list[Mapping[str, Any]] = []
        for entry in old.manifest.engines:
            said: dict[str, Any] = {"file": entry["file"], "kept": True}
            try:
                engines.append(_refit_engine(old, fresh, entry, cache, progress))
            except BuildError as e:
                said |= {"kept": False, "why": str(e)}
                progress(f"{entry['file']} is left out: {e}")
            told.append(said)
        done = commit(dataclasses.replace(manifest, parity=parity, engines=tuple(engines)))
    return {"weights": done.manifest.weights, "parity": dict(parity), "bundle": str(done.path), "engines": told}


def _read(old: Bundle, file: Path) -> tuple[dict[str, Tensor], nn.Module | None]:
    """What the new weights file holds, in the old one's names, dtypes and shapes; and the checkpoint's own module."""
    module: nn.Module | None = None
    if old.manifest.model["kind"] == "stca":
        checkpoint = load_checkpoint(file)
        _same_config(old.manifest, checkpoint.config)
        module = checkpoint.build("projected")  # the paper's own form; the weights are the same in each
        given = module.state_dict()
    elif file.is_file():
        given, _ = read_tensors(file)
    else:
        raise CheckpointError(f"{file}: no such checkpoint file")
    tensors: dict[str, Tensor] = {}
    with safetensors.safe_open(old.path / WEIGHTS, framework="pt") as held:
        for name in held.keys():  # noqa: SIM118  this is no dict
            if module is not None and name not in given:
                tensors[name] = held.get_tensor(name)  # a constant of the graph that is no parameter
                continue
            shape, dtype = held.get_slice(name).get_shape(), held.get_slice(name).get_dtype()
            if name not in given:
                raise CheckpointError(f"{file}: has no tensor {name!r}, which the bundle's graphs use")
            if list(given[name].shape) != shape:
                raise CheckpointError(f"{file}: tensor {name!r} is {list(given[name].shape)}, the bundle has {shape}")
            tensors[name] = given[name].to(_DTYPES[dtype]).contiguous()
            if module is None and not bool(torch.isfinite(tensors[name]).all()):
                raise CheckpointError(f"{file}: tensor {name!r} has NaN or infinite values; take an earlier step")
    return tensors, module


def _same_config(manifest: Manifest, config: StcaConfig) -> None:
    given, bundled = json.loads(config.to_json()), manifest.model["config"]
    for name in {**bundled, **given}:
        if given.get(name) != bundled.get(name):
            here, there = given.get(name), bundled.get(name)
            raise CheckpointError(f"config: {name} is {here!r}, in the bundle it is {there!r}; export the checkpoint")


def _refit_engine(
    old: Bundle,
    fresh: Bundle,
    entry: Mapping[str, Any],
    cache: EngineCache | None,
    progress: Progress,
) -> Mapping[str, Any]:
    """The manifest entry of an engine with the new weights, its file in the new bundle.

    Raises:
        BuildError: why it cannot have them.
    """
    parts = {**entry["key"], "weights": fresh.manifest.weights}
    if entry["file"] in {g.file for g in old.manifest.graphs.values()}:
        return {**entry, "key": parts}  # ONNX Runtime on the bundle's own graph
    if entry["flavour"] not in FLAVOURS or entry.get("refit") == "none":
        raise BuildError("it has the old weights and was not built to be refitted; run `stca build` again")
    if entry["refit"] == "identical":
        raise BuildError(
            "it was built to be refitted with identical weights alone, and TensorRT promises nothing for others; run "
            "`stca build` again, with --refit weights if it is to be refitted later"
        )
    plan = fresh.path / entry["file"]
    half = next(h for h in HALVES if h == entry["graph"])
    progress(f"refitting {entry['file']}")
    build_plan(
        Job(
            flavour=entry["flavour"],
            graph=str(fresh.file(half).absolute()),
            state=[s.name for s in fresh.manifest.state],
            precision=entry["precision"],
            attention=parts["attention"],
            profiles=entry["profiles"],
            sm=entry["sm"],
            refit=entry["refit"],
            plan=str(plan),
            refit_from=str((old.path / entry["file"]).absolute()),
        ),
        progress,
    )
    made = {**entry, "key": parts, "bytes": plan.stat().st_size}
    if cache:
        cache.put(key_of(parts), made, plan)
    return made
