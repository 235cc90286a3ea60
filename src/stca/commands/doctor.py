"""`stca doctor`: what is installed here, what will work, and what to do for the rest."""

from __future__ import annotations

import argparse
import ctypes.util
import importlib.metadata
import importlib.util
import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from stca.commands.options import emit
from stca.commands.progress import progress_on_stderr
from stca.errors import BuildError, UsageError
from stca.plugins import plugin_library
from stca.tensorrt_flavours import FLAVOURS

HELP = "what is installed here, what will work, and what to do for the rest"
EXAMPLES = ("stca doctor", "stca doctor --prove --out proof.json")

# Packages that are looked for, by the extra that brings them.
_PACKAGES: Final = {
    "export": ("torch", "onnx", "onnxscript", "onnx-ir", "safetensors", "ml_dtypes", "networkx"),
    "kernels": ("triton", "cuda-bindings"),
    "report": ("jinja2", "matplotlib"),
    "cli": ("shtab",),
    "sign": ("cryptography",),
    "serve": ("starlette", "uvicorn", "grpcio", "protobuf", "prometheus_client"),
}
_TOOLS: Final = {
    "g++ or clang++": (("g++", "clang++"), "apt-get install g++"),
    "cmake": (("cmake",), "apt-get install cmake"),
    "nvcc": (("nvcc",), "install the CUDA toolkit (only to write kernels; nothing here needs it)"),
}


@dataclass(frozen=True)
class Fact:
    """One thing: `found` is its version or place, None where it is missing; `todo` is then what helps."""

    name: str
    found: str | None
    todo: str | None = None


@dataclass(frozen=True)
class Ability:
    """One thing to do with stca: `missing` names the facts that stand in the way."""

    name: str
    works: bool
    missing: tuple[str, ...] = ()
    todo: tuple[str, ...] = ()


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("--prove", action="store_true", help="run all that only a GPU can prove, as far as it is here")
    p.add_argument("--out", metavar="FILE", help="with --prove: also write the JSON here, to send back")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code: 1 when a proof failed."""
    if args.out and not args.prove:
        raise UsageError("--out: is of --prove; --json prints the rest")
    facts, gpus = look()
    abilities = judge(facts)
    data: dict[str, Any] = {
        "machine": {"system": platform.platform(), "python": platform.python_version(), "gpus": gpus},
        "found": [asdict(fact) for fact in facts],
        "works": [asdict(ability) for ability in abilities],
    }
    lines = [f"{fact.name:<20} {fact.found or f'missing: {fact.todo}'}" for fact in facts]
    lines += ["", *(_said(ability) for ability in abilities)]
    if args.prove:
        from stca.bundle import scratch
        from stca.checks.unproven import prove
        from stca.report.demo import shipped_checkpoint

        with scratch("stca-prove") as folder:
            data["proofs"] = prove(needs(facts), folder, shipped_checkpoint(), progress=progress_on_stderr())
        lines += ["", *(f"{proof['name']}: {proof['status']}" for proof in data["proofs"])]
    if args.out:
        Path(args.out).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        lines.append(f"{args.out}: written")
    emit(args, data, "\n".join(lines))
    return int(any(proof["status"].startswith("failed") for proof in data.get("proofs", ())))


def look() -> tuple[list[Fact], list[dict[str, Any]]]:
    """What is installed, without loading a large library, and this machine's GPUs."""
    facts = [_package(name, f"pip install 'stca[{extra}]'") for extra, names in _PACKAGES.items() for name in names]
    facts += [_tool(name, *of) for name, of in _TOOLS.items()]
    facts.append(_ptxas())
    facts.append(_headers("TensorRT headers", plugin_library.tensorrt_headers))
    facts.append(_headers("CUDA headers", plugin_library.cuda_headers))
    driver, gpus = _driver()
    facts.append(driver)
    old = [gpu for gpu in gpus if gpu["sm"] < 80]
    told = ", ".join(f"{gpu['index']}: {gpu['name']}, SM {gpu['sm']}" for gpu in gpus if gpu["sm"] >= 80)
    todo = f"SM {old[0]['sm']} is too old, the kernels need SM 80" if old else "no GPU"
    facts.append(Fact("gpu", told or None, todo))
    facts += _backends()
    facts.append(_torch_cuda(facts))
    return facts, gpus


def _package(name: str, todo: str) -> Fact:
    try:
        return Fact(name, importlib.metadata.version(name), todo)
    except importlib.metadata.PackageNotFoundError:
        return Fact(name, None, todo)


def _tool(name: str, programs: Sequence[str], todo: str) -> Fact:
    return Fact(name, next((found for program in programs if (found := shutil.which(program))), None), todo)


def _ptxas() -> Fact:
    from stca.plugins.aot import find_ptxas

    try:
        return Fact("ptxas", find_ptxas("sm_90a"))
    except BuildError as e:
        return Fact("ptxas", None, str(e))


def _headers(name: str, find: Callable[[], str]) -> Fact:
    try:
        return Fact(name, find())
    except BuildError as e:
        return Fact(name, None, str(e))


