"""Triton kernels compiled ahead of time: PTX whose parameters are exactly the kernel's own, and what it costs to run.

A TensorRT engine embeds this PTX, and the C++ plugin ships it, so neither needs Triton, Python or a compiler later. No
GPU is needed to build it. PTX for SM 90, 100 and 120 uses instructions of that architecture alone and runs nowhere
else; PTX for SM 80 runs on every later GPU and is the fallback (`artifact_sm`).

`python -m stca.plugins.artifacts --out DIR` builds the artifacts for every SM, assembles each one, and writes them with
an index for the C++ plugin and a table of registers, spills and shared memory.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stca.errors import BuildError
from stca.plugins import tiling
from stca.plugins.devices import ARTIFACT_SMS, device_for
from stca.plugins.spec import ARGUMENTS, PLAIN
from stca.plugins.tiling import Shape, Sizes, Tile

# Drivers since CUDA 12.8 load it, and no older version names every SM; Triton's default is newer than many drivers.
PTX_VERSION: Final = 87
FALLBACK_SM: Final = 80
# Pointers are promised to be aligned to this many bytes, without which no load is wider than one element.
ALIGNMENT: Final = 16
# Of `finish_kernel`: few rows a block, because it waits for memory; eight parts of each in flight.
FINISH: Final = Tile(16, 64, 0, 1024, 4, 2)
_FINISH_PARTS: Final = 8

_TRITON_TYPES: Final = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Artifact:
    """One compiled kernel and all that a launch needs besides its grid and its arguments.

    Attributes:
        kernel: entry point.
        ptx: source for the driver; its parameters are tensor inputs, int32 values, tensor outputs, and nothing else.
        target: "sm_80", "sm_90a", …: the architecture the PTX is for.
        threads: block size; the other two dimensions are 1.
        shared: dynamic shared memory, bytes.
        parameters: "u64" (pointer) or "u32" (int32), in order.
        scratch: bytes of memory for each block, whose address is one more parameter; TensorRT passes none.
    """

    kernel: str
    ptx: str
    target: str
    threads: int
    shared: int
    parameters: tuple[str, ...]
    scratch: int = 0


@dataclass(frozen=True)
class Resources:
    """What `ptxas` says of an artifact. Registers are per thread; spills are bytes per thread."""

    registers: int
    spill_stores: int
    spill_loads: int
    static_shared: int


def artifact_sm(sm: int) -> int:
    """The SM whose artifacts a GPU of compute capability `sm` loads: its own, or the portable ones.

    Raises:
        BuildError: for a GPU before SM 80.
    """
    if sm in ARTIFACT_SMS:
        return sm
    if sm > FALLBACK_SM:
        return FALLBACK_SM
    raise BuildError(
        f"no kernel for SM {sm}: supported are {', '.join(map(str, ARTIFACT_SMS))}, and later ones as SM {FALLBACK_SM}"
    )


def attend_constants(shape: Shape, tile: Tile, scale: float, split: bool, *, upcast: bool = False) -> dict[str, Any]:
    """Compile-time arguments of `attend_kernel`; `upcast` is for Triton's interpreter alone."""
    return {
        **({} if split else {"stats": None}),
        "SCALE": scale,
        "HEADS": shape.heads,
        "KEY_HEADS": shape.key_heads,
        "D": shape.depth,
        "D_V": shape.value_depth,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d,
        "BLOCK_DV": tile.block_dv,
        "SPLIT": split,
        "TIED": tiling.is_tied(shape, tile),
        "UPCAST": upcast,
    }


