"""What the commands share: how options are read, how results and progress are told."""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stca.backends import BACKENDS
from stca.bundle import Bundle
from stca.commands.progress import finish
from stca.errors import ExportError, StcaError, UsageError
from stca.manifest import Manifest
from stca.near import did_you_mean

ENGINES = tuple(sorted(BACKENDS))
PRECISIONS = ("fp32", "bf16", "fp16")
# Of a number that counts something: the largest, and the most digits, which Python reads at most a few thousand of.
_MOST, _LONGEST = (1 << 62) - 1, 1000


def require_file(path: str, what: str, kind: type[StcaError] = UsageError) -> None:
    """Raises an error of that kind when there is no such file: found out before libraries are loaded for it."""
    if not os.path.exists(path):
        folder = os.path.dirname(path) or "."
        near = did_you_mean(os.path.basename(path), os.listdir(folder) if os.path.isdir(folder) else ())
        raise kind(f"{path}: no such {what}{near or '; check the path'}")
    if not os.path.isfile(path) and not os.path.isdir(path):  # a device may have no end, and a pipe nobody to write
        raise kind(f"{path}: is no plain file; copy the {what} to one")


def require_module(name: str) -> None:
    """Raises ExportError unless this is MODULE:CALLABLE and there is such a module, which is not loaded for that."""
    module, colon, attribute = name.partition(":")
    top = module.partition(".")[0]
    if not colon or not attribute or not top:
        raise ExportError(f"--model {name}: expected PACKAGE.MODULE:CALLABLE, as in my_model:function")
    paths = [os.getcwd(), *sys.path]
    if top not in sys.modules and importlib.machinery.PathFinder.find_spec(top, paths) is None:
        raise ExportError(f"--model {name}: there is no module {top!r} in this folder or on the path; check the name")


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def count(text: str) -> int:
    if not text.isdecimal() or len(text) > _LONGEST or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a whole number from 1 to {_MOST}")
    return int(text)


def sm(text: str) -> int:
    """A compute capability, 8.9 or 89."""
    major, point, minor = text.partition(".")
    if not major.isdecimal() or (point and not (minor.isdecimal() and len(minor) == 1)):
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability; write 89 or 8.9")
    return count(major + minor)


def sizes(text: str) -> list[int]:
    return [count(n) for n in text.split(",")]


def size(text: str) -> tuple[str, int]:
    name, equals, n = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form DIM=N")
    return name, count(n)


def bytes_or_off(text: str) -> int | None:
    if text == "off":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, nor off")
    return int(text)


