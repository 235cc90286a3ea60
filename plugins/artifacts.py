"""All kernels for a list of shapes and SMs as files: PTX, an index for the C++ plugin, and what each kernel costs.

The work of `python -m stca.plugins.artifacts --out DIR`. It writes:

* one `.ptx` file per kernel;
* `artifacts.inc`, which the C++ plugin compiles in;
* `artifacts.json`: everything about each kernel, with the SHA-256 of its file;
* `artifacts.md`: registers, spills and shared memory, as a table.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from stca.errors import BuildError, StcaError
from stca.plugins import aot, tiling
from stca.plugins.devices import ARTIFACT_SMS, device_for
from stca.plugins.tiling import DTYPE_BYTES, PORTABLE_SHARED_LIMIT, Shape, Sizes, Tile

# (width d, heads h) of the models that the default list serves, both forms of each.
_MODELS: Final = ((256, 8), (512, 8), (1024, 16))
# What a kernel is chosen for: few targets and many, over a production history; and from how many targets a request on
# it serves. Between 8 and 300 the change is at their geometric mean.
_TYPICAL: Final = (
    (0, Sizes(targets=8, tokens=10_000, requests=1)),
    (48, Sizes(targets=300, tokens=10_000, requests=1)),
)
_COLUMNS: Final = ("kernel", "SM", "registers", "spilled bytes", "shared bytes", "threads", "PTX bytes")


@dataclass(frozen=True)
class Kernel:
    """One file: its place in the index, and the artifact."""

    file: str
    fields: dict[str, Any]
    artifact: aot.Artifact
    resources: aot.Resources


def default_shapes(dtype: str) -> list[tuple[Shape, float]]:
    """Shape and scale of each model in both forms; key and value may be tied in the absorbed one."""
    shapes = []
    for width, heads in _MODELS:
        head = width // heads
        scale = 1 / math.sqrt(head)
        shapes.append((Shape(heads, heads, head, head, dtype), scale))
        shapes.append((Shape(heads, 1, width, width, dtype, tied=True), scale))
    return shapes


def parse_shape(text: str, dtype: str, tied: bool, segments: bool = False) -> tuple[Shape, float]:
    """`H,H_k,D,D_v[,scale]`, where the scale left out is `1 / sqrt(D)`.

    Raises:
        BuildError: naming what is expected.
    """
    parts = text.split(",")
    try:
        heads, key_heads, depth, value_depth = map(int, parts[:4])
        scale = float(parts[4]) if len(parts) > 4 else 1 / math.sqrt(depth)
        return Shape(heads, key_heads, depth, value_depth, dtype, tied, segments), scale
    except ValueError as error:
        raise BuildError(f"--shape {text}: expected H,H_k,D,D_v[,scale] ({error})") from error


def build(shapes: Sequence[tuple[Shape, float]], sms: Sequence[int], shared_limit: int) -> Iterator[Kernel]:
    """Compile and assemble every kernel the shapes need, whole and in parts, for every SM.

    A shape that is tied gets kernels for both cases, key and value one tensor and not: only a launch shows which it is.

    Raises:
        BuildError: when one does not compile or assemble.
    """
    combines = sorted({(shape.value_depth, shape.dtype) for shape, _ in shapes})
    for sm in sms:
        for shape, scale in shapes:
            untied = replace(shape, tied=False)
            variants = [untied, shape] if shape.tied else [untied]
            for variant, (targets, sizes) in itertools.product(variants, _TYPICAL):
                tile = _tile(variant, scale, sizes, sm, shared_limit)
                if variant.tied and not tiling.is_tied(variant, tile):
                    continue  # the tile reads a token twice anyway: the untied kernel does the same
                for parts in (False, True):
                    artifact = aot.compile_attend(variant, tile, sm, scale, parts)
                    fields = {**asdict(variant), "scale": scale, "parts": parts, "sm": sm, **asdict(tile)}
                    yield _kernel(artifact, {**fields, "least_rows": targets * shape.group})
        for value_depth, dtype in combines:
            artifact = aot.compile_combine(value_depth, dtype, sm)
            yield _kernel(artifact, {"dtype": dtype, "value_depth": value_depth, "sm": sm})


def _tile(shape: Shape, scale: float, sizes: Sizes, sm: int, shared_limit: int) -> Tile:
    """The best for these sizes that keeps to the limit, whole and in parts."""
    parts = tiling.choose(shape, sizes, device_for(sm), shared_limit).parts
    for tile in aot.ordered_tiles(shape, sizes, parts, sm, shared_limit):
        if all(aot.compile_attend(shape, tile, sm, scale, cut).shared <= shared_limit for cut in (False, True)):
            return tile
    raise BuildError(f"no tile of {shape} keeps to {shared_limit} bytes; raise --shared-limit")


def _kernel(artifact: aot.Artifact, fields: dict[str, Any]) -> Kernel:
    name = f"{artifact.kernel.removesuffix('_kernel')}_{fields['dtype']}_v{fields['value_depth']}"
    if "heads" in fields:
        name += "_d{depth}_h{heads}_k{key_heads}_x{scale:.4g}_m{block_m}_n{block_n}_w{warps}_s{stages}".format(**fields)
        name += "_tied" * fields["tied"] + "_segments" * fields["segments"] + "_parts" * fields["parts"]
    return Kernel(f"{name}_sm{fields['sm']}.ptx", fields, artifact, _resources(artifact))


@functools.cache
def _resources(artifact: aot.Artifact) -> aot.Resources:
    return aot.assemble(artifact)


def write(kernels: Sequence[Kernel], out: Path) -> None:
    """Write the files; see the module's documentation."""
    out.mkdir(parents=True, exist_ok=True)
    for kernel in kernels:
        (out / kernel.file).write_text(kernel.artifact.ptx)
    (out / "artifacts.inc").write_text("".join(_index_line(i, kernel) for i, kernel in enumerate(kernels)))
    listed = [_record(kernel) for kernel in kernels]
    versions = {"version": 1, "triton": _triton_version(), "ptx_version": aot.PTX_VERSION, "ptxas": _ptxas_version()}
    (out / "artifacts.json").write_text(json.dumps({**versions, "kernels": listed}, indent=1) + "\n")
    (out / "artifacts.md").write_text(table(kernels))


