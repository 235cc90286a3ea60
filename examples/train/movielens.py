"""`python -m stca.examples.train.movielens u.data u.item OUT.tsv`: MovieLens-100K as a log for `--log`.

`u.data` has a rating a line, `user item rating timestamp` with tabs between. `u.item` has a film a line, in Latin-1
with `|` between: five cells, the first of them the item, then one 0 or 1 per genre. The rating becomes the action and
the first of a film's genres its category; the ratings keep their order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from stca.errors import StcaError

# In the order of their columns (the data set's own u.genre).
GENRES = (
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
    ),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
CELLS_BEFORE_GENRES = 5


def convert(ratings: str | os.PathLike[str], items: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write the log that `stca.examples.train.logfile.read_log` reads.

    Args:
        ratings: path of `u.data`.
        items: path of `u.item`.
        out: path of the tab-separated log to write.

    Raises:
        StcaError: when a file cannot be read or written, or naming the line that does not look as expected.
    """
    category = {}
    for where, cells in _lines(items, "|", CELLS_BEFORE_GENRES + len(GENRES)):
        flags = cells[CELLS_BEFORE_GENRES:]
        if "1" not in flags:
            raise StcaError(f"{where}: film {cells[0]!r} has no genre; expected a 1 in one of the last {len(GENRES)}")
        category[cells[0]] = GENRES[flags.index("1")]
    log = ["user\titem\taction\ttimestamp\tcategory"]
    for where, cells in _lines(ratings, "\t", 4):
        if cells[1] not in category:
            raise StcaError(
                f"{where}: film {cells[1]!r} is not in {os.fspath(items)}; take both files from one release"
            )
        log.append("\t".join([*cells, category[cells[1]]]))
    try:
        Path(out).write_text("\n".join(log) + "\n", encoding="utf-8")
    except OSError as e:
        raise StcaError(f"{os.fspath(out)}: cannot be written ({e.strerror})") from e


def _lines(path: str | os.PathLike[str], delimiter: str, count: int) -> Iterator[tuple[str, list[str]]]:
    """Where each line is, to name it in an error, and its `count` cells."""
    file = Path(path)
    try:
        text = file.read_text(encoding="latin-1")
    except OSError as e:
        raise StcaError(f"{file}: cannot be read ({e.strerror}); expected a file of MovieLens-100K") from e
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        cells = line.split(delimiter)
        if len(cells) != count:
            raise StcaError(f"{file}, line {number}: has {len(cells)} cells between {delimiter!r}, expected {count}")
        yield f"{file}, line {number}", cells


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code: 0 done, 2 bad usage or input."""
    paths = sys.argv[1:] if argv is None else list(argv)
    try:
        if len(paths) != 3:
            raise StcaError("expected three paths: u.data u.item OUT.tsv")
        convert(*paths)
    except StcaError as e:
        print(f"stca.examples.train.movielens: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
