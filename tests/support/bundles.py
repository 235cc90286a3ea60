"""A small bundle of made-up files, and changes to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stca.bundle import Bundle, sha256_of, writing
from stca.manifest import MANIFEST, WEIGHTS, Manifest
from stca.specs import GraphSpec, StateSpec, TensorSpec

FILES = {"request.onnx": b"whole", "user_encoder.onnx": b"first half", "target_scorer.onnx": b"", WEIGHTS: b"\0\1\2\3"}
HISTORY = TensorSpec("history_item", "int64", ("N_h",), "user", 9)
TARGET = TensorSpec("target_item", "int64", ("N_t",), "target", 9)
STATE = StateSpec("state", "float32", ("N_h", 4), 16)
SCORES = TensorSpec("scores", "float32", ("N_t", 2))


def manifest(weights: str) -> Manifest:
    """Of these files, with weights of this digest."""
    state = TensorSpec("state", "float32", ("N_h", 4))
    return Manifest(
        model={"kind": "onnx"},
        weights=weights,
        precision="float32",
        attention=None,
        graphs={
            "request": GraphSpec("request.onnx", (HISTORY, TARGET), (SCORES,)),
            "user_encoder": GraphSpec("user_encoder.onnx", (HISTORY,), (state,)),
            "target_scorer": GraphSpec("target_scorer.onnx", (state, TARGET), (SCORES,)),
        },
        state=(STATE,),
        appendable=True,
        max_history=100,
        split={"bytes_per_token": 16},
        parity={"passed": True},
        producer={"stca": "0"},
    )


def write(path: Path, files: dict[str, bytes] = FILES) -> Bundle:
    """The bundle, made at `path`."""
    with writing(path) as (work, commit):
        for name, data in files.items():
            (work / name).write_bytes(data)
        return commit(manifest(sha256_of(work / WEIGHTS)))


def edit(root: Path, change: Callable[[Any], object]) -> None:
    """Change its manifest's JSON, and no digest."""
    raw = json.loads((root / MANIFEST).read_text())
    change(raw)
    (root / MANIFEST).write_text(json.dumps(raw))
