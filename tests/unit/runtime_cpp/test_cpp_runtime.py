"""The C++ runtime: built with sanitizers, its own tests run, installed, found by others, and held against Python."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from building import GOLDEN, HERE, MISSING, REPOSITORY, SANITIZERS, command, configure
from make_golden import append, score, tensor

from stca import probe
from stca.bundle import Bundle
from stca.errors import BuildError
from stca.manifest import EngineEntry
from stca.runtime import Request, Session
from stca.runtime.engine_choice import Machine, best_engine
from stca.specs import HALVES
from stca.tensorrt_flavours import FLAVOURS
from stca.trace import Traced

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to build the C++ runtime")


def test_unit_tests_and_golden_requests(build: Path, onnxruntime_library: Path) -> None:
    environment = {**os.environ, "STCA_ONNXRUNTIME_LIBRARY": str(onnxruntime_library)}
    tests = ("ctest", "--test-dir", build, "--output-on-failure", "--timeout", "120", "--parallel", "2")
    output = command(*tests, env=environment)
    assert "100% tests passed" in output


def test_installed_package_is_found_from_c(installed: Path, tmp_path: Path) -> None:
    configure(
        HERE / "consumer", tmp_path, f"-DCMAKE_PREFIX_PATH={installed}", f"-DCMAKE_C_FLAGS=-fsanitize={SANITIZERS}"
    )
    command("cmake", "--build", tmp_path)
    output = command(tmp_path / "consumer", GOLDEN / "log").splitlines()
    manifest = json.loads((GOLDEN / "log" / "manifest.json").read_text())
    assert output == [
        f"abi 1, weights {manifest['weights']}",
        *(spec["name"] for spec in manifest["graphs"]["request"]["inputs"]),
    ]
    headers = {str(p.relative_to(installed)) for p in installed.rglob("*.h*")}
    assert headers == {
        f"include/stca/{name}" for name in ("deadline.hpp", "errors.hpp", "runtime.h", "runtime.hpp", "tensor.hpp")
    }


def test_only_the_c_abi_is_exported(build: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm to list the library's symbols")
    lines = command("nm", "--dynamic", "--defined-only", build / "libstca_runtime.so").splitlines()
    names = {line.split()[-1].split("@")[0] for line in lines}
    header = (REPOSITORY / "runtime" / "cpp" / "include" / "stca" / "runtime.h").read_text()
    assert names
    assert {name for name in names if f"{name}(" not in header} == set()


def test_the_guides_program_compiles(tmp_path: Path) -> None:
    """The example of the documentation, against the headers alone."""
    text = (REPOSITORY / "docs" / "cpp_runtime.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```cpp\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "main.cpp").write_text(program)
    include = REPOSITORY / "runtime" / "cpp" / "include"
    warnings = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
    command("c++", "-std=c++17", "-fsyntax-only", *warnings, "-I", include, tmp_path / "main.cpp")


def test_the_guides_line_finds_the_wheels_library(onnxruntime_library: Path) -> None:
    text = (REPOSITORY / "docs" / "cpp_runtime.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^export STCA_ONNXRUNTIME_LIBRARY=.*$", text, re.MULTILINE)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = command("sh", "-c", f'{line}; echo "$STCA_ONNXRUNTIME_LIBRARY"', env={**os.environ, "PATH": path})
    assert found.splitlines()[-1] == str(onnxruntime_library)


def choice_cases(seed: int) -> list[dict[str, Any]]:
    """Engines that a bundle may have, machines it may come to, and what Python chooses there, in its own words."""
    choose = random.Random(seed)
    manifest = Bundle.load(GOLDEN / "log").manifest
    sizes: dict[str, Any] = {"profiles": [{"N_h": [1, 6, 6]}], "requests": None, "inputs": [], "outputs": []}

    def entries() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for _ in range(choose.randrange(0, 5)):
            kind: dict[str, Any] = {
                "flavour": "tensorrt",
                "precision": choose.choice(["bf16", "fp16", "fp32"]),
                **sizes,
            }
            kind["lowering"] = choose.choice([None, "plugin"])
            kind |= {"sm": choose.choice([80, 90]), "version": choose.choice(["11.4.0.106", "11.5.0.1"])}
            if choose.random() < 0.3:
                kind |= {"flavour": "onnxruntime", "precision": choose.choice(["fp16", "fp32"]), "sm": None}
                kind["lowering"] = None
                kind |= {"provider": choose.choice(["CPUExecutionProvider", "CUDAExecutionProvider"])}
            for half in choose.choice([HALVES, HALVES, HALVES, HALVES[:1], HALVES[1:], HALVES[::-1]]):
                file = manifest.graphs[half].file if kind["precision"] == "fp32" else f"{half}.{len(found)}"
                found.append({**kind, "graph": half, "file": file})
        return found

    def case() -> dict[str, Any]:
        made = dataclasses.replace(manifest, engines=tuple(EngineEntry(**e) for e in entries()))
        machine = Machine(
            choose.choice([None, 80, 90, 90]), choose.choice([{}, {"tensorrt": "11.4.0.106"}, {"tensorrt": "11.5.0.1"}])
        )
        only = choose.choice([None, None, "tensorrt"])
        try:
            choice = best_engine(made, machine, only=only)
            plan = choice.entries["user_encoder"].file if choice.flavour == "tensorrt" else ""
            expected = {"why": choice.why, "passed_over": "; ".join(choice.passed_over), "encoder": plan}
        except BuildError as e:
            expected = {"why": str(e), "passed_over": "", "encoder": ""}
        here = {"sm": machine.sm or 0, "tensorrt": machine.versions.get("tensorrt", "")}
        return {
            "manifest": made.to_json(),
            "only": only or "",
            "install": FLAVOURS["tensorrt"].install,
            **here,
            **expected,
        }

    return [case() for _ in range(200)]


def test_engines_are_chosen_as_in_python(build: Path, tmp_path: Path) -> None:
    cases = choice_cases(1)
    ends = {case["why"].split(" fp")[0].split(" bf")[0][:40] for case in cases}
    assert len(ends) >= 4  # plans, the bundle's own graphs as an engine, as the last resort, and refusals
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases))
    output = command(
        build / "tests" / "stca_tests", "choice_is_pythons", env={**os.environ, "STCA_CHOICE_CASES": str(file)}
    )
    assert "200 cases" in output


def test_serves_on_onnxruntime_where_no_plan_runs(build: Path, onnxruntime_library: Path) -> None:
    """With the real loaders of CUDA and TensorRT: whatever this machine lacks is a reason, not an error."""
    if not os.environ.get("TENSORRT_INCLUDE_DIR"):
        pytest.skip("needs TENSORRT_INCLUDE_DIR, the folder of NvInferRuntime.h, which no wheel carries")
    environment = {**os.environ, "STCA_ONNXRUNTIME_LIBRARY": str(onnxruntime_library)}
    output = command(build / "tests" / "stca_tests", "choice_falls_back", env=environment)
    print(output)
    assert "(CPU), passed over: tensorrt bf16 for SM 1: t" in output  # there is no GPU, or this GPU is another


def test_plans_go_to_the_real_library(build: Path, tmp_path: Path) -> None:
    """NVIDIA's lean runtime; without a GPU it says that it cannot start, and what it says is in the error."""
    if not os.environ.get("TENSORRT_INCLUDE_DIR"):
        pytest.skip("needs TENSORRT_INCLUDE_DIR, the folder of NvInferRuntime.h, which no wheel carries")
    lean = importlib.util.find_spec("tensorrt_lean_libs")
    found = (
        sorted(Path(p) for folder in lean.submodule_search_locations or () for p in Path(folder).glob("*lean.so.*"))
        if lean
        else []
    )
    if not found:
        pytest.skip("needs TensorRT's lean runtime: pip install tensorrt-lean-cu13-libs")
    cudart = tmp_path / "libcudart.so"
    command("cc", "-std=c99", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", cudart, HERE / "stand_in_cudart.c")
    environment = {**os.environ, "STCA_TENSORRT_LIBRARY": str(found[0]), "STCA_CUDART_LIBRARY": str(cudart)}
    output = command(build / "tests" / "stca_tests", "choice_hands_plans", env=environment)
    print(output)
    assert f"SM 90, TensorRT {importlib.metadata.version('tensorrt-lean-cu13-libs')}\n" in output
    assert re.search(
        "^(TensorRT cannot start|user_encoder.fp32.plan cannot be loaded): .*Error Code", output, re.MULTILINE
    )


def test_golden_requests_on_onnxruntime(build: Path, onnxruntime_library: Path, tmp_path: Path) -> None:
    """And ONNX Runtime writes nothing: no word of its own to the terminal, no file below the user's folders."""
    homes = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment = {**os.environ, **homes, "STCA_ONNXRUNTIME_LIBRARY": str(onnxruntime_library)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    output = command(build / "tests" / "stca_golden", GOLDEN, "--engine", "onnxruntime", env=environment)
    assert re.fullmatch(r"\d+ cases, \d+ steps, engine onnxruntime: as expected\n", output)
    assert list(tmp_path.iterdir()) == []


def test_trained_model_scores_as_in_python(build: Path, onnxruntime_library: Path, tmp_path: Path) -> None:
    """The shipped checkpoint, exported and served by both runtimes on one ONNX Runtime: bit for bit the same scores.

    In float32, with the state in each kind of 8 bits, and with matrices and tables of int8.
    """
    from stca.calibration.choices import Options, formats_of, weight_choices, with_ranges
    from stca.calibration.quantized_bundle import write_quantized
    from stca.calibration.quantized_state import quantizable
    from stca.checks.trace_runs import TraceRuns
    from stca.checks.verify import prove
    from stca.export.pipeline import export_checkpoint
    from stca.export.reference.checkpoint import load_checkpoint

    checkpoint = REPOSITORY / "examples" / "checkpoints" / "stca_demo.safetensors"
    bundle = export_checkpoint(load_checkpoint(checkpoint), tmp_path / "demo", prove=prove)
    bundles = {"demo": bundle}
    some = [Traced(probe.single(bundle.manifest.graphs["request"].inputs, 300, 1, np.random.default_rng(1)))]
    for kind in ("int8", "fp8"):
        states = TraceRuns(1).states(bundle, some)
        formats = formats_of(bundle, quantizable(bundle.manifest.state), Options(kind), states)  # type: ignore[arg-type]
        bundles[kind] = write_quantized(bundle, formats, tmp_path / kind)
    for activations in ("none", "token", "tensor"):
        choices = weight_choices(bundle, Options(None, tables="int8", weights="int8", activations=activations))  # type: ignore[arg-type]
        if activations == "tensor":
            choices |= with_ranges(bundle, choices, "absmax", TraceRuns(1), some)
        bundles[activations] = write_quantized(bundle, choices, tmp_path / activations)
    cases = [
        {"name": name, "bundle": name, "cache_bytes": 1 << 30, "truncate": False, "steps": _served(one)}
        for name, one in bundles.items()
    ]
    (tmp_path / "cases.json").write_text(json.dumps({"cases": cases}))
    environment = {**os.environ, "STCA_ONNXRUNTIME_LIBRARY": str(onnxruntime_library)}
    command(
        build / "tests" / "stca_golden",
        tmp_path,
        tmp_path / "cases.json",
        "--engine",
        "onnxruntime",
        env=environment,
    )


def _served(bundle: Bundle) -> list[dict[str, Any]]:
    """Misses, hits and appends of several users, with what Python's session makes of them."""
    specs = bundle.manifest.graphs["request"].inputs
    scopes = {s.name: s.scope for s in specs}
    rng = np.random.default_rng(0)
    session = Session.load(bundle.path, threads=1)

    def sent(inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor(str(x.dtype), x.ravel(), list(x.shape)) for name, x in inputs.items()}

    def scored(inputs: dict[str, Any], user: str, version: str) -> dict[str, Any]:
        return score(sent(inputs), session.score(Request(inputs, user, version)).tolist(), user, version)

    steps = []
    for user, (tokens, targets) in enumerate(((0, 3), (1, 1), (700, 40), (64, 300))):
        inputs = probe.single(specs, tokens, targets, rng)
        rest = {n: x for n, x in inputs.items() if scopes[n] != "user"}
        new = {
            n: x
            for n, x in probe.single(specs, 5, 0, rng).items()
            if scopes[n] == "user" and next(s for s in specs if s.name == n).shape[0] == "N_h"
        }
        steps.append(scored(inputs, f"user {user}", "v1"))
        steps.append(scored(rest, f"user {user}", "v1"))
        steps.append(append(f"user {user}", sent(new), "v2", session.append(f"user {user}", new, "v2")))
        steps.append(scored(rest, f"user {user}", "v2"))
    return steps
