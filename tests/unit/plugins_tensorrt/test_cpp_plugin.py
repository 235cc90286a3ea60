"""The C++ plugin: built with CMake, driven without TensorRT, and loaded by TensorRT's own registry."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import nvidia_bindings

from stca.errors import BuildError
from stca.plugins import artifacts, plugin_library
from stca.plugins.plugin_library import SOURCES
from stca.plugins.tiling import PORTABLE_SHARED_LIMIT, Shape

TESTS = Path(__file__).parent / "cpp"


def cmake(source: Path, build: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Configure; the result is not checked."""
    defined = [f"-D{name}={value}" for name, value in options.items()]
    command = ["cmake", "-S", str(source), "-B", str(build), *defined]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def artifact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    plain = Shape(2, 1, 64, 64, "bfloat16", tied=True)
    kernels = list(artifacts.build([(plain, 0.125)], [80, 90], PORTABLE_SHARED_LIMIT))
    lists = replace(plain, tied=False, segments=True)
    kernels += artifacts.build([(lists, 0.125)], [90], PORTABLE_SHARED_LIMIT)
    artifacts.write(kernels, folder)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, artifact_folder: Path) -> Path:
    """Folder with the library, its test and the recording driver."""
    build = tmp_path_factory.mktemp("build")
    where = {
        "TENSORRT_INCLUDE_DIR": plugin_library.tensorrt_headers(),
        "CUDA_INCLUDE_DIR": plugin_library.cuda_headers(),
        "STCA_ARTIFACTS": artifact_folder,
        "STCA_TEST_DIR": TESTS,
    }
    configured = cmake(SOURCES, build, **where)
    assert configured.returncode == 0, configured.stderr
    compiled = subprocess.run(["cmake", "--build", str(build)], capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    assert "warning" not in compiled.stdout + compiled.stderr
    return build


def drive(
    built: Path, *arguments: object, driver: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run test_plugin, with the recording driver as libcuda.so.1 if asked to."""
    path = {"LD_LIBRARY_PATH": str(built)} if driver else {}
    command = [str(built / "test_plugin"), str(built / "libstca_tensorrt.so"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **path, **environment}
    )


def test_headers_are_looked_for_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "NvInferRuntime.h").touch()
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    assert plugin_library.tensorrt_headers() == str(tmp_path)
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR")
    monkeypatch.setattr(plugin_library, "_SYSTEM", ())
    monkeypatch.setattr(plugin_library, "_in_package", lambda *_: "")
    with pytest.raises(BuildError, match="pip install --no-deps kernel-lens"):
        plugin_library.tensorrt_headers()


class TestBuildSaysWhatItNeeds:
    pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake: apt-get install cmake g++")

    @pytest.mark.skipif(Path("/usr/include/NvInferRuntime.h").exists(), reason="this machine has TensorRT's headers")
    def test_headers(self, tmp_path: Path) -> None:
        done = cmake(SOURCES, tmp_path)
        assert done.returncode != 0
        assert "NvInferRuntime.h not found" in done.stderr
        assert "-DTENSORRT_INCLUDE_DIR=" in done.stderr

    def test_artifacts(self, tmp_path: Path) -> None:
        (tmp_path / "NvInferRuntime.h").touch()
        (tmp_path / "cuda.h").touch()
        done = cmake(SOURCES, tmp_path / "build", TENSORRT_INCLUDE_DIR=tmp_path, CUDA_INCLUDE_DIR=tmp_path)
        assert done.returncode != 0
        assert "python -m stca.plugins.artifacts --out DIR" in " ".join(done.stderr.split())


class TestLibrary:
    def test_types_shapes_formats_and_serialization(self, built: Path) -> None:
        done = drive(built)
        assert done.returncode == 0, done.stdout
        assert done.stdout.splitlines()[-1] == "0 failures"

    def test_it_exports_two_functions_and_links_neither_tensorrt_nor_cuda(self, built: Path) -> None:
        library = built / "libstca_tensorrt.so"
        listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
        assert sorted(line.split()[-1] for line in listed.stdout.splitlines()) == ["getCreators", "setLoggerFinder"]
        needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"NEEDED.*(nvinfer|cuda)", needed)

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize(("targets", "tokens", "requests"), [(8, 10_000, 1), (300, 100, 4), (30_000, 9000, 7)])
    def test_enqueue_launches_the_kernels_with_their_arguments(
        self, built: Path, artifact_folder: Path, targets: int, tokens: int, requests: int, tied: bool
    ) -> None:
        done = drive(built, "--enqueue", targets, tokens, requests, int(tied), driver=True, RECORDING_SM="90")
        assert done.returncode == 0, done.stdout
        launches = re.findall(r"launch (\w+) grid=(\S+) block=(\S+) shared=(\d+) arguments=(\S+)", done.stdout)
        # One multiprocessor holds two blocks in the recording driver, and a GPU has 132 of them.
        heads, depth, fits = 2, 64, 264
        inputs = [f"p{4096 * (2 if tied and i == 3 else i)}" for i in range(1, 7)]
        out, workspace = f"p{4096 * 7}", 4096 * 8
        counts = [str(targets), str(tokens), str(requests)]

        kernels = json.loads((artifact_folder / "artifacts.json").read_text())["kernels"]
        parts = int(launches[0][1].split(",")[2])
        artifact = next(
            kernel
            for kernel in kernels
            if kernel["kernel"] == "attend_kernel"
            and (kernel["sm"], kernel["tied"], kernel["parts"]) == (90, tied, parts > 1)
            and not kernel["segments"]
            and kernel["least_rows"] == (0 if targets // requests < 48 else 48 * heads)
        )
        tile_rows, block_n = artifact["block_m"], artifact["block_n"]
        busy = requests * math.ceil(targets * heads // requests / tile_rows)
        assert parts == max(1, min(fits // busy, tokens // requests // block_n // 4, 128))
        assert (parts > 1) == (targets == 8)
        name, grid, block, shared, arguments = launches[0]
        assert (name, block, shared) == ("attend_kernel", f"{artifact['threads']},1,1", str(artifact["shared"]))
        columns = math.ceil(depth / artifact["block_dv"])
        assert grid == f"{targets * heads // tile_rows + requests},{columns},{parts}"
        if parts == 1:
            assert len(launches) == 1
            assert arguments.split(",") == [*inputs, *counts, out]
            return
        partial = [f"p{workspace}", f"p{workspace + 4 * parts * targets * heads * depth}"]
        assert arguments.split(",") == [*inputs, *counts, *partial]
        name, grid, _, _, arguments = launches[1]
        assert (name, grid) == ("combine_kernel", f"{targets * heads},1,1")
        assert arguments.split(",") == [*partial, str(targets * heads), str(parts), out]

    @pytest.mark.parametrize("tokens", [10_000, 100])
    def test_lists_of_segments_reach_the_kernel_as_they_lie(self, built: Path, tokens: int) -> None:
        done = drive(built, "--enqueue-lists", 8, tokens, 2, 11, driver=True, RECORDING_SM="90")
        assert done.returncode == 0, done.stdout
        launches = re.findall(r"launch (\w+) grid=\S+,(\d+) .*arguments=(\S+)", done.stdout)
        parts = int(launches[0][1])
        assert (parts > 1) == (tokens == 10_000) == (len(launches) == 2)
        given = [*(f"p{4096 * i}" for i in range(1, 9)), "8", str(tokens), "2", "11"]
        made = [f"p{4096 * 10}", f"p{4096 * 10 + 4 * parts * 8 * 2 * 64}"] if parts > 1 else [f"p{4096 * 9}"]
        assert launches[0][2].split(",") == [*given, *made]

    def test_each_launch_runs_the_tile_for_its_rows_not_one_chosen_when_the_engine_was_built(
        self, built: Path, artifact_folder: Path
    ) -> None:
        kernels = json.loads((artifact_folder / "artifacts.json").read_text())["kernels"]
        attend = [k for k in kernels if k["kernel"] == "attend_kernel" and k["sm"] == 90 and not k["segments"]]
        whole = [k for k in attend if not k["parts"]]
        for tied in (False, True):
            few, many = (k for k in whole if k["tied"] == tied)
            assert (few["least_rows"], many["least_rows"], few["block_m"] < many["block_m"]) == (0, 96, True)
            for targets, used in ((47, few), (48, many)):
                done = drive(built, "--enqueue", targets * 7, 100, 7, int(tied), driver=True, RECORDING_SM="90")
                assert done.returncode == 0, done.stdout
                grid = f"{targets * 7 * 2 // used['block_m'] + 7},{math.ceil(64 / used['block_dv'])},1"
                assert f"grid={grid} block={used['threads']},1,1 shared={used['shared']} " in done.stdout

    def test_a_log_of_another_major_version_is_not_spoken_to(self, built: Path) -> None:
        done = drive(built, "--finder-of", built / "libother_tensorrt.so")
        assert done.returncode == 0, done.stdout
        assert done.stderr == "stca::TargetHistoryAttention: the node needs a finite attribute scale\n"

    def test_no_target_launches_nothing(self, built: Path) -> None:
        done = drive(built, "--enqueue", 0, 100, 1, 0, driver=True)
        assert done.returncode == 0, done.stdout
        assert "launch" not in done.stdout

    def test_gpu_without_its_own_kernels_takes_the_portable_ones_and_an_old_one_is_refused(self, built: Path) -> None:
        newer = drive(built, "--enqueue", 8, 100, 1, 0, driver=True, RECORDING_SM="103")
        assert newer.returncode == 0, newer.stdout
        older = drive(built, "--enqueue", 8, 100, 1, 0, driver=True, RECORDING_SM="75")
        assert older.returncode == 1
        assert "SM 80 90" in older.stdout
        assert "launch" not in older.stdout

    @pytest.mark.gpu
    def test_enqueue_on_a_gpu(self, built: Path) -> None:
        done = drive(built, "--gpu")
        if done.returncode == 77:
            pytest.skip(done.stdout.strip())
        assert done.returncode == 0, done.stdout

    def test_tensorrts_registry_loads_it_and_makes_the_plugin(self, built: Path) -> None:
        """In a process of its own, which may hold another plugin of this name."""
        if reason := nvidia_bindings.missing():
            pytest.skip(reason)
        done = subprocess.run(
            [sys.executable, "-c", REGISTRY, str(built / "libstca_tensorrt.so")],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == {
            "found": ["TargetHistoryAttention", "1", "stca", ["scale"]],
            "made": True,
            "without_scale": False,
            "after_unloading": False,
        }
        assert "the node needs a finite attribute scale" in done.stdout + done.stderr


REGISTRY = """
import json, sys
import numpy as np
from support import nvidia_bindings
trt = nvidia_bindings.load()
registry = trt.get_plugin_registry()
library = registry.load_library(sys.argv[1])
creator = registry.get_creator("TargetHistoryAttention", "1", "stca")
found = [creator.name, creator.plugin_version, creator.plugin_namespace, [f.name for f in creator.field_names]]
def make(*fields):
    return creator.create_plugin("node", trt.PluginFieldCollection(list(fields)), trt.TensorRTPhase.BUILD) is not None
made = make(trt.PluginField("scale", np.array([0.125], dtype=np.float32), trt.PluginFieldType.FLOAT32))
without_scale = make()
registry.deregister_library(library)
after = registry.get_creator("TargetHistoryAttention", "1", "stca") is not None
print(json.dumps({"found": found, "made": made, "without_scale": without_scale, "after_unloading": after}))
"""