def table(kernels: Sequence[Kernel]) -> str:
    """The kernels' costs as a Markdown table."""
    rows = [f"| {' | '.join(_COLUMNS)} |", f"|{' --- |' * len(_COLUMNS)}"]
    for kernel in {kernel.file: kernel for kernel in kernels}.values():  # one may serve few targets and many
        artifact, resources = kernel.artifact, kernel.resources
        spilled = resources.spill_stores + resources.spill_loads
        name = kernel.file.removesuffix(".ptx").rsplit("_sm", 1)[0]
        shared = artifact.shared + resources.static_shared
        cells = (name, artifact.target, resources.registers, spilled, shared, artifact.threads, len(artifact.ptx))
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


def _record(kernel: Kernel) -> dict[str, Any]:
    artifact = kernel.artifact
    return {
        "file": kernel.file,
        "sha256": hashlib.sha256(artifact.ptx.encode()).hexdigest(),
        "kernel": artifact.kernel,
        "target": artifact.target,
        "threads": artifact.threads,
        "shared": artifact.shared,
        "parameters": artifact.parameters,
        **kernel.fields,
        **asdict(kernel.resources),
    }


def _index_line(number: int, kernel: Kernel) -> str:
    """What `plugins/cpp/artifacts.cc` reads, in the order of its structs."""
    f, warps = kernel.fields, kernel.artifact.threads // 32
    element = f"k{f['dtype'].upper()}"
    if kernel.artifact.kernel == "combine_kernel":
        values = (element, f["value_depth"], f["sm"], warps, kernel.artifact.shared)
        return f'STCA_COMBINE({number}, "{kernel.file}", {", ".join(map(str, values))})\n'
    scale = f"{f['scale']!r}F"
    flags = (str(f[name]).lower() for name in ("tied", "parts"))
    tile = (
        f["sm"],
        f["block_m"],
        f["block_n"],
        f["block_dv"],
        warps,
        f["stages"],
        kernel.artifact.shared,
        f["least_rows"],
    )
    shape = (element, f["heads"], f["key_heads"], f["depth"], f["value_depth"], str(f["segments"]).lower())
    return f'STCA_ATTEND({number}, "{kernel.file}", {", ".join(map(str, (*shape, scale, *flags, *tile)))})\n'


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _ptxas_version() -> str:
    said = subprocess.run([aot.find_ptxas("sm_80"), "--version"], capture_output=True, text=True, check=True).stdout
    return said.strip().splitlines()[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m stca.plugins.artifacts", description="Build the kernels ahead of time."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument("--shape", action="append", metavar="H,H_k,D,D_v[,SCALE]", help="instead of the default list")
    parser.add_argument("--tied", action="store_true", help="key and value of each --shape may be one tensor")
    parser.add_argument("--segments", action="store_true", help="also kernels of each --shape for lists of segments")
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPE_BYTES), help="default: bfloat16")
    parser.add_argument("--sm", action="append", type=int, choices=ARTIFACT_SMS, help="default: all of them")
    parser.add_argument("--shared-limit", type=int, default=PORTABLE_SHARED_LIMIT, metavar="BYTES")
    options = parser.parse_args(arguments)
    try:
        shapes: list[tuple[Shape, float]] = []
        for dtype in options.dtype or ["bfloat16"]:
            if not options.shape:
                shapes += default_shapes(dtype)
            for lists in (False, True)[: 1 + options.segments]:
                shapes += [parse_shape(text, dtype, options.tied, lists) for text in options.shape or ()]
        kernels = []
        for kernel in build(shapes, options.sm or ARTIFACT_SMS, options.shared_limit):
            kernels.append(kernel)
            print(f"{len(kernels)} {kernel.file}", file=sys.stderr)
        write(kernels, options.out)
    except StcaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(kernels)} kernels in {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