def _driver() -> tuple[Fact, list[dict[str, Any]]]:
    from stca.plugins import driver as nvidia

    try:
        api = nvidia.driver()
        version = int(nvidia.check(api.cuDriverGetVersion()))
        gpus = []
        for index in range(int(nvidia.check(api.cuDeviceGetCount()))):
            handle = nvidia.check(api.cuDeviceGet(index))
            name = nvidia.check(api.cuDeviceGetName(96, handle)).split(b"\0")[0].decode()
            memory = int(nvidia.check(api.cuDeviceTotalMem(handle)))
            gpus.append({"index": index, "name": name, "sm": nvidia.device_sm(index), "memory_bytes": memory})
    except BuildError as e:
        return Fact("NVIDIA driver", None, str(e)), []
    return Fact("NVIDIA driver", f"CUDA {version // 1000}.{version % 1000 // 10}"), gpus


def _backends() -> list[Fact]:
    from stca.backends import BACKENDS
    from stca.runtime.backend import server_of

    facts = []
    for name in BACKENDS:
        try:
            version = server_of(name).version()
            lost = _library_of(name)
            facts.append(Fact(name, None if lost else version, lost))
        except BuildError as e:
            facts.append(Fact(name, None, str(e)))
    import onnxruntime

    cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    facts.append(Fact("onnxruntime-cuda", "CUDAExecutionProvider" if cuda else None, "pip install onnxruntime-gpu"))
    return facts


# Where a backend's own libraries lie: a package, or what the loader of the system finds.
_LIBRARIES: Final = {"tensorrt": ("tensorrt_libs", "nvinfer"), "tensorrt-rtx": ("tensorrt_rtx_libs", "tensorrt_rtx")}


def _library_of(name: str) -> str | None:
    """What to do where the Python bindings are here and the library behind them is not; None where it is."""
    if name not in _LIBRARIES:
        return None
    package, library = _LIBRARIES[name]
    if importlib.util.find_spec(package) or ctypes.util.find_library(library):
        return None
    return f"the bindings are here, lib{library}.so is not: {FLAVOURS[name].install}"


def _torch_cuda(facts: Sequence[Fact]) -> Fact:
    """Whether torch sees the GPU; it is loaded only where there is one to see."""
    found = {fact.name: fact for fact in facts}
    if found["torch"].found is None or found["gpu"].found is None:
        return Fact("torch-cuda", None, found["torch"].todo if found["torch"].found is None else found["gpu"].todo)
    import torch

    version = torch.version.cuda if torch.cuda.is_available() else None
    return Fact("torch-cuda", version and f"CUDA {version}", "install a CUDA build of torch")


# What one wants to do, and what it takes.
_PLUGIN_LIBRARY: Final = ("g++ or clang++", "cmake", "TensorRT headers", "CUDA headers", "triton", "ptxas")
_TENSORRT: Final = ("gpu", "tensorrt", "cuda-bindings", "torch", "onnx")
_ABILITIES: Final = {
    "export, verify": _PACKAGES["export"],
    "serve and bench on a CPU": ("onnxruntime",),
    "stca serve: HTTP and gRPC": ("onnxruntime", *_PACKAGES["serve"]),
    "serve on a GPU with ONNX Runtime": ("gpu", "onnxruntime-cuda"),
    "build and serve TensorRT engines": _TENSORRT,
    "build TensorRT engines with quick plugins": (*_TENSORRT, "triton", "ptxas"),
    "build TensorRT engines with the plugin": (*_TENSORRT, *_PLUGIN_LIBRARY),
    "build TensorRT-RTX engines": ("tensorrt-rtx", "torch", "onnx"),
    "build TensorRT-RTX engines with the plugin": ("tensorrt-rtx", "torch", "onnx", *_PLUGIN_LIBRARY),
    "serve TensorRT-RTX engines": ("gpu", "tensorrt-rtx", "cuda-bindings"),
    "run the kernels from torch": ("gpu", "torch-cuda", "triton"),
    "compile the kernels ahead of time": ("triton", "ptxas"),
    "build the C++ runtime": ("g++ or clang++", "cmake"),
    "build the C++ plugin": _PLUGIN_LIBRARY,
    "reports": ("jinja2", "matplotlib", "onnx"),
    "completion": ("shtab",),
    "signed bundles": ("cryptography",),
}


def judge(facts: Sequence[Fact]) -> list[Ability]:
    """What will work with these facts, and what to do for the rest."""
    found = {fact.name: fact for fact in facts}
    abilities = []
    for name, takes in _ABILITIES.items():
        missing = tuple(need for need in takes if found[need].found is None)
        todo = tuple(dict.fromkeys(str(found[need].todo) for need in missing))
        abilities.append(Ability(name, not missing, missing, todo))
    return abilities


def needs(facts: Sequence[Fact]) -> Mapping[str, str | None]:
    """For each fact why it is missing; None where it is there."""
    return {fact.name: None if fact.found else str(fact.todo) for fact in facts}


def _said(ability: Ability) -> str:
    return f"{'yes' if ability.works else 'no':<4} {ability.name}" + (
        f": {'; '.join(ability.todo)}" if ability.todo else ""
    )
