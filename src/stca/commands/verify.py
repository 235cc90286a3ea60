"""`stca verify`: parity of every stage against a float64 reference."""

from __future__ import annotations

import argparse

from stca.account import check_account
from stca.bundle import Bundle
from stca.commands.options import ENGINES, PRECISIONS, emit, native_code_option, require_module
from stca.commands.progress import progress_on_stderr
from stca.errors import StcaError, UsageError

HELP = "parity of every stage against a float64 reference"
EXAMPLES = (
    "stca verify bundle",
    "stca verify bundle --engine tensorrt --precision bf16",
)


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("bundle", metavar="BUNDLE", help="directory that `stca export` or `stca split` wrote")
    p.add_argument("--model", metavar="MODULE:CALLABLE", help="the callable the bundle was exported from")
    p.add_argument("--engine", choices=ENGINES, help="check these built engines instead, and name the node at fault")
    p.add_argument("--trusted", metavar="KEY", help="public key in PEM: refuse a bundle its holder did not sign")
    p.add_argument("--precision", choices=PRECISIONS, help="of the engines (default: the fastest that run here)")
    native_code_option(p)


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    if args.precision and not args.engine:
        raise StcaError("--precision: is of built engines; say which with --engine")
    if args.model:
        require_module(args.model)
    bundle = Bundle.load(args.bundle, trusted=args.trusted)
    check_account(bundle.manifest)
    choice = None
    if args.engine:
        from stca.runtime.engine_choice import best_engine

        native_code = args.native_code or args.trusted is not None
        choice = best_engine(bundle.manifest, only=args.engine, precision=args.precision, native_code=native_code)

    progress = progress_on_stderr("torch and onnx")
    from stca.checks.engines import verify_engine
    from stca.checks.verify import verify
    from stca.export.modules import adapted, resolve

    module = None
    if args.model:
        made = adapted(resolve(args.model))
        takes, wanted = ([s.name for s in of] for of in (made.inputs, bundle.manifest.graphs["request"].inputs))
        if set(takes) != set(wanted):
            source = bundle.manifest.model.get("name")
            raise UsageError(
                f"--model {args.model}: takes {', '.join(takes)}, and the bundle {', '.join(wanted)}; pass the "
                f"callable that the bundle was made from{f', here {source}' if source else ''}"
            )
        module = made.module
    if choice:
        report = verify_engine(bundle, choice, module=module, progress=progress)
    else:
        report = verify(bundle, module=module, progress=progress)
    lines = [f"{'stage':<16} {'max abs':>9} {'limit':>9} {'max rel':>9} {'cosine':>11} {'top-k':>6}"]
    lines += [
        f"{s.name:<16} {s.max_abs:9.2e} {f'{s.limit:.2e}' if s.limit else '-':>9} {s.max_rel:9.2e} {s.cosine:11.9f} "
        f"{s.topk_overlap:6.3f}{'' if s.passed else '  FAILED'}"
        for s in report.stages
    ]
    lines += [f"left out: {what}" for what in report.left_out]
    lines.append(f"cached {100 * bundle.manifest.cached:.1f} % of the work")
    emit(args, report.as_dict(), "\n".join([*lines, f"{'passed' if report.passed else 'FAILED'} ({report.reference})"]))
    return 0 if report.passed else 1
