"""`stca schema`: the JSON Schema of a manifest or of requests."""

from __future__ import annotations

import argparse
import json

from stca.bundle import Bundle, require_folder
from stca.errors import StcaError
from stca.manifest import FORMAT, FORMAT_VERSION, Manifest

HELP = "the JSON Schema of a bundle's manifest, or of the requests that `stca score` reads"
EXAMPLES = ("stca schema manifest", "stca schema requests", "stca schema requests --bundle bundle")


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("what", choices=("manifest", "requests"), help="whose schema")
    p.add_argument("--bundle", metavar="BUNDLE", help="with requests: of this bundle's inputs, limits and all")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    if args.bundle:
        require_folder(args.bundle)
    from stca.json_schema import schema_of
    from stca.runtime.json_request import requests_schema

    if args.bundle and args.what != "requests":
        raise StcaError("--bundle: only requests differ from bundle to bundle; leave it out")
    if args.what == "manifest":
        schema = schema_of(Manifest, "manifest.json of an stca bundle")
        schema["properties"] |= {
            "format": {"const": FORMAT},
            "version": {"type": "integer", "minimum": 1, "maximum": FORMAT_VERSION},
            "digest": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        }
        schema["required"] += ["format", "version", "digest"]
    else:
        schema = requests_schema(Bundle.load(args.bundle).manifest if args.bundle else None)
    print(json.dumps(schema, indent=None if args.json else 2))
    return 0
