"""`python -m stca.examples.train.movielens ml-100k.zip OUT.tsv`: MovieLens-100K as a log for `--log`.

The source is what GroupLens gives away: the archive `ml-100k.zip` or the folder in it, or the two files read from it.
`u.data` has a rating a line, `user item rating timestamp` with tabs between. `u.item` has a film a line, in Latin-1
with `|` between: five cells, the first of them the item, then one 0 or 1 per genre. The rating becomes the action and
the first of a film's genres its category; the ratings keep their order.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import zipfile
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
    p = argparse.ArgumentParser(
        prog="python -m stca.examples.train.movielens",
        description="MovieLens-100K as a log for python -m stca.examples.train --log",
        allow_abbrev=False,
    )
    p.add_argument("source", nargs="+", help="ml-100k.zip, or the folder ml-100k, or the two files u.data and u.item")
    p.add_argument("out", metavar="OUT.tsv", help="the log to write")
    args = p.parse_args(argv)
    try:
        with _files(args.source) as (ratings, items):
            convert(ratings, items, args.out)
    except StcaError as e:
        print(f"stca.examples.train.movielens: {e}", file=sys.stderr)
        return e.exit_code
    return 0


@contextlib.contextmanager
def _files(source: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """Paths of `u.data` and `u.item`: as given, in a folder, or taken out of an archive."""
    if len(source) == 2:
        yield Path(source[0]), Path(source[1])
    elif len(source) > 2:
        raise StcaError("expected ml-100k.zip, a folder, or the two files u.data and u.item, then OUT.tsv")
    elif Path(source[0]).is_dir():
        yield Path(source[0]) / "u.data", Path(source[0]) / "u.item"
    else:
        with tempfile.TemporaryDirectory() as work:
            for name in ("u.data", "u.item"):
                (Path(work) / name).write_bytes(_member(source[0], name))
            yield Path(work) / "u.data", Path(work) / "u.item"


def _member(archive: str, name: str) -> bytes:
    try:
        with zipfile.ZipFile(archive) as z:
            found = [n for n in z.namelist() if n.rpartition("/")[2] == name]
            if not found:
                raise StcaError(f"{archive}: holds no {name}; expected GroupLens's ml-100k.zip")
            return z.read(found[0])
    except (OSError, zipfile.BadZipFile) as e:
        raise StcaError(f"{archive}: cannot be read ({e}); expected ml-100k.zip, or the folder in it") from e


if __name__ == "__main__":
    sys.exit(main())
