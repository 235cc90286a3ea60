"""Everything that only a GPU can tell, in one command; each step's result is on disk before the next one starts.

    python benchmarks/gpu_session.py --out session.json [--limit 570] [--steps tests,parity] [--seconds tests=300]

Steps, in this order: `smoke`, a few cases of the kernels against float64; `headline`, the figures that people ask for,
8 and 300 targets over 10,000 tokens, with ceilings and peers; `ptx`, the kernels an engine embeds, launched as TensorRT
would; `parity`; `tune`, the headline's tiles; `tests`, the suite's GPU tests. Their limits together are one call's.
Then, for more calls: `speed`, all sizes; `request`, the reference model's latency with torch, hit and miss; and
`tensorrt-rtx`, if its wheels are there. Each is a process of its own with a time limit, so a crash or a hang costs that
step alone, and what it had found until then is kept. Tuned plans go to `tiles.json` beside the JSON; where a call's
files start afresh, bring both in again.

The same command goes on where it ended: a step that the file has as done is not repeated unless --steps names it, and
one that ran out of time goes on with the rows it left out. It needs no network. `stca` may be a wheel on PYTHONPATH;
Python wants torch, triton, cuda-bindings, onnx, onnxruntime, safetensors, ml_dtypes, networkx, pytest, pytest-timeout
and hypothesis. Without a GPU the steps that need one say so, and the others run small, which proves that they start.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.cuda.is_available()
# Most seconds of each step: the first six fit one short loan of a GPU, the others are for those that follow.
SECONDS = {
    "smoke": 60,
    "headline": 140,
    "ptx": 70,
    "parity": 100,
    "tune": 100,
    "tests": 100,
    "speed": 540,
    "request": 240,
    "tensorrt-rtx": 300,
}
NEEDS_GPU = ("smoke", "headline", "speed", "tune", "ptx")
HEADLINE = ["--history", "10000", "--targets", "8,300"]
LEAST_SECONDS = 45  # less is not worth a start


def main() -> None:
    args = _arguments()
    end = time.monotonic() + args.limit
    session = json.loads(args.out.read_text()) if args.out.exists() else {"steps": {}}
    session["machine"] = {"gpu": torch.cuda.get_device_name() if GPU else None, "torch": torch.__version__}
    steps = session["steps"]
    for name in args.steps or [name for name in SECONDS if steps.get(name, {}).get("status") != "done"]:
        seconds = min(args.seconds[name], end - time.monotonic())
        print(f"{name}: at most {max(seconds, 0):.0f} s", file=sys.stderr, flush=True)
        before = steps.get(name, {})
        earlier = [] if before.get("status") == "done" else before.get("results", [])
        steps[name] = run(name, seconds, args.out.resolve(), sum(map(rows_of, earlier)))
        steps[name]["results"] = earlier + steps[name].get("results", [])  # of each call, with its own ceilings
        print(f"{name}: {steps[name]['status']}", file=sys.stderr, flush=True)
        written = args.out.with_name(f".{args.out.name}.new")
        written.write_text(json.dumps(session, indent=1) + "\n")
        written.replace(args.out)
    print(json.dumps({name: step["status"] for name, step in steps.items()}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON, continued if it is there")
    parser.add_argument("--limit", type=float, default=570, help="seconds for all steps of this call")
    parser.add_argument("--steps", type=lambda s: s.split(","), help=f"only these of {','.join(SECONDS)}, done or not")
    parser.add_argument("--seconds", action="append", default=[], metavar="STEP=N", help="another limit for a step")
    args = parser.parse_args()
    args.seconds = {**SECONDS, **{name: int(n) for name, n in (text.split("=") for text in args.seconds)}}
    if unknown := {*args.seconds, *(args.steps or ())} - {*SECONDS}:
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(SECONDS)}")
    return args


def run(name: str, seconds: float, out: Path, skip: int) -> dict[str, Any]:
    """One step: `status`, in `results` its own JSON as far as it came, and the end of what it said."""
    if name in NEEDS_GPU and not GPU:
        return {"status": "not done: torch sees no NVIDIA GPU"}
    if name == "tensorrt-rtx" and not (find_spec("tensorrt_rtx_bindings") or find_spec("tensorrt_rtx")):
        return {"status": "not done: no tensorrt-rtx wheels"}
    if seconds < LEAST_SECONDS:
        return {"status": "not done: the call's time is up"}
    with tempfile.TemporaryDirectory() as folder:
        result, said, start = Path(folder, "result.json"), Path(folder, "said"), time.monotonic()
        with said.open("w") as output:
            pipes: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT}
            step = subprocess.Popen(
                command(name, seconds, result, out, skip), cwd=ROOT, start_new_session=True, **pipes
            )
            try:
                status = "done" if step.wait(seconds) == 0 else f"failed with exit status {step.returncode}"
            except subprocess.TimeoutExpired:
                os.killpg(step.pid, signal.SIGKILL)  # the step's own process group: its workers too
                step.wait()
                status = f"stopped after {seconds:.0f} s"
        text = said.read_text(errors="replace")
        found: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1), "said": text[-3000:]}
        if name == "tests":
            found["results"] = [outcomes(text)]
            if status == "done" and not found["results"][0].get("PASSED"):
                found["status"] = "not done: every test was skipped"
        elif result.exists():
            body = json.loads(result.read_text())
            found["results"] = [body]
            left = body.get("skipped_for_time", body.get("parity", {}).get("skipped_for_time"))
            if status == "done" and left:
                found["status"] = f"not done: {left} rows left"
        return found


def rows_of(result: dict[str, Any]) -> int:
    """How many rows of attention.py a result has."""
    return len(result.get("rows", result.get("parity", {}).get("checks", [])))


def command(name: str, seconds: float, result: Path, out: Path, skip: int) -> list[str]:
    """What a step runs. Attention's steps end by themselves in time to say what they left out."""
    python = [sys.executable, "-u"]
    attention = [*python, "benchmarks/attention.py", "--out", str(result), "--limit-seconds", str(seconds - 30)]
    if name == "smoke":
        return [*python, "-m", "stca.checks.unproven", "operator"]
    if name == "tests":
        # Most of the time goes into compiling kernels.
        workers = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
        tests = ["tests/gpu", "tests/unit/plugins_tensorrt/test_cpp_plugin.py"]
        return [*python, "-m", "pytest", "-m", "gpu", "-vv", "--tb=short", "-p", "no:cacheprovider", *workers, *tests]
    if name == "tune":
        table, committed = out.with_name("tiles.json"), ROOT / "plugins/tiles.json"
        if committed.exists() and not table.exists():
            shutil.copy(committed, table)
        return [*attention, "--tune", str(table), *HEADLINE]
    if name == "headline":
        return [*attention, "--only", "speed", "--skip", str(skip), *HEADLINE]
    if name in ("parity", "speed", "ptx"):
        return [*attention, "--only", name, "--skip", str(skip), *(HEADLINE if name == "ptx" else ())]
    return [*python, "benchmarks/gpu_steps.py", name, "--out", str(result)]


def outcomes(text: str) -> dict[str, Any]:
    """How many tests ended how, also of a run that was stopped, and which went wrong."""
    ended: dict[str, str] = {}
    for line in text.splitlines():
        outcome, test = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line), re.search(r"tests/\S+::\S+", line)
        if outcome and test:
            ended[test[0]] = outcome[1]
    counts = {kind: list(ended.values()).count(kind) for kind in sorted({*ended.values()})}
    return {**counts, "wrong": sorted(test for test, kind in ended.items() if kind in ("FAILED", "ERROR"))}


if __name__ == "__main__":
    main()