def bulk_constants(
    shape: Shape, tile: Tile, scale: float, *, upcast: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments of `attend_bulk_kernel` and of `finish_kernel`; `upcast` is for the interpreter alone."""
    heads = {"HEADS": shape.heads, "KEY_HEADS": shape.key_heads, "D": shape.depth, "D_V": shape.value_depth}
    both = {"SCALE": scale, **heads, "UPCAST": upcast}
    block = {"BLOCK_M": FINISH.block_m, "BLOCK_N": FINISH.block_n, "BLOCK_S": _FINISH_PARTS}
    rows = min(tile.block_m, tiling.BULK_ROWS)
    stacked = {"BLOCK_M": rows, "TILES": tile.block_m // rows, "BLOCK_N": tile.block_n}
    return {**both, **stacked}, {**both, "WHOLE": tile.block_n, **block}


def combine_constants(value_depth: int) -> dict[str, Any]:
    """Compile-time arguments of `combine_kernel`."""
    parts, width, _ = _combine_block(value_depth)
    return {"D_V": value_depth, "BLOCK_S": parts, "BLOCK_DV": width}


def _combine_block(value_depth: int) -> tuple[int, int, int]:
    return tiling.combine_block(Shape(1, 1, value_depth, value_depth, "float32"))


@functools.cache
def compile_attend(shape: Shape, tile: Tile, sm: int, scale: float, split: bool) -> Artifact:
    """`attend_kernel` for one tile.

    Parameters of the result: `query, key, value, target_offsets, history_offsets, history_lengths, n_targets, n_tokens,
    n_requests, out` and, with `split`, `stats`; for a shape with segments also `segment_offsets, segment_bias` behind
    the other tensors and `n_segments` behind the other numbers. Grid: `attend_grid`.

    Args:
        shape: head counts, head sizes and dtype, all compiled in.
        tile: block sizes, warps and stages.
        sm: one of `ARTIFACT_SMS`.
        scale: factor on the logits, compiled in.
        split: write float32 parts and their statistics, for `combine_kernel` to join.

    Raises:
        BuildError: when Triton is missing, runs as an interpreter, or left a parameter that TensorRT would not pass.
    """
    if tile.bulk:
        raise BuildError("a tile that is copied in bulk needs scratch memory, which TensorRT does not bring")
    element = _TRITON_TYPES[shape.dtype]
    pointers = {"query": element, "key": element, "value": element, "out": "fp32" if split else element}
    if split:
        pointers["stats"] = "fp32"
    given = ARGUMENTS if shape.segments else PLAIN
    return _compile(
        "attend_kernel",
        pointers=pointers,
        unaligned={a.name: "fp32" if a.kind == "logits" else "i32" for a in given if a.kind != "values"},
        scalars=("n_targets", "n_tokens", "n_requests", *(["n_segments"] if shape.segments else [])),
        constants=attend_constants(shape, tile, scale, split),
        sm=sm,
        warps=tile.warps,
        stages=tile.stages,
    )


@functools.cache
def compile_combine(value_depth: int, dtype: str, sm: int) -> Artifact:
    """`combine_kernel`: parameters `partial_out, partial_stats, n_rows, n_parts, out`; grid `(N_t * H,)`.

    Raises:
        BuildError: as for `compile_attend`.
    """
    return _compile(
        "combine_kernel",
        pointers={"partial_out": "fp32", "partial_stats": "fp32", "out": _TRITON_TYPES[dtype]},
        unaligned={},
        scalars=("n_rows", "n_parts"),
        constants=combine_constants(value_depth),
        sm=sm,
        warps=_combine_block(value_depth)[2],
        stages=1,
    )


@functools.cache
def compile_bulk(shape: Shape, tile: Tile, sm: int, scale: float) -> tuple[Artifact, Artifact]:
    """`attend_bulk_kernel` and `finish_kernel` for one tile, to be looked at: nothing here launches them.

    Raises:
        BuildError: as for `compile_attend`.
    """
    element = _TRITON_TYPES[shape.dtype]
    pointers, counts = dict.fromkeys(("query", "key", "value"), element), ("n_targets", "n_tokens", "n_requests")
    attend_values, finish_values = bulk_constants(shape, tile, scale)
    structure = {a.name: "i32" for a in PLAIN if a.kind == "structure"}
    common: dict[str, Any] = {"unaligned": structure, "sm": sm, "module": "kernels_bulk"}
    attend = _compile(
        "attend_bulk_kernel",
        pointers={**pointers, "out": "fp32", "stats": "fp32"},
        scalars=counts,
        constants=attend_values,
        warps=tile.warps,
        stages=tile.stages,
        **common,
    )
    finish = _compile(
        "finish_kernel",
        pointers={**pointers, "partial_out": "fp32", "partial_stats": "fp32", "out": element},
        scalars=(*counts, "n_parts"),
        constants=finish_values,
        warps=FINISH.warps,
        stages=FINISH.stages,
        **common,
    )
    return attend, finish


def attend_grid(n_targets: Any, n_requests: Any, shape: Shape, tile: Tile, parts: int) -> tuple[Any, int, int]:
    """Blocks of `attend_kernel`; the two counts may be integers or TensorRT's symbolic expressions."""
    value_tiles = -(-shape.value_depth // tile.block_dv)
    return n_targets * shape.group // tile.block_m + n_requests, shape.key_heads * value_tiles, parts


def ordered_tiles(shape: Shape, sizes: Sizes, parts: int, sm: int, shared_limit: int) -> list[Tile]:
    """Every tile that the model expects to fit, best first: a measured one if there is one, then by the cost model."""
    device = device_for(sm)
    candidates = sorted(
        tiling.tiles(shape, sm, shared_limit),
        key=lambda tile: tiling.seconds(shape, sizes, tile, parts, device),
    )
    if candidates and (plan := tiling.choose(shape, sizes, device, shared_limit)).measured and plan.tile in candidates:
        candidates.insert(0, plan.tile)
    return list(dict.fromkeys(candidates))


def best_tiles(
    shape: Shape, scale: float, sizes: Sizes, parts: int, sm: int, shared_limit: int, count: int
) -> list[Tile]:
    """Up to `count` tiles worth running, in the order of `ordered_tiles`.

    Compiles them, because only then is it sure that they keep to `shared_limit` bytes of shared memory.

    Raises:
        BuildError: when none does.
    """
    found: list[Tile] = []
    for tile in ordered_tiles(shape, sizes, parts, sm, shared_limit):
        if len(found) < count and compile_attend(shape, tile, sm, scale, parts > 1).shared <= shared_limit:
            found.append(tile)
    if not found:
        raise BuildError(
            f"no tile of {shape} keeps to {shared_limit} bytes of shared memory on SM {sm}; raise the limit"
        )
    return found


def _compile(
    kernel: str,
    *,
    pointers: dict[str, str],
    unaligned: dict[str, str],
    scalars: tuple[str, ...],
    constants: dict[str, Any],
    sm: int,
    warps: int,
    stages: int,
    module: str = "kernels",
) -> Artifact:
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise BuildError("compiling the kernels needs Triton: pip install triton") from error
    function = getattr(importlib.import_module(f"stca.plugins.{module}"), kernel)
    if not isinstance(function, triton.JITFunction):
        raise BuildError("Triton runs as an interpreter: unset TRITON_INTERPRET to compile kernels")
    if sm not in ARTIFACT_SMS:
        raise BuildError(f"no artifact for SM {sm}: supported are {', '.join(map(str, ARTIFACT_SMS))}")
    types = {
        **{name: f"*{element}" for name, element in (pointers | unaligned).items()},
        **dict.fromkeys(scalars, "i32"),
    }
    source = ASTSource(
        function,
        signature={name: types.get(name, "constexpr") for name in function.arg_names},
        constexprs=dict.fromkeys(set(function.arg_names) - types.keys()) | constants,
        attrs={(function.arg_names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in pointers},
    )
    options = {"num_warps": warps, "num_stages": stages, "ptx_version": PTX_VERSION, "enable_fp_fusion": True}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # no paths of this machine inside an engine
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    metadata = compiled.metadata
    parameters = tuple("u64" if types[name][0] == "*" else "u32" for name in function.arg_names if name in types)
    scratch = metadata.global_scratch_size
    if (scratch and module != "kernels_bulk") or metadata.profile_scratch_size or metadata.num_ctas != 1:
        raise BuildError(f"{kernel} for SM {sm} wants scratch memory or a cluster, which TensorRT does not launch with")
    parameters += ("u64",) * (scratch > 0)
    ptx = strip_hidden_parameters(compiled.asm["ptx"], metadata.name, parameters)
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    return Artifact(metadata.name, ptx, target[1], metadata.num_warps * 32, metadata.shared, parameters, scratch)


def strip_hidden_parameters(ptx: str, kernel: str, parameters: tuple[str, ...]) -> str:
    """Remove the trailing scratch pointers that Triton adds to every kernel, after making sure that nothing reads them.

    TensorRT passes what the plugin declares. It is said to pad the rest with nulls; this does not rely on it.

    Args:
        ptx: one entry point.
        kernel: its name.
        parameters: "u64" or "u32" for each parameter that may stay, in order.

    Raises:
        BuildError: when the entry differs from `parameters` in number or type, or reads a hidden parameter.
    """
    entry = re.search(rf"(\.entry\s+{kernel}\s*\()(.*?)(\s*\))", ptx, re.DOTALL)
    if entry is None:
        raise BuildError(f"the PTX has no entry point {kernel}")
    declared = [text.strip() for text in entry[2].split(",")]
    types = [text.split()[1].lstrip(".") for text in declared]
    kept, hidden = declared[: len(parameters)], declared[len(parameters) :]
    if tuple(types[: len(parameters)]) != parameters or len(hidden) > 2 or set(types[len(parameters) :]) - {"u64"}:
        raise BuildError(
            f"{kernel} has parameters {', '.join(types)}; expected {', '.join(parameters)} and two of scratch"
        )
    body = ptx[entry.end() :]
    for text in hidden:
        name = text.split()[-1]
        if re.search(rf"\b{re.escape(name)}\b", body):
            raise BuildError(f"{kernel} reads hidden parameter {name}: it needs scratch memory, TensorRT gives none")
    return ptx[: entry.start()] + entry[1] + "\n\t" + ",\n\t".join(kept) + entry[3] + body


def find_ptxas(target: str) -> str:
    """The assembler: the CUDA toolkit's when it is on the PATH, else the one that comes with Triton.

    Raises:
        BuildError: when there is neither.
    """
    if found := shutil.which("ptxas"):
        return found
    try:
        import triton.backends.nvidia as backend
    except ImportError as error:
        raise BuildError("ptxas not found: install the CUDA toolkit, or pip install triton") from error
    blackwell = int(re.sub(r"\D", "", target)) >= 100
    return str(Path(backend.__file__).parent / "bin" / ("ptxas-blackwell" if blackwell else "ptxas"))


def assemble(artifact: Artifact, cubin: Path | None = None) -> Resources:
    """Run `ptxas` over an artifact; the machine code goes to `cubin` if given.

    Raises:
        BuildError: with the assembler's first complaint.
    """
    with tempfile.TemporaryDirectory(prefix="stca-ptx-") as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(artifact.ptx)
        output = str(cubin or os.devnull)
        command = [find_ptxas(artifact.target), "-v", f"--gpu-name={artifact.target}", str(source), "-o", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = done.stderr.strip().splitlines()[0]
        raise BuildError(f"ptxas refuses {artifact.kernel} for {artifact.target}: {complaint}")

    def count(pattern: str) -> int:
        found = re.search(pattern, done.stderr)
        return int(found[1]) if found else 0

    return Resources(
        registers=count(r"Used (\d+) registers"),
        spill_stores=count(r"(\d+) bytes spill stores"),
        spill_loads=count(r"(\d+) bytes spill loads"),
        static_shared=count(r"(\d+) bytes smem"),
    )
