"""New weights into a bundle whose graphs stay: a new weights file, and parity with the new checkpoint.

It works because a graph's initializers are the checkpoint's tensors, by name, shape and place in the weights file. The
graphs are shared with the old bundle as files. Engines hold weights: those built for it (`--refit weights`) get the new
ones, and are checked, where their library and a GPU are at hand; every other one is left out of the new bundle, and the
result says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from stca import folders
from stca.arrays import Array, Progress
from stca.bundle import Bundle, seal, sha256_of, writing
from stca.checks.engines import verify_engine
from stca.checks.verify import verify
from stca.engines.builder import builder_of
from stca.engines.cache import EngineCache, key_of, trusted
from stca.engines.files import keep, place_of, with_weights
from stca.errors import BuildError, BundleError, CheckpointError, StcaError
from stca.export.reference.checkpoint import load_checkpoint, read_tensors
from stca.export.reference.config import StcaConfig
from stca.export.weights import offsets
from stca.manifest import WEIGHTS, EngineEntry, Manifest
from stca.runtime.engine_choice import Choice
from stca.specs import TableSpec
from stca.tables import write_table

# The export proved these graphs at every size; what is new is the weights, and one wrong tensor shows in any request.
REFIT_PROBES = (((40, 16),), ((5, 3), (0, 2), (40, 4)))

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
        prove: runs on the finished bundle before it gets its name; None asks `stca.checks.verify` the requests of
            `REFIT_PROBES`.
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
    _require_own_weights(old)
    cache = trusted(cache, progress)
    progress("reading the checkpoint")
    given, module = _read(old, Path(checkpoint))
    tensors = _weights(old, given, Path(checkpoint), module)
    with writing(target, replaces=None if out is not None else old.manifest) as (work, commit):
        progress("writing the weights")
        safetensors.torch.save_file(tensors, work / WEIGHTS)
        del tensors
        if offsets(work / WEIGHTS) != offsets(old.path / WEIGHTS):
            raise BundleError(f"{old.path}: its weights lie elsewhere than a fresh export puts them; export it anew")
        for graph in old.manifest.graphs.values():
            for file in (graph.file, *([graph.ids] if graph.ids else [])):
                folders.share(old.path / file, work / file)
        tables = tuple(_table(t, given, Path(checkpoint), work) for t in old.manifest.tables or ()) or None
        weights = sha256_of(work / WEIGHTS)
        manifest = dataclasses.replace(
            old.manifest, weights=weights, tables=tables, quantization=_format_of(old.manifest, progress), engines=(),
            parity={},
        )  # fmt: skip
        progress("proving parity with the new checkpoint")
        fresh = seal(work, manifest)
        if prove is None:
            parity: Mapping[str, Any] = (
                verify(fresh, module=module, probes=REFIT_PROBES, progress=progress).require().as_dict()
            )
        else:
            parity = prove(fresh, module)
        told: list[dict[str, Any]] = []
        engines: list[EngineEntry] = []
        for pair in _pairs(old.manifest.engines):
            said: dict[str, Any] = {"kept": True}
            try:
                engines += _renew(old, fresh, pair, module, cache, progress)
            except StcaError as e:
                said = {"kept": False, "why": str(e)}
                for entry in pair:  # a plan that was made and is not right must not be in the bundle
                    if entry.file not in {g.file for g in old.manifest.graphs.values()}:
                        (work / entry.file).unlink(missing_ok=True)
                progress(f"{', '.join(e.file for e in pair)} left out: {said['why']}")
            told += [{"file": entry.file, **said} for entry in pair]
        done = commit(dataclasses.replace(manifest, parity=parity, engines=tuple(engines)))
    return {"weights": done.manifest.weights, "parity": dict(parity), "bundle": str(done.path), "engines": told}


def _format_of(manifest: Manifest, progress: Progress) -> Mapping[str, Any] | None:
    """What stays true of a quantized state under other weights: its format, not what was measured on a trace."""
    if manifest.quantization is None:
        return None
    progress("the state stays in 8 bits; `stca calibrate` of a float32 bundle measures its budget for these weights")
    return {"state": manifest.quantization["state"]}


def _require_own_weights(old: Bundle) -> None:
    """Raise BundleError where new weights would first have to be held to a budget."""
    if kinds := [part for part in old.manifest.quantization or {} if part in ("tables", "weights")]:
        raise BundleError(
            f"{old.path}: its {kinds[0]} are in 8 bits, and what that costs with other weights is not known; refit the "
            "bundle that it was calibrated from, and calibrate the new one"
        )


def _read(old: Bundle, file: Path) -> tuple[Mapping[str, Tensor], nn.Module | None]:
    """The checkpoint's tensors, and its own module."""
    if old.manifest.model["kind"] == "stca":
        checkpoint = load_checkpoint(file)
        _same_config(old.manifest, checkpoint.config)
        module = checkpoint.build("projected")  # the paper's own form; the weights are the same in each
        return module.state_dict(), module
    if not file.is_file():
        raise CheckpointError(f"{file}: no such checkpoint file")
    return read_tensors(file)[0], None


