"""`stca score`: requests in JSON → scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stca import folders
from stca.bundle import require_folder
from stca.commands.options import ENGINES, count, emit, native_code_option
from stca.errors import RequestError

# A device may have no end.
_MOST_BYTES = 1 << 28
HELP = "requests in JSON → scores"
EXAMPLES = (
    "stca score bundle requests.json --json",
    "stca score bundle - < requests.json",
    "stca schema requests --bundle bundle",
)


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("bundle", metavar="BUNDLE", help="directory that `stca export` or `stca split` wrote")
    p.add_argument(
        "requests",
        metavar="REQUESTS",
        help='file of one request, {"inputs": {"name": [values]}, "user": "ann", "version": 1}, or of a list of them; '
        "- reads stdin",
    )
    p.add_argument("--engine", choices=(*ENGINES, "graphs"), help="what runs it (default: the fastest that runs here)")
    p.add_argument("--threads", type=count, help="threads of one request (default: every core)")
    p.add_argument("--trusted", metavar="KEY", help="public key in PEM: refuse a bundle its holder did not sign")
    native_code_option(p)
    p.add_argument("--truncate", action="store_true", help="keep the most recent events of a history that is too long")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    require_folder(args.bundle)
    text = _text(args.requests)
    from stca.runtime import Session
    from stca.runtime.json_request import read_requests

    requests = read_requests(text)
    if not requests:
        raise RequestError(f"{args.requests}: holds no requests; `stca schema requests` says what goes in")
    session = Session.load(
        args.bundle,
        threads=args.threads,
        truncate=args.truncate,
        engine=args.engine,
        trusted=args.trusted,
        native_code=args.native_code,
    )
    found: list[dict[str, Any]] = []
    lines: list[str] = []
    refused: list[RequestError] = []
    for i, request in enumerate(requests):
        try:
            scores = session.score(request).tolist()
        except RequestError as e:
            refused.append(RequestError(f"request {i}: {e}"))
            found.append({"user": request.user, "error": str(e)})
            continue
        found.append({"user": request.user, "scores": scores})
        lines += [f"request {i}, target {t}: {_shown(session.tasks, row)}" for t, row in enumerate(scores)]
    if len(refused) == len(requests):
        raise refused[0]
    emit(args, {"tasks": session.tasks, "requests": found}, "\n".join(lines))
    for error in refused:
        print(f"stca: {error}", file=sys.stderr)
    return RequestError.exit_code if refused else 0


def _text(name: str) -> str:
    try:
        if name == "-":
            return sys.stdin.read()
        if len(read := folders.read(Path(name), _MOST_BYTES)) > _MOST_BYTES:
            raise RequestError(f"{name}: is larger than {_MOST_BYTES >> 20} MiB; score fewer requests at once")
        return read.decode("utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as e:
        why = getattr(e, "strerror", None) or "it is not text in UTF-8"
        raise RequestError(f"{name}: cannot be read ({why}); name a JSON file, or - for stdin") from e


def _shown(tasks: Sequence[str], row: Sequence[float]) -> str:
    return "  ".join(f"{name} {score:.6g}" for name, score in zip(tasks, row, strict=True))
