"""The reference model with random weights, in the size that a benchmark's options say."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from stca.bundle import Bundle
from stca.checks.verify import prove
from stca.export.pipeline import CutOptions, export_checkpoint
from stca.export.reference.checkpoint import Checkpoint
from stca.export.reference.config import Field, StcaConfig
from stca.export.reference.module import Stca


def add_size(p: argparse.ArgumentParser) -> None:
    """The options that `config_of` and `random_bundle` read."""
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--ffn-expansion", type=int, default=4)
    p.add_argument("--form", choices=("projected", "absorbed"), default="projected")


def config_of(args: argparse.Namespace, max_history: int, **more: Any) -> StcaConfig:
    """A model of this size; `more` are other fields of its config."""
    category = Field("category", 100)
    return StcaConfig(
        items=10_000,
        tasks=("finish", "like"),
        history_fields=(Field("action", 4), category),
        user_fields=(Field("segment", 8),),
        target_fields=(category,),
        width=args.width,
        heads=args.heads,
        layers=args.layers,
        ffn_expansion=args.ffn_expansion,
        max_history=max_history,
        **more,
    )


def random_bundle(args: argparse.Namespace, folder: Path, max_history: int, pieces: int = 1) -> Bundle:
    """Exported, in the form that `args` say, the same weights each time; `pieces` of a history are read in place."""
    torch.manual_seed(0)
    config = config_of(args, max_history)
    checkpoint = Checkpoint(config, Stca(config).state_dict())
    return export_checkpoint(
        checkpoint, folder / f"bundle-{pieces}", form=args.form, prove=prove, cut=CutOptions(pieces=pieces)
    )
