"""Writes `bundle-v1`, a bundle of format version 1, and `bundle-v1.json`, what it answers: run it from the repository.

Once a version is released its golden files stay as they are: they stand for the bundles people have, which every later
version must load and serve with the same scores. A new format version gets files of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from stca import probe
from stca.checks.verify import prove
from stca.export.pipeline import export_checkpoint
from stca.export.reference.checkpoint import Checkpoint
from stca.export.reference.config import StcaConfig
from stca.export.reference.module import Stca
from stca.runtime import Request, Session

HERE = Path(__file__).parent
CONFIG = StcaConfig(
    items=11,
    item_width=3,
    field_width=2,
    history_fields=(("action", 3),),
    width=4,
    heads=2,
    layers=1,
    ffn_expansion=1,
    mixer_layers=1,
    mixer_head_width=2,
    mixer_expansion=1,
    max_history=16,
)


def main() -> None:
    """Write both files next to this one."""
    torch.manual_seed(0)
    checkpoint = Checkpoint(CONFIG, Stca(CONFIG).state_dict())
    bundle = export_checkpoint(checkpoint, HERE / "bundle-v1", prove=prove, form="absorbed")
    specs = bundle.manifest.graphs["request"].inputs
    inputs = probe.single(specs, 5, 4, np.random.default_rng(0))
    scores = Session.load(bundle.path).score(Request(inputs))
    asked = {"inputs": {n: x.tolist() for n, x in inputs.items()}, "scores": scores.tolist()}
    (HERE / "bundle-v1.json").write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
