"""`stca sign`: say who made a bundle, with a signature that a session can insist on."""

from __future__ import annotations

import argparse

from stca.commands.options import emit

HELP = "sign a bundle, so that whoever loads it can insist on who made it (needs the extra sign)"
EXAMPLES = (
    "stca sign bundle --key private.pem",
    "stca verify bundle --trusted public.pem",
)


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("bundle", metavar="BUNDLE", help="directory that `stca export` or `stca split` wrote")
    p.add_argument(
        "--key",
        required=True,
        metavar="KEY",
        help="Ed25519 private key in PEM; `openssl genpkey -algorithm ed25519 -out private.pem` makes one, and "
        "`openssl pkey -in private.pem -pubout -out public.pem` writes what others need",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    from stca.bundle import sign

    file = sign(args.bundle, args.key)
    text = f"{args.bundle}: signed ({file.name}); what build, calibrate and refit make of it is unsigned: sign it again"
    emit(args, {"signature": str(file)}, text)
    return 0
