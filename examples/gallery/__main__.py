"""`python -m stca.examples.gallery`: each model, exported, split, proven, served and measured, in one table.

The work is done in a process beside this one, so that its death is a row as well. Progress goes to stderr, the table
to stdout, with `--json` as one JSON object. Exit codes: 0 all passed, 1 a model was refused or scored wrongly, 2 bad
usage.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from stca.examples.gallery import NAMES, load
from stca.examples.gallery.measure import EXPORTERS, Exporter, Row, row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gallery and return the exit code."""
    args = _parser().parse_args(argv)
    exporters: Sequence[Exporter] = EXPORTERS if args.exporter == "all" else (args.exporter,)
    asked = [(name, exporter) for name in args.names or NAMES for exporter in exporters]
    rows: list[Row] = []
    for done in rows_of(asked, args.targets):
        print(f"{done.name} ({done.exporter}): {_outcome(done)}", file=sys.stderr, flush=True)
        rows.append(done)
    print(json.dumps({"rows": [r.as_dict() for r in rows]}) if args.json else table(rows))
    return 0 if all(r.passed for r in rows) else 1


def rows_of(
    asked: Sequence[tuple[str, Exporter]], targets: int, work: Callable[[str, Exporter, int], Row] = row
) -> Iterator[Row]:
    """A row for each model and exporter, as they are done. A process that dies loses its own row alone."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context)
    for name, exporter in asked:
        try:
            yield pool.submit(work, name, exporter, targets).result()
        except BrokenProcessPool:
            pool.shutdown()
            pool = ProcessPoolExecutor(1, context)
            model = load(name)
            yield Row(name, exporter, model.style, model.history, targets, refused="the process died")
    pool.shutdown()


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("model", "exporter", "history", "lifted", "state", "copies", "cached", "parity", "pointwise", "miss", "hit")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        start = f"| {r.name}: {r.style} | {r.exporter} | {r.history} |"
        if r.refused or r.parity is None:
            lines.append(f"{start} refused: {r.refused} |" + " |" * (len(head) - 4))
            continue
        lifted = "-" if r.lifted is None else "yes" if r.lifted else "no"
        parity = f"{'' if r.passed else 'FAILED '}{r.parity.max_abs:.1e} of {r.parity.limit:.1e}"
        times = " | ".join(f"{t:.2f} ms" for t in (r.pointwise_ms, r.miss_ms, r.hit_ms) if t is not None)
        size = f"{r.state_bytes:,} B | {r.copied_bytes:,} B | {100 * (r.cached or 0):.1f} %"
        lines.append(f"{start} {lifted} | {size} | {parity} | {times} |")
    return "\n".join(lines)


def _outcome(r: Row) -> str:
    return "passed" if r.passed else f"refused: {r.refused}" if r.refused else "FAILED parity"


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m stca.examples.gallery", description=__doc__, allow_abbrev=False)
    p.add_argument("names", nargs="*", metavar="NAME", type=_name, help=f"of {', '.join(NAMES)}; default all")
    p.add_argument("--exporter", choices=(*EXPORTERS, "all"), default="dynamo", help="default dynamo")
    p.add_argument("--targets", type=_count, default=300, metavar="N", help="targets of the request; default 300")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return p


def _name(text: str) -> str:
    if text not in NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is no model of the gallery; there are {', '.join(NAMES)}")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