def _weights(old: Bundle, given: Mapping[str, Tensor], file: Path, module: nn.Module | None) -> dict[str, Tensor]:
    """What the new weights file holds, in the old one's names, dtypes and shapes."""
    tensors: dict[str, Tensor] = {}
    with safetensors.safe_open(old.path / WEIGHTS, framework="pt") as held:
        for name in held.keys():  # noqa: SIM118  this is no dict
            shape, dtype = held.get_slice(name).get_shape(), held.get_slice(name).get_dtype()
            if name not in given and (module is not None or dtype.startswith(("I", "U"))):
                tensors[name] = held.get_tensor(name)  # no parameter but a constant of the graph, as sizes are
                continue
            tensors[name] = _of_shape(given, name, shape, file).to(_DTYPES[dtype]).contiguous()
            if module is None:
                _check_finite(tensors[name], name, file)
    return tensors


def _of_shape(given: Mapping[str, Tensor], name: str, shape: Sequence[int], file: Path) -> Tensor:
    if name not in given:
        raise CheckpointError(f"{file}: has no tensor {name!r}, which the bundle's graphs use")
    if list(given[name].shape) != list(shape):
        raise CheckpointError(f"{file}: tensor {name!r} is {list(given[name].shape)}, the bundle has {list(shape)}")
    return given[name]


def _check_finite(values: Tensor, name: str, file: Path) -> None:
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{file}: tensor {name!r} has NaN or infinite values; take an earlier step")


def _table(table: TableSpec, given: Mapping[str, Tensor], file: Path, work: Path) -> TableSpec:
    """A table with the checkpoint's rows, a block in memory at a time."""
    tensor = _of_shape(given, table.name, (table.rows, table.width), file)

    def read(begin: int, end: int) -> Array:
        rows = tensor[begin:end].to(getattr(torch, table.dtype)).contiguous()
        _check_finite(rows, table.name, file)
        block: Array = rows.view(torch.uint8).numpy()
        return block

    return write_table(work, Path(table.file).stem, table.name, table.rows, table.width, table.dtype, read)


def _same_config(manifest: Manifest, config: StcaConfig) -> None:
    given, bundled = json.loads(config.to_json()), manifest.model["config"]
    for name in {**bundled, **given}:
        if given.get(name) != bundled.get(name):
            here, there = given.get(name), bundled.get(name)
            raise CheckpointError(f"config: {name} is {here!r}, in the bundle it is {there!r}; export the checkpoint")


def _pairs(engines: Sequence[EngineEntry]) -> list[list[EngineEntry]]:
    """Engines that serve together: one flavour, provider, precision and SM."""
    pairs: dict[tuple[Any, ...], list[EngineEntry]] = {}
    for e in engines:
        _, *shared = place_of(e)
        pairs.setdefault(tuple(shared), []).append(e)
    return list(pairs.values())


def _command(entry: EngineEntry) -> str:
    """How such an engine is built."""
    told = {"engine": "flavour", "sm": "sm", "precision": "precision", "provider": "provider"}
    options = [f"--{option} {value}" for option, name in told.items() if (value := getattr(entry, name))]
    return " ".join(["stca build BUNDLE", *options])


def _renew(
    old: Bundle,
    fresh: Bundle,
    pair: Sequence[EngineEntry],
    module: nn.Module | None,
    cache: EngineCache | None,
    progress: Progress,
) -> list[EngineEntry]:
    """The manifest entries of a pair with the new weights, its files in the new bundle.

    Raises:
        BuildError: why it cannot have them.
        ParityError: when it has them and scores differently.
        EngineError: when it has them and does not run.
    """
    weights = fresh.manifest.weights
    renewed = [dataclasses.replace(e, key={**e.key, "weights": weights}) for e in pair]
    own = {g.file for g in old.manifest.graphs.values()}
    if fresh.manifest.weights == old.manifest.weights:
        for file in (file for e in pair if e.file not in own for file in with_weights(old.path / e.file)):
            folders.share(file, fresh.path / file.name)
        return renewed
    if all(e.file in own for e in pair):
        return renewed  # ONNX Runtime on the bundle's own graphs
    if any(e.refit == "none" for e in pair):
        raise BuildError(f"it has the old weights and was not built to be refitted; run `{_command(pair[0])}`")
    if any(e.refit == "identical" for e in pair):
        raise BuildError(
            "it was built to be refitted with identical weights alone, and TensorRT promises nothing for others; run "
            f"`{_command(pair[0])}`, with --refit weights if it is to be refitted later"
        )
    for i, entry in enumerate(renewed):
        progress(f"refitting {entry.file}")
        builder_of(entry.flavour).refit(fresh, entry, old.path / entry.file, progress)
        plan = fresh.path / entry.file
        renewed[i] = dataclasses.replace(entry, bytes=plan.stat().st_size)
    progress("proving parity of the refitted engines")
    flavour, precision = pair[0].flavour, pair[0].precision
    choice = Choice(flavour, precision, {e.graph: e for e in renewed}, "it was refitted")
    verify_engine(fresh, choice, module=module, progress=progress)
    for entry in renewed:
        keep(cache, key_of(entry.key), entry, fresh.path / entry.file, progress)
    return renewed