def pad_value(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition("=")
    try:
        return name, int(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, nor of the form INPUT=N") from None


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def measured_options(p: argparse.ArgumentParser) -> None:
    """What to measure a bundle on; `measured` reads them."""
    p.add_argument(
        "--engine",
        action="append",
        choices=("graphs", *ENGINES),
        help="measure these built engines, one or several side by side (default: graphs, the bundle's own)",
    )
    p.add_argument("--precision", choices=PRECISIONS, help="of the built engines (default: each one's fastest)")
    p.add_argument("--provider", action="append", metavar="NAME", help="ONNX Runtime's provider for graphs, best first")
    p.add_argument("--config", action="append", type=pair, metavar="NAME=VALUE", help="its session entry for graphs")
    p.add_argument("--gpu", type=int, default=0, metavar="N", help="number of the GPU for TensorRT's engines")
    native_code_option(p)


def native_code_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--native-code", action="store_true", help="open engines that carry native code: you trust its maker"
    )


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The options as `stca.checks.bench.bench` takes them."""
    from stca.runtime.options import CPU, OnnxRuntimeOptions

    engines = args.engine or ["graphs"]
    options = None
    if args.provider or args.config:
        if "graphs" not in engines:
            raise UsageError("--provider, --config: are of the bundle's own graphs; add --engine graphs")
        options = OnnxRuntimeOptions(tuple(args.provider or (CPU,)), dict(args.config or ()))
    given = {"engines": engines, "precision": args.precision, "onnxruntime": options, "gpu": args.gpu}
    return {**given, "native_code": args.native_code}


def emit(args: argparse.Namespace, data: Mapping[str, Any], text: str) -> None:
    finish()
    print(json.dumps(data) if args.json else text, flush=True)


def cut_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--history", type=count, default=10_000, metavar="N", help="history tokens to cut for")
    p.add_argument("--targets", type=count, default=300, metavar="N", help="targets to cut for")
    p.add_argument("--size", action="append", type=size, default=[], metavar="DIM=N", help="the same for another size")
    p.add_argument(
        "--ids",
        action="append",
        type=size,
        default=[],
        metavar="INPUT=N",
        help="ids of an input are 0 to N-1, where the graph does not tell",
    )
    p.add_argument(
        "--flops-per-byte", type=positive, metavar="F", help="work worth redoing to save a byte of state (default: 16)"
    )
    p.add_argument(
        "--pad",
        choices=("left", "right"),
        help="where histories of a fixed length are padded (default: found by asking the model)",
    )
    p.add_argument(
        "--pad-value",
        action="append",
        type=pad_value,
        default=[],
        metavar="[INPUT=]N",
        help="what padding holds, in all inputs of a history or in one (default: 0)",
    )
    p.add_argument("--max-history", type=count, metavar="N", help="longest history to serve (default: the model's)")
    p.add_argument(
        "--tables-above",
        type=bytes_or_off,
        default=1 << 30,
        metavar="BYTES|off",
        help="embedding tables of more bytes leave the graphs for files of the bundle",
    )
    p.add_argument(
        "--flops-per-row",
        type=positive,
        metavar="F",
        help="work in whose time a row of such a table is looked up; more where its source is slow (default: 1000)",
    )
    p.add_argument(
        "--neighbours",
        type=count,
        default=0,
        metavar="K",
        help="add a graph that reads so many users' states beside the user's own without copying them",
    )
    p.add_argument("--no-lift", action="store_true", help="leave a batch axis that users and targets share as it is")


def cut(args: argparse.Namespace) -> Any:
    from stca.export.analysis.cut import DEFAULT_FLOPS_PER_BYTE, DEFAULT_FLOPS_PER_ROW
    from stca.export.padding import PadOptions
    from stca.export.pipeline import CutOptions

    workload = {"N_h": args.history, "N_t": args.targets, "B": 1, "B_plus_1": 2, **dict(args.size)}
    pad = PadOptions(args.pad, dict(args.pad_value))
    return CutOptions(
        workload,
        args.flops_per_byte or DEFAULT_FLOPS_PER_BYTE,
        dict(args.ids),
        pad,
        not args.no_lift,
        tables_above=args.tables_above,
        flops_per_row=args.flops_per_row or DEFAULT_FLOPS_PER_ROW,
        pieces=1 + args.neighbours,
    )


def exported(args: argparse.Namespace, bundle: Bundle, triton_model: Path | None = None) -> int:
    m = bundle.manifest
    data: dict[str, Any] = {
        "bundle": str(bundle.path),
        "weights": m.weights,
        "parity": m.parity,
        "state": {"bytes": m.split["state_bytes"], "bytes_per_token": m.split["bytes_per_token"]},
        "request_dependencies": m.split["request_dependencies"],
        "cached": m.cached,
        "notes": m.split["notes"],
    }
    lines = [
        f"{bundle.path}: verified, weights {m.weights[:12]}",
        f"user state: {m.split['bytes_per_token']} bytes per history token, {m.split['state_bytes']:,} bytes in all; "
        + ("new events can be appended; " if m.appendable else "")  # else a note says why not
        + f"cached {100 * m.cached:.1f} % of the work"
        + (", of what is left when all targets share one history" if m.split.get("lifted") else ""),
        *_fixed_targets(m),
        *(d["text"] for d in m.split["request_dependencies"]),
        *m.split["notes"],
        *(f"left out of the proof: {what}" for what in m.parity.get("left_out") or ()),
    ]
    if triton_model is not None:
        data["triton_model"] = str(triton_model)
        lines.append(f"{triton_model}: its README.md says how to run it")
    emit(args, data, "\n".join(lines))
    return 0


def _fixed_targets(m: Manifest) -> list[str]:
    """A line where a request has as many targets as the model says, and no others."""
    shapes = [s.shape for s in m.graphs["request"].inputs if s.scope == "target"]
    if not shapes or any(isinstance(n, str) for shape in shapes for n in shape):
        return []
    return ["each request scores as many targets as the model was made for; give their size a name to serve any number"]


def memory(parts: Mapping[str, int]) -> str:
    return "memory at the largest sizes: " + ", ".join(f"{name.replace('_', ' ')} {n:,} B" for name, n in parts.items())


def dims(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
