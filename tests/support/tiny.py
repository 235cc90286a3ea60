"""A reference model small enough to export in seconds, and requests for it. Every part of the model is in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stca.specs import TensorSpec

if TYPE_CHECKING:
    from stca.export.reference.config import StcaConfig
    from stca.export.reference.module import Stca

Array = NDArray[Any]

# Wide enough that the cut caches keys and values (a projection is worth its bytes from about the price's width on).
# A short window, so that tests can fill it.
MAX_HISTORY = 32


def config(**changes: Any) -> StcaConfig:
    """The tiny config, with some of its values changed."""
    from stca.export.reference.config import StcaConfig

    values: dict[str, Any] = {
        "items": 97,
        "tasks": ("finish", "like"),
        "item_width": 6,
        "field_width": 5,
        "history_fields": (("action", 4), ("category", 7)),
        "user_fields": (("segment", 5),),
        "request_fields": (("device", 3),),
        "target_fields": (("category", 7),),
        "width": 24,
        "heads": 3,
        "layers": 2,
        "ffn_expansion": 2,
        "mixer_layers": 2,
        "mixer_head_width": 4,
        "max_history": MAX_HISTORY,
    }
    return StcaConfig(**{**values, **changes})


def module(of: StcaConfig, seed: int = 0) -> Stca:
    """A model none of whose parameters is at a neutral value: no bias is 0, no norm's weight 1."""
    import torch

    from stca.export.reference.module import Stca

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made = Stca(of).eval()
        for name, p in made.named_parameters():
            p.add_(torch.randn(p.shape) * (1.0 if "table" in name else 0.3 if p.dim() == 1 else 0.05))
    return made


def split_batch(specs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> list[dict[str, Array]]:
    """The requests of a packed batch one by one, each as a batch of one, offsets included."""
    tokens, targets = feeds["history_offsets"], feeds["target_offsets"]
    requests = []
    for b in range(len(tokens) - 1):
        rows = {"N_h": slice(tokens[b], tokens[b + 1]), "N_t": slice(targets[b], targets[b + 1]), "B": slice(b, b + 1)}
        one = {s.name: feeds[s.name][rows[str(s.shape[0])]] for s in specs if s.shape != ("B_plus_1",)}
        one["history_offsets"] = np.array([0, tokens[b + 1] - tokens[b]], np.int32)
        one["target_offsets"] = np.array([0, targets[b + 1] - targets[b]], np.int32)
        requests.append(one)
    return requests


def no_proof(*_: object) -> dict[str, Any]:
    """For `prove=`: bundles that a test checks by itself."""
    return {}


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, by relative name."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
