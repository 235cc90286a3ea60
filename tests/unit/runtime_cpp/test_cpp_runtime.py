"""The C++ runtime: built with sanitizers, its own tests run, installed, found by others, and held against Python."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from make_golden import Log, append, batch, events, forget, packed, score, stats, tensor
from test_cpp_golden import error_codes, perform

from stca import probe
from stca.bundle import HALVES, Bundle
from stca.errors import BuildError, StcaError
from stca.runtime import Request, Session
from stca.runtime.engine_choice import Machine, best_engine
from stca.tensorrt_flavours import FLAVOURS

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]
GOLDEN = HERE / "golden"
# Unoptimised: the sanitizers make optimised code three times as long to compile, and the tests are short.
FLAGS = "-O0 -g1"
SANITIZERS = "address,undefined"

missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)} to build the C++ runtime")


def command(*arguments: str | Path, **options: Any) -> str:
    """Run a command and return what it printed; its whole output is the failure's message."""
    done = subprocess.run(
        list(map(str, arguments)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280, **options
    )
    output: str = done.stdout
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}\n{output[-5000:]}"
    return output


def configure(source: Path, build: Path, *settings: str) -> None:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    command("cmake", "-S", source, "-B", build, *generator, "-DCMAKE_BUILD_TYPE=None", *settings)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library and its tests, with AddressSanitizer and UBSan."""
    folder = tmp_path_factory.mktemp("cpp") / "build"
    settings = [f"-DCMAKE_CXX_FLAGS={FLAGS}", f"-DSTCA_SANITIZE={SANITIZERS}", "-DSTCA_BUILD_TESTS=ON"]
    for name in ("TENSORRT_INCLUDE_DIR", "ONNXRUNTIME_INCLUDE_DIR"):
        if os.environ.get(name):
            settings.append(f"-D{name}={os.environ[name]}")
    configure(REPOSITORY / "runtime" / "cpp", folder, *settings)
    command("cmake", "--build", folder, "--parallel", "2")
    return folder


@pytest.fixture(scope="session")
def onnxruntime_library(build: Path) -> Path:
    """ONNX Runtime's shared library, from the Python package, where the C++ engine for it was built."""
    if not os.environ.get("ONNXRUNTIME_INCLUDE_DIR"):
        pytest.skip("needs ONNXRUNTIME_INCLUDE_DIR, the folder of onnxruntime_c_api.h, which no wheel carries")
    found = sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    if not found:
        pytest.skip("the onnxruntime package has no libonnxruntime.so of its own")
    return found[0]


@pytest.fixture(scope="session")
def installed(build: Path) -> Path:
    prefix = build.parent / "installed"
    command("cmake", "--install", build, "--prefix", prefix)
    return prefix


def test_unit_tests_and_golden_requests(build: Path) -> None:
    output = command("ctest", "--test-dir", build, "--output-on-failure", "--timeout", "120", "--parallel", "2")
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
    assert headers == {"include/stca/runtime.h", "include/stca/runtime.hpp"}


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


