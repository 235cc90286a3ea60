"""`python tests/fuzz/contracts.py`: changed manifests, each read in Python and in C++, which must take the same ones.

Each round depends on the seed and its own number alone. Exit codes: 0 taken and refused alike, 1 something was not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import mutations
from cpp import fuzz

from stca.errors import BundleError
from stca.manifest import MANIFEST, Manifest

BUNDLES = ("log", "plain", "rows", "padded_left", "padded_right", "exact")


def with_table(text: str) -> str:
    """The manifest of `log` with a table beside its graphs, and matrices of int8."""
    manifest = json.loads(text)
    table = {"name": "items", "file": "items.rows", "digests": "items.digests", "dtype": "float16"}
    manifest["tables"] = [table | {"rows": 1000, "width": 4, "block_rows": 64}]
    manifest["graphs"]["target_scorer"]["lookups"] = [{"rows": "row", "table": "items", "ids": "target_item"}]
    manifest["files"]["items.digests"] = {"sha256": "0" * 64, "bytes": 512}
    manifest["quantization"] = {"weights": {"kind": "int8", "zero_points": True}}
    return json.dumps(manifest | {"version": 2}, indent=1)


def changed(seed: int, rounds: int) -> list[dict[str, str]]:
    """Manifests of the golden bundles with one or two changes, and what Python says of each: nothing, or why not."""
    whole = [(fuzz.GOLDEN / name / MANIFEST).read_text(encoding="utf-8") for name in BUNDLES]
    whole.append(with_table(whole[0]))
    cases = []
    for number in range(rounds):
        rng = random.Random(f"{seed} {number}")
        text = mutations.change_text(rng, rng.choice(whole))
        try:
            Manifest.from_json(text)
            said = ""
        except BundleError as e:
            said = str(e)
        cases.append({"manifest": text, "said": said})
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    """Change, read in both, and compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5000, help="manifests (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--build", type=Path, default=Path("build/fuzz-cpp"), help="where to build (%(default)s)")
    args = parser.parse_args(argv)
    cases = changed(args.seed, args.rounds)
    program = fuzz.build(args.build, "stca_tests")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.json"
        file.write_text(json.dumps(cases), encoding="utf-8")
        environment = {**os.environ, "STCA_CONTRACT_CASES": str(file)}
        done = subprocess.run([str(program), "contract_is_pythons"], env=environment, check=False)
    print(f"{len(cases)} manifests, of which Python takes {sum(not case['said'] for case in cases)}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
