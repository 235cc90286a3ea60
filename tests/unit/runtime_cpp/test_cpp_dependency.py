"""The C++ runtime as others depend on it: static, in C++20, from C alone, by pkg-config, and inside another project."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from building import GOLDEN, HERE, MISSING, REPOSITORY, command, configure

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to build the C++ runtime")
SOURCE = REPOSITORY / "runtime" / "cpp"


WARNINGS = "-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Werror"


@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++: without it, GCC alone is tried")
@pytest.mark.parametrize(("shared", "standard"), [("ON", 17), ("OFF", 20)])
def test_clang_builds_it_without_a_warning(tmp_path: Path, shared: str, standard: int) -> None:
    settings = ["-DCMAKE_CXX_COMPILER=clang++", f"-DCMAKE_CXX_STANDARD={standard}", f"-DCMAKE_CXX_FLAGS=-O0 {WARNINGS}"]
    configure(SOURCE, tmp_path / "build", f"-DSTCA_SHARED={shared}", *settings)
    command("cmake", "--build", tmp_path / "build", "--parallel", "2")
    server = REPOSITORY / "examples" / "cpp_server" / "main.cpp"
    flags = [f"-std=c++{standard}", "-fsyntax-only", "-I", SOURCE / "include"]
    command("clang++", *WARNINGS.split(), *flags, server)


@pytest.mark.parametrize("standard", [17, 20])
def test_a_program_that_embeds_it_compiles_without_a_warning(standard: int) -> None:
    """With GCC or whatever `c++` is; the library itself is held to the same wherever STCA_WERROR is set."""
    flags = [f"-std=c++{standard}", "-fsyntax-only", "-I", SOURCE / "include"]
    command("c++", *WARNINGS.split(), *flags, REPOSITORY / "examples" / "cpp_server" / "main.cpp")


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The static library, in C++20, without a warning, installed."""
    folder = tmp_path_factory.mktemp("static")
    settings = ("-DSTCA_SHARED=OFF", "-DSTCA_WERROR=ON", "-DCMAKE_CXX_STANDARD=20", "-DCMAKE_CXX_FLAGS=-O0")
    configure(SOURCE, folder / "build", *settings)
    command("cmake", "--build", folder / "build", "--parallel", "2")
    command("cmake", "--install", folder / "build", "--prefix", folder / "installed")
    return folder / "installed"


def test_a_program_in_c_links_the_static_library(static: Path, tmp_path: Path) -> None:
    configure(HERE / "consumer", tmp_path, f"-DCMAKE_PREFIX_PATH={static}")
    command("cmake", "--build", tmp_path)
    assert command(tmp_path / "consumer", GOLDEN / "log").startswith("abi 1, weights ")


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="needs pkg-config")
def test_pkg_config_says_how(static: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(static, moved, symlinks=True)
    (found,) = moved.rglob("stca_runtime.pc")
    environment = {**os.environ, "PKG_CONFIG_PATH": str(found.parent)}
    flags = command("pkg-config", "--cflags", "--libs", "stca_runtime", env=environment).split()
    command("cc", "-std=c99", HERE / "consumer" / "consumer.c", *flags, "-o", tmp_path / "consumer")
    assert command(tmp_path / "consumer", GOLDEN / "log").startswith("abi 1, weights ")


def test_another_project_keeps_its_settings(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.21)\nproject(parent LANGUAGES C)\n"
        f"add_subdirectory({SOURCE} stca)\n"
        "get_target_property(type stca_runtime TYPE)\n"
        'message(STATUS "type ${type}, shared ${BUILD_SHARED_LIBS}, build ${CMAKE_BUILD_TYPE}")\n'
    )
    output = command("cmake", "-S", tmp_path, "-B", tmp_path / "build")
    assert "type STATIC_LIBRARY, shared , build \n" in output
    shared = command("cmake", "-S", tmp_path, "-B", tmp_path / "build2", "-DBUILD_SHARED_LIBS=ON")
    assert "type SHARED_LIBRARY, shared ON, build \n" in shared
    ours = [
        line.split(":")[0]
        for line in (tmp_path / "build" / "CMakeCache.txt").read_text().splitlines()
        if ":" in line and not line.startswith(("//", "#", "_", "CMAKE_", "parent_", "stca_runtime_", "FIND_PACKAGE_"))
    ]
    assert [name for name in ours if not name.startswith("STCA_")] == []
    installs = (tmp_path / "build" / "stca" / "cmake_install.cmake").read_text()
    assert "file(INSTALL" not in installs
