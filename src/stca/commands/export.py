"""`stca export`: checkpoint → verified bundle with the request graph and both halves."""

from __future__ import annotations

import argparse
import functools

from stca.commands.options import cut, cut_options, exported
from stca.commands.progress import progress_on_stderr
from stca.errors import StcaError

HELP = "checkpoint → verified bundle with the request graph and both halves"
EXAMPLES = (
    "stca export model.safetensors --out bundle",
    "stca export --model my_model:function --out bundle --history 2048 --targets 300",
)


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="safetensors, or a torch state dict with its config in a .json beside it",
    )
    p.add_argument("--model", metavar="MODULE:CALLABLE", help="instead: a callable that returns a RequestModel")
    p.add_argument("--out", required=True, metavar="BUNDLE", help="directory of the bundle")
    p.add_argument(
        "--form", choices=("auto", "projected", "absorbed"), default="auto", help="the attention's exact form"
    )
    cut_options(p)


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    if (args.checkpoint is None) == (args.model is None):
        raise StcaError("export needs a CHECKPOINT or --model MODULE:CALLABLE, one of the two")
    progress = progress_on_stderr("torch and onnx")
    from stca.checks.verify import prove
    from stca.export.modules import resolve
    from stca.export.pipeline import export_checkpoint, export_module
    from stca.export.reference.checkpoint import load_checkpoint

    if args.model:
        if args.form != "auto":
            raise StcaError("--form: only a CHECKPOINT has both forms; choose the form inside your own module")
        model = resolve(args.model)
        bundle = export_module(
            model,
            args.out,
            prove=functools.partial(prove, progress=progress),
            source={"kind": "callable", "name": args.model},
            max_history=args.max_history,
            cut=cut(args),
            progress=progress,
        )
    else:
        bundle = export_checkpoint(
            load_checkpoint(args.checkpoint),
            args.out,
            prove=functools.partial(prove, progress=progress),
            form=args.form,
            max_history=args.max_history,
            cut=cut(args),
            progress=progress,
        )
    return exported(args, bundle)
