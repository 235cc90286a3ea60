"""Two steps of `gpu_session.py`: a request's latency with torch, and TensorRT-RTX from checkpoint to proven engine.

    python benchmarks/gpu_steps.py request|tensorrt-rtx --out FILE

The JSON is written again after each figure. Without a GPU both run small; then only that they run means anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stca import probe
from stca.checks.timing import measure
from stca.export.reference.config import StcaConfig
from stca.export.reference.module import Stca, request_inputs

GPU = torch.cuda.is_available()
FORMS: tuple[Literal["projected", "absorbed"], ...] = ("projected", "absorbed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("request", "tensorrt-rtx"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for result in request() if args.step == "request" else tensorrt_rtx():
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def request() -> Iterator[dict[str, Any]]:
    """Milliseconds from a request's arrays on the host to its scores on the host, with and without the user's state."""
    history, targets, width, heads = (10_000, 300, 256, 8) if GPU else (500, 10, 32, 2)
    config = StcaConfig(items=10_000, tasks=("finish",), width=width, heads=heads, layers=4, max_history=history)
    specs = request_inputs(config)
    arrays = probe.pack(specs, [probe.single(specs, history, targets, np.random.default_rng(0))])
    rows: list[dict[str, Any]] = []
    for precision in (torch.bfloat16, torch.float32) if GPU else (torch.float32,):
        for form in FORMS:
            torch.manual_seed(0)
            model = Stca(config, form).eval().to("cuda" if GPU else "cpu", precision)
            for stage, call in _stages(model, arrays).items():
                ms = 1e3 * measure(call, 1.0, most=1000)
                row: dict[str, Any] = {"stage": stage, "form": form, "precision": str(precision).removeprefix("torch.")}
                row |= {f"p{p}_ms": round(float(np.percentile(ms, p)), 4) for p in (50, 95, 99)}
                rows.append({**row, "runs": len(ms)})
                yield {"history": history, "targets": targets, "config": json.loads(config.to_json()), "rows": rows}


def _stages(model: Stca, arrays: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    device = next(model.parameters()).device

    def upload() -> dict[str, Tensor]:
        return {name: torch.from_numpy(x).to(device) for name, x in arrays.items()}

    @torch.inference_mode()
    def hit(score: Callable[..., Tensor]) -> Tensor:
        return score(upload(), state).float().cpu()

    @torch.inference_mode()
    def miss() -> Tensor:
        return model.logits(upload()).float().cpu()

    with torch.inference_mode():
        state = model.encode(upload())
    compiled = torch.compile(model.score_logits, dynamic=True)
    return {"miss": miss, "hit": lambda: hit(model.score_logits), "hit, torch.compile": lambda: hit(compiled)}


def tensorrt_rtx() -> Iterator[dict[str, Any]]:
    """The shipped checkpoint exported, built for this GPU and held against the reference: what each command said."""
    said: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = str(files("stca.examples") / "checkpoints/stca_demo.safetensors"), f"{folder}/bundle"
        engine = ["--engine", "tensorrt-rtx"]
        sm = [] if GPU else ["--sm", "89"]
        for name, words in {
            "export": [checkpoint, "--out", bundle],
            "build": [bundle, *engine, *sm, "--precision", "bf16", "--no-cache"],
            "verify": [bundle, *engine],
        }.items():
            line = [sys.executable, "-m", "stca", name, *words, "--json"]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            answer = json.loads(done.stdout) if done.stdout.strip() else done.stderr.strip()[-500:]
            said[name] = {"exit": done.returncode, "said": answer}
            yield said
    if any(step["exit"] for step in said.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