@contextlib.contextmanager
def serving(program: Path, bundle: Path) -> Iterator[Any]:
    """The example server on a free port, as a function from a line to its answer."""
    with subprocess.Popen([program, bundle, "0", "none"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            where, engine = server.stdout.readline().strip().split(", engine ")
            assert engine.startswith("none")
            with socket.create_connection(("127.0.0.1", int(where.split(":")[1])), timeout=20) as connection:
                stream = connection.makefile("rw", encoding="utf-8")

                def ask(line: str) -> str:
                    stream.write(line + "\n")
                    stream.flush()
                    return stream.readline().rstrip("\n")

                yield ask
        finally:
            server.terminate()


def test_example_server(installed: Path, tmp_path: Path) -> None:
    source = REPOSITORY / "examples" / "cpp_server"
    assert len((source / "main.cpp").read_text().splitlines()) < 150
    flags = f"-DCMAKE_CXX_FLAGS={FLAGS} -fsanitize={SANITIZERS}"
    configure(source, tmp_path, f"-DCMAKE_PREFIX_PATH={installed}", flags)
    command("cmake", "--build", tmp_path)
    for port in ("-1", "65536", "80x", " 80", "", "http"):
        wrong = [tmp_path / "cpp_server", GOLDEN / "log", port, "none"]
        done = subprocess.run(wrong, capture_output=True, text=True, timeout=20)
        assert done.returncode == 2
        assert done.stderr == f"'{port}' is no port; give a number from 1 to 65535, or 0 for a free one\n"
    history = "history_item=1,2,3 history_action=0,1,3 user_segment=2 user_profile=0.5,1"
    targets = "request_device=1 target_item=7,999 target_price=1.5,2,0.25,0"
    with serving(tmp_path / "cpp_server", GOLDEN / "log") as ask:
        assert ask(f"score ann v1 {history} {targets}") == "ok 0 0 0 0"
        assert ask(f"score ann v1 {targets}") == "ok 0 0 0 0"
        assert ask("append ann v2 history_item=4 history_action=1") == "ok kept"
        assert ask("append bob v2 history_item=4 history_action=1") == "ok nothing"
        assert ask("stats") == "ok hits 1 misses 1 users 1 bytes 56"
        refused = "error 8 target_item: holds 1000 at [0]; it must be in [0, 999]"
        assert ask(f"score ann v2 {targets.replace('7,999', '1000,1')}") == refused
        assert ask("score ann v2 target_item=x").startswith("error 8 x: not numbers")
        assert ask("score ann v2 colour=1").startswith("error 8 colour=1")
        assert ask("nonsense").startswith("error 8 nonsense")
        assert ask(f"swap {GOLDEN / 'nowhere'}").startswith("error 6 ")
        assert ask(f"swap {GOLDEN / 'log_other_weights'}").startswith("ok ")
        assert ask(f"score ann v2 {targets}").startswith("error 8 user 'ann'")
        assert ask("forget ann") == "ok nothing"


def random_steps(seed: int) -> list[dict[str, Any]]:
    """Requests near the good ones, some of them wrong, in the form of the golden file but without what is expected."""
    choose = random.Random(seed)

    def log() -> Log:
        length = choose.randrange(0, 8)
        request = Log(
            [choose.randrange(0, 1000) for _ in range(length)],
            [choose.randrange(0, 4) for _ in range(length)],
            choose.randrange(0, 5),
            (choose.randrange(-8, 8) / 4, 1.0),
        )
        targets = choose.randrange(0, 4)
        request.targets = [choose.randrange(0, 1000) for _ in range(targets)]
        request.prices = [[choose.randrange(-8, 8) / 4, 0.0] for _ in range(targets)]
        return request

    def changed(inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs, one of them sometimes replaced or left out."""
        if choose.random() < 0.6:
            return inputs
        name = choose.choice([*inputs, "unknown"])
        dtype = choose.choice(["int64", "int32", "uint8", "uint64", "int8", "float32", "float64", "bool"])
        shape = [choose.randrange(0, 4) for _ in range(choose.randrange(0, 3))]
        count = 1
        for n in shape:
            count *= n
        low = -2 if dtype.startswith(("int", "float")) else 0
        data = [choose.choice([low, 0, 1, 1, 1, 4, 100]) if dtype != "bool" else True for _ in range(count)]
        if choose.random() < 0.2:
            return {k: v for k, v in inputs.items() if k != name}
        return {**inputs, name: tensor(dtype, data, shape)}

    def step() -> dict[str, Any]:
        user, version = choose.choice([None, "ann", "bob", "cat"]), choose.choice([None, "v1", "v2"])
        match choose.randrange(0, 6):
            case 0:
                requests = [log() for _ in range(choose.randrange(1, 4))]
                users = [choose.choice([None, "ann", "bob"]) for _ in requests] if choose.random() < 0.5 else []
                return batch(changed(packed(requests)), None, users, ["v1"] * len(users))
            case 1:
                some = log()
                new = changed(events(some.items, some.actions))
                return append(user or "ann", new, version or "v3", None, after=choose.choice([None, None, "v1"]))
            case 2:
                return forget(user or "ann", False)
            case 3:
                return score(changed(log().rest()), None, user, version)
            case _:
                return score(changed(log().inputs()), None, user, version)

    return [step() for _ in range(300)]


@pytest.mark.parametrize("seed", [1, 2])
def test_random_requests_end_as_in_python(build: Path, tmp_path: Path, seed: int) -> None:
    """Python performs random calls and notes how each ends; C++ must end the same, scores and codes alike."""
    codes = error_codes()
    session = Session.load(GOLDEN / "log", cache_bytes=150, threads=1)
    steps, refused = [], 0
    for step in random_steps(seed):
        plain = {k: v for k, v in step.items() if k != "kept"}
        try:
            outcome = perform(session, plain)
        except StcaError as e:
            # What the message must name: the input it begins with.
            outcome = {"error": {"code": codes[type(e)], "says": [str(e).split(":")[0]]}}
            refused += 1
        steps.append({**plain, **outcome})
    everything = stats(hits=0, misses=0, evictions=0, refused=0, users=0, bytes=0)
    steps.append({**everything, **perform(session, everything)})
    assert 50 < refused < 250
    case = {"name": f"random {seed}", "bundle": "log", "cache_bytes": 150, "truncate": False, "steps": steps}
    file = tmp_path / "cases.json"
    file.write_text(json.dumps({"cases": [case]}))
    print(command(build / "tests" / "stca_golden", GOLDEN, file))


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
            kind |= {"sm": choose.choice([80, 90]), "version": choose.choice(["11.4.0.106", "11.5.0.1"])}
            if choose.random() < 0.3:
                kind |= {"flavour": "onnxruntime", "precision": choose.choice(["fp16", "fp32"]), "sm": None}
                kind |= {"provider": choose.choice(["CPUExecutionProvider", "CUDAExecutionProvider"])}
            for half in choose.choice([HALVES, HALVES, HALVES, HALVES[:1], HALVES[1:], HALVES[::-1]]):
                file = manifest.graphs[half].file if kind["precision"] == "fp32" else f"{half}.{len(found)}"
                found.append({**kind, "graph": half, "file": file})
        return found

    def case() -> dict[str, Any]:
        made = dataclasses.replace(manifest, engines=tuple(entries()))
        machine = Machine(
            choose.choice([None, 80, 90, 90]), choose.choice([{}, {"tensorrt": "11.4.0.106"}, {"tensorrt": "11.5.0.1"}])
        )
        only = choose.choice([None, None, "tensorrt"])
        try:
            choice = best_engine(made, machine, only=only)
            plan = choice.entries["user_encoder"]["file"] if choice.flavour == "tensorrt" else ""
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


def test_golden_requests_on_onnxruntime(build: Path, onnxruntime_library: Path) -> None:
    environment = {**os.environ, "STCA_ONNXRUNTIME_LIBRARY": str(onnxruntime_library)}
    output = command(build / "tests" / "stca_golden", GOLDEN, "--engine", "onnxruntime", env=environment)
    assert "as expected" in output


def test_trained_model_scores_as_in_python(build: Path, onnxruntime_library: Path, tmp_path: Path) -> None:
    """The shipped checkpoint, exported and served by both runtimes on one ONNX Runtime: bit for bit the same scores."""
    from stca.export.checkpoint import load_checkpoint
    from stca.export.pipeline import export_checkpoint
    from stca.verify import prove

    checkpoint = REPOSITORY / "examples" / "checkpoints" / "stca_demo.safetensors"
    bundle = export_checkpoint(load_checkpoint(checkpoint), tmp_path / "demo", prove=prove)
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
    case = {"name": "demo", "bundle": "demo", "cache_bytes": 1 << 30, "truncate": False, "steps": steps}
    (tmp_path / "cases.json").write_text(json.dumps({"cases": [case]}))
    environment = {**os.environ, "STCA_ONNXRUNTIME_LIBRARY": str(onnxruntime_library)}
    command(
        build / "tests" / "stca_golden",
        tmp_path,
        tmp_path / "cases.json",
        "--engine",
        "onnxruntime",
        env=environment,
    )
