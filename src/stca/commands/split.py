"""`stca split`: any ONNX model → verified bundle with its two halves."""

from __future__ import annotations

import argparse
import functools

from stca.bundle import place_for
from stca.commands.options import cut, cut_options, exported, names, require_file
from stca.commands.progress import progress_on_stderr
from stca.errors import SplitError, StcaError
from stca.specs import ScopeName

HELP = "any ONNX model → verified bundle with its two halves"
EXAMPLES = (
    "stca split model.onnx --user-inputs history,age --request-inputs device --target-inputs item --out bundle",
)


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("model", metavar="MODEL.onnx", help="the model; its external data beside it")
    p.add_argument("--user-inputs", type=names, default=[], metavar="A,B", help="known for a user before any request")
    p.add_argument("--request-inputs", type=names, default=[], metavar="C", help="known when a request comes")
    p.add_argument("--target-inputs", type=names, default=[], metavar="D", help="one or more per target")
    p.add_argument("--out", required=True, metavar="BUNDLE", help="directory of the bundle")
    cut_options(p)


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    require_file(args.model, "ONNX file", SplitError)
    place_for(args.out)
    progress = progress_on_stderr("torch and onnx")
    from stca.checks.verify import prove
    from stca.export.pipeline import split_onnx

    scopes: dict[str, ScopeName] = {}
    marks: list[tuple[ScopeName, list[str]]] = [
        ("user", args.user_inputs),
        ("request", args.request_inputs),
        ("target", args.target_inputs),
    ]
    for scope, listed in marks:
        for name in listed:
            if scopes.setdefault(name, scope) != scope:
                raise StcaError(f"input {name!r} is listed as {scopes[name]} and as {scope}; choose one")
    bundle = split_onnx(
        args.model,
        scopes,
        args.out,
        prove=functools.partial(prove, progress=progress),
        max_history=args.max_history,
        cut=cut(args),
        progress=progress,
    )
    return exported(args, bundle)
