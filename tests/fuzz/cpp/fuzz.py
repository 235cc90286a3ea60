"""`python tests/fuzz/cpp/fuzz.py`: resealed bundles and random calls for the C++ runtime, under its sanitizers.

Each round depends on the seed and its own number alone. What was found goes to `--out`; the same command again goes on
where it stopped, and a round that went wrong is had again by the command that is printed for it. Exit codes: 0 nothing
went wrong, 1 something did, 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

REPOSITORY = Path(__file__).resolve().parents[3]
GOLDEN = REPOSITORY / "tests" / "unit" / "runtime_cpp" / "golden"
SECONDS = 600
# Rounds of one process: what a sanitizer finds ends it, and the next one goes on behind that round.
ROUNDS = 250


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked and has not been run yet; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundles", type=int, default=5000, help="rounds of a resealed bundle (%(default)s)")
    parser.add_argument("--calls", type=int, default=1000, help="rounds of some 35 calls of the C ABI (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("fuzz-cpp.json"), help="what was found so far (%(default)s)")
    parser.add_argument("--build", type=Path, default=Path("build/fuzz-cpp"), help="where to build (%(default)s)")
    args = parser.parse_args(argv)
    program = build(args.build)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    if found.setdefault("seed", args.seed) != args.seed:
        parser.error(f"{args.out} is of seed {found['seed']}; give another --out")
    for kind, rounds in (("bundles", args.bundles), ("calls", args.calls)):
        state = found.setdefault(kind, {"next": 0, "counts": {}, "wrong": []})
        while state["next"] < rounds:
            run(program, kind, args.seed, min(ROUNDS, rounds - state["next"]), state)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
        report(kind, state)
    return 1 if any(found[kind]["wrong"] for kind in ("bundles", "calls")) else 0


def build(folder: Path, target: str = "stca_fuzz") -> Path:
    """A program of the C++ tests, built with sanitizers; as it was where nothing changed."""
    settings = ("-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O0 -g1", "-DSTCA_SANITIZE=address,undefined")
    source = REPOSITORY / "runtime" / "cpp"
    for command in (
        ("cmake", "-S", source, "-B", folder, *settings, "-DSTCA_BUILD_TESTS=ON"),
        ("cmake", "--build", folder, "--parallel", "2", "--target", target),
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-3000:]}")
    return next(folder.glob(f"*/{target}"))


def environment() -> dict[str, str]:
    """This process's, in which the C++ runtime finds the Python package's ONNX Runtime."""
    libraries = sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    return {**os.environ, **({"STCA_ONNXRUNTIME_LIBRARY": str(libraries[0])} if libraries else {})}


def run(program: Path, kind: str, seed: int, rounds: int, state: dict[str, Any]) -> None:
    """Rounds from `state["next"]` on in one process, and what became of them into `state`."""
    first = state["next"]
    command = [str(program), kind, str(GOLDEN), str(seed), str(first), str(rounds)]
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False)
        code, output, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as e:
        code, output, errors = None, (e.stdout or b"").decode(errors="replace"), f"hung for {SECONDS} s"
    at = first - 1
    for line in output.splitlines():
        if (number := re.fullmatch(r"round (\d+)", line)) is not None:
            at = int(number[1])
        elif line.startswith("WRONG "):
            state["wrong"].append({"round": at, "what": line[6:300]})
        elif (count := re.fullmatch(r"count (\d+) (.+)", line)) is not None:
            state["counts"] = dict(Counter(state["counts"]) + Counter({count[2]: int(count[1])}))
    if code in (0, 1) and "done, " in output:
        state["next"] = first + rounds
        return
    summary = re.search(r"^(SUMMARY|.*runtime error).*$", errors, re.MULTILINE)
    state["wrong"].append({"round": at, "what": summary[0] if summary else f"exit {code}: {errors[-300:]}"})
    # Of the rounds before it, the counts went with the process.
    state["counts"]["rounds not counted"] = state["counts"].get("rounds not counted", 0) + at - first
    state["next"] = max(at, first) + 1


def report(kind: str, state: dict[str, Any]) -> None:
    """Print what became of all rounds so far."""
    wrong = state["wrong"]
    calls = sum(n for name, n in state["counts"].items() if name not in ("bundles", "rounds not counted"))
    print(f"{kind}: {state['next']} rounds, {calls} calls, {len(wrong)} wrong")
    for name, count in sorted(state["counts"].items()):
        print(f"  {count:8} {name}")
    for one in wrong[:20]:
        print(f"  round {one['round']}: {one['what']}; again: stca_fuzz {kind} GOLDEN SEED {one['round']} 1")


if __name__ == "__main__":
    sys.exit(main())
