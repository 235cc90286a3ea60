"""Checkpoints in and out: safetensors with the config in the metadata, or a torch state dict with a `.json` beside it.

Nothing in a checkpoint is executed: safetensors cannot hold code, and a torch file is read with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from stca.errors import CheckpointError
from stca.export.reference.config import StcaConfig
from stca.export.reference.module import AttentionForm, Stca
from stca.folders import umask

CONFIG_KEY = "stca.config"

# What converts to the model's float32 without more information; an 8-bit float would need its scale.
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Under which training loops save a state dict (Lightning, the first), and what wrappers put before its names.
_KEYS = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")
# As many layers or fields are compared by name with what a checkpoint has, however few it has.
_SOME = 256


@dataclass(frozen=True)
class Checkpoint:
    """A trained model's tensors, its config, and whatever else its metadata says (strings)."""

    config: StcaConfig
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def build(self, form: AttentionForm = "projected") -> Stca:
        """The reference module with these weights, in eval mode.

        Raises:
            CheckpointError: naming the first key or shape that does not fit the config, or tensor that is not finite.
        """
        _compare_sizes(self.config, self.tensors)
        model = Stca(self.config, form)
        load_strictly(model, self.tensors)
        return model.eval()


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into `model`, which must have exactly these names, shapes and floating dtypes."""
    wanted = model.state_dict()
    _compare_shapes(wanted, tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"checkpoint tensor {name!r} is {tensor.dtype}; save it as torch.float32")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"checkpoint tensor {name!r} is {tensor.layout} on {tensor.device}; save dense values on the CPU"
            )
        if not bool(torch.isfinite(tensor.to(wanted[name].dtype)).all()):
            raise CheckpointError(
                f"checkpoint tensor {name!r} has NaN or infinite values as {wanted[name].dtype}; export an earlier step"
            )
    model.load_state_dict(dict(tensors))


def _compare_sizes(config: StcaConfig, tensors: Mapping[str, Tensor]) -> None:
    """Hold the config against the tensors before a module of its sizes is made: a wrong one may ask for terabytes."""
    counts = {
        "layers": config.layers,
        "mixer_layers": config.mixer_layers,
        "the number of fields": len(config.fields()),
    }
    for name, count in counts.items():  # each has tensors of its own
        if count > max(_SOME, len(tensors)):
            raise CheckpointError(
                f"config: {name} is {count}, but the checkpoint has {len(tensors)} tensors in all; is this the config "
                "it was trained with?"
            )
    try:
        with torch.device("meta"):
            wanted = Stca(config).state_dict()
    except (RuntimeError, TypeError, OverflowError, ValueError) as e:  # a size beyond 64 bits
        raise CheckpointError("config: its sizes are beyond any memory; is this the config it was trained with?") from e
    _compare_shapes(wanted, tensors)


def _compare_shapes(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name in wanted:
        if name not in tensors:
            near = next((n for n in tensors if n.endswith(name) or name.endswith(n)), None)
            hint = f"; it has {near!r}: rename the key" if near else "; is this the config it was trained with?"
            raise CheckpointError(f"checkpoint has no tensor {name!r}{hint}")
    for name, tensor in tensors.items():
        if name not in wanted:
            raise CheckpointError(
                f"checkpoint has a tensor {name!r} the config has no place for; remove it or mend the config"
            )
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"checkpoint tensor {name!r} is {list(tensor.shape)}, the config needs {list(wanted[name].shape)}"
            )


def save_checkpoint(path: str | os.PathLike[str], model: Stca, metadata: Mapping[str, str] | None = None) -> None:
    """Write a model as safetensors with its config in the metadata; a reader never sees a half-written file.

    Args:
        path: of the file; one that is there is replaced.
        model: whose weights are written in the dtypes they have.
        metadata: more texts to keep in the file, by name.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    try:
        safetensors.torch.save_file(tensors, temporary, {**(metadata or {}), CONFIG_KEY: model.config.to_json()})
        temporary.chmod(0o666 & ~umask())  # safetensors writes files that only their owner may read
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint.

    The config comes from the safetensors metadata (`stca.config`), or from a `.json` of the same name beside the file.

    Raises:
        CheckpointError: when the file is missing, is no checkpoint, would need unpickling, or has no config.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such checkpoint file")
    tensors, metadata = read_tensors(file)
    beside = file.with_suffix(".json")
    if CONFIG_KEY in metadata:
        config_text = metadata[CONFIG_KEY]
    elif beside.is_file():
        try:
            config_text = beside.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise CheckpointError(f"{beside}: cannot be read as text ({e}); write it with StcaConfig.to_json()") from e
    else:
        raise CheckpointError(
            f"{file}: no config in its metadata; put it beside the file as {beside.name}, or, for a model of your own, "
            "load the file in a function and name that: stca export --model MODULE:CALLABLE"
        )
    return Checkpoint(StcaConfig.from_json(config_text), tensors, metadata)


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and string metadata of a safetensors file, or of a torch state dict (no metadata)."""
    with file.open("rb") as f:
        head = f.read(9)
    return _read_safetensors(file) if head[8:9] == b"{" else (_read_state_dict(file), {})


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(file, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError, OSError) as e:
        raise CheckpointError(f"{file}: damaged safetensors file ({e}); copy it again") from e


def _read_state_dict(file: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises half a dozen types here, each meaning the same to the user
        raise CheckpointError(
            f"{file}: not safetensors, and torch refuses it as plain weights; save it with safetensors, "
            "or torch.save(model.state_dict())"
        ) from e
    loaded = _state_dict_in(loaded)
    if not isinstance(loaded, Mapping) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{file}: holds {type(loaded).__name__}, not a state dict; save model.state_dict() alone")
    if odd := next((n for n in loaded if not isinstance(n, str)), None):
        raise CheckpointError(
            f"{file}: has a key {odd!r} that is no string, so it is no state dict; save model.state_dict()"
        )
    return _unwrapped(loaded)


def _state_dict_in(loaded: object) -> object:
    """What a training loop saves beside its epoch and its optimizer."""
    inner = [loaded[n] for n in _KEYS if isinstance(loaded.get(n), Mapping)] if isinstance(loaded, Mapping) else []
    return inner[0] if inner else loaded


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the name that `torch.compile` or data parallelism puts before every other."""
    while tensors and (prefix := next((p for p in _WRAPPERS if all(n.startswith(p) for n in tensors)), None)):
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items()}
    return dict(tensors)
