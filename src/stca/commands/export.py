"""`stca export`: checkpoint → verified bundle with the request graph and both halves."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from stca.bundle import Bundle, place_for
from stca.commands.options import cut, cut_options, emit, exported, require_file, require_module
from stca.commands.progress import progress_on_stderr
from stca.errors import CheckpointError, UsageError
from stca.manifest import MANIFEST

HELP = "checkpoint → verified bundle with the request graph and both halves"
EXAMPLES = (
    "stca export model.safetensors --out bundle",
    "stca export --model my_model:function --out bundle --history 2048 --targets 300",
    "stca export bundle --triton-repository models --name ranker",
)


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="safetensors, or a torch state dict with its config in a .json beside it; or a bundle, for Triton",
    )
    p.add_argument("--model", metavar="MODULE:CALLABLE", help="instead: a callable that returns a RequestModel")
    p.add_argument("--out", metavar="BUNDLE", help="directory of the bundle")
    p.add_argument("--triton-repository", metavar="DIR", help="add the bundle to this model repository of Triton's")
    p.add_argument("--name", metavar="M", help="what Triton's clients call it (default: as the bundle's folder)")
    p.add_argument(
        "--form", choices=("auto", "projected", "absorbed"), default="auto", help="the attention's exact form"
    )
    cut_options(p)


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    if (args.checkpoint is None) == (args.model is None):
        raise UsageError("export needs a CHECKPOINT or --model MODULE:CALLABLE, one of the two")
    if args.name is not None and args.triton_repository is None:
        raise UsageError("--name: is of a model in Triton's repository; give --triton-repository DIR")
    if args.checkpoint is not None and Path(args.checkpoint, MANIFEST).is_file():
        if args.out is not None or args.triton_repository is None:
            raise UsageError(f"{args.checkpoint}: is a bundle; export it to --triton-repository DIR, without --out")
        model = _for_triton(args, Path(args.checkpoint))
        emit(
            args, {"bundle": args.checkpoint, "triton_model": str(model)}, f"{model}: its README.md says how to run it"
        )
        return 0
    if args.out is None:
        raise UsageError("--out BUNDLE is missing: the directory of the bundle")
    place_for(args.out)
    if args.triton_repository is None:
        return exported(args, _exported(args))
    from stca.serve.triton_repository import new_model

    new_model(args.triton_repository, _triton_name(args, Path(args.out)))  # an export takes longer than to find out
    bundle = _exported(args)
    return exported(args, bundle, _for_triton(args, bundle.path))


def _for_triton(args: argparse.Namespace, bundle: Path) -> Path:
    from stca.serve.triton_repository import write_repository

    return write_repository(bundle, args.triton_repository, _triton_name(args, bundle))


def _triton_name(args: argparse.Namespace, bundle: Path) -> str:
    return args.name or bundle.resolve().name


def _exported(args: argparse.Namespace) -> Bundle:
    if args.model:
        require_module(args.model)
    else:
        require_file(args.checkpoint, "checkpoint file", CheckpointError)
    progress = progress_on_stderr("torch and onnx")
    from stca.checks.verify import prove
    from stca.export.modules import resolve
    from stca.export.pipeline import export_checkpoint, export_module
    from stca.export.reference.checkpoint import load_checkpoint

    if args.model:
        if args.form != "auto":
            raise UsageError("--form: only a CHECKPOINT has both forms; choose the form inside your own module")
        model = resolve(args.model)
        return export_module(
            model,
            args.out,
            prove=functools.partial(prove, progress=progress),
            source={"kind": "callable", "name": args.model},
            max_history=args.max_history,
            cut=cut(args),
            progress=progress,
        )
    return export_checkpoint(
        load_checkpoint(args.checkpoint),
        args.out,
        prove=functools.partial(prove, progress=progress),
        form=args.form,
        max_history=args.max_history,
        cut=cut(args),
        progress=progress,
    )
