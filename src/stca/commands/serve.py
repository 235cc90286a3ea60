"""`stca serve`: bundles over HTTP and gRPC, with the Open Inference Protocol."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

from stca.bundle import require_folder
from stca.commands.options import emit
from stca.errors import UsageError

HELP = "serve bundles over HTTP and gRPC (Open Inference Protocol)"
EXAMPLES = (
    "stca serve bundle --name ranker",
    "stca serve ranker=bundle ranker/2=other --host 0.0.0.0 --queue 128",
    "stca serve --config serve.toml --queue 128",
)


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options; each but these three is a setting of the server."""
    from stca.serve.settings import PREFIX, documented

    p.add_argument("bundles", metavar="BUNDLE", nargs="*", help="its directory; NAME=BUNDLE, NAME/VERSION=BUNDLE")
    p.add_argument("--name", metavar="M", help="what clients call the one bundle (default: as its folder)")
    p.add_argument("--config", metavar="FILE", help=f"settings in TOML; {PREFIX}NAME in the environment goes first")
    for name, kind, said, default in documented():
        flag, more = f"--{name.replace('_', '-')}", "" if default is None else f" (default: {default})"
        if kind is bool:
            p.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=said)
        else:
            p.add_argument(flag, metavar="X", default=argparse.SUPPRESS, help=said + more)


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    from typing import get_type_hints

    from stca.serve.settings import Settings, from_text, named, settings

    hints = get_type_hints(Settings)
    flags: dict[str, Any] = {}
    for name, value in vars(args).items():
        if name in hints:
            flags[name] = from_text(hints[name], f"--{name.replace('_', '-')}", value) if value is not True else value
    if args.name is not None and len(args.bundles) != 1:
        raise UsageError("--name: is of one bundle; give several as NAME=BUNDLE")
    if args.bundles:
        flags["models"] = named(args.bundles, args.name)
    chosen = settings(args.config, os.environ, flags)
    if not chosen.models:
        raise UsageError("no bundle is given; name its directory, or a file with [models] by --config")
    for bundle in chosen.models.values():
        require_folder(bundle)
    import asyncio  # once nothing is missing: what serves takes its time to load

    from stca.serve.log import logs_on_stderr
    from stca.serve.server import serve

    def ready(server: Any) -> None:
        ports = server.ports
        names = [f"{m.name}/{m.version}" for m in server.serving.models]
        text = (
            f"serving {', '.join(names)}: http://{chosen.host}:{ports['http']}, grpc {chosen.host}:{ports['grpc']}, "
            f"admin and metrics http://{chosen.admin_host}:{ports['admin']}"
        )
        emit(args, {"ports": ports, "models": names}, text)

    async def to_the_end() -> int:
        if await serve(chosen, ready):
            return 0
        logging.shutdown()
        os._exit(1)  # the thread that still computes would keep the process

    with logs_on_stderr(chosen.log_level):
        return asyncio.run(to_the_end())
