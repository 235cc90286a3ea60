"""`python tests/fuzz/graphs.py`: ONNX's node tests and random recommenders, split, proven and served, or refused.

Cases run in a process beside this one; where it dies or hangs, that is counted, and the next case gets a new one. What
was found goes to `--out` line by line; the same command again goes on where it stopped. Exit codes: 0 every model was
served with parity or refused in one line, 1 some were not, 2 bad usage.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import node_tests
import outcomes
from cases import check
from outcomes import Outcome
from random_graphs import random_case

SECONDS = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked and has not been run yet; returns the exit code."""
    args = _parser().parse_args(argv)
    asked = args.names or [
        *(f"random/{args.seed + i}" for i in range(args.random)),
        *node_tests.names(args.nodes)[:: args.every],
    ]
    return outcomes.run(asked, found, args.out, loud=bool(args.names))


def found(asked: Iterable[str]) -> Iterator[Outcome]:
    """What became of each case, in order."""
    return outcomes.outcomes(asked, look, SECONDS)


def look(name: str) -> Outcome:
    """What becomes of the case of that name, in this process."""
    family, _, which = name.partition("/")
    case = random_case(int(which)) if family == "random" else node_tests.node_case(name)
    if case is None:
        return Outcome(name, "refused", "(takes or gives no tensors: not asked)")
    with tempfile.TemporaryDirectory() as folder:
        return check(case, Path(folder))


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python tests/fuzz/graphs.py", description=__doc__, allow_abbrev=False)
    p.add_argument("names", nargs="*", metavar="CASE", help="run these alone, and say what became of each")
    p.add_argument("--random", type=int, default=1000, metavar="N", help="random graphs; default 1000")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="number of the first of them; default 0")
    p.add_argument(
        "--nodes",
        type=lambda text: [f for f in text.split(",") if f],
        metavar="FILE,…",
        help="node tests of these files of onnx.backend.test.case.node; '' for none, default all",
    )
    p.add_argument("--every", type=int, default=1, metavar="K", help="only each K-th of the node tests")
    p.add_argument(
        "--out", type=Path, metavar="FILE", help="what was found, a JSON object a line; read first, if there"
    )
    return p


if __name__ == "__main__":
    sys.exit(main())
