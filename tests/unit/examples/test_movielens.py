from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from stca.errors import StcaError
from stca.examples.train.logfile import read_log
from stca.examples.train.movielens import GENRES, convert, main

RATINGS = "7\t2\t5\t881250949\n7\t1\t3\t881250950\n9\t2\t1\t881250000\n"


def film(item: int, title: str, *genres: str) -> str:
    flags = ["1" if g in genres else "0" for g in GENRES]
    return "|".join([str(item), title, "01-Jan-1995", "", "http://", *flags]) + "\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Three ratings of two films, one of which has an accent in its title."""
    ratings, items, out = tmp_path / "u.data", tmp_path / "u.item", tmp_path / "log.tsv"
    ratings.write_text(RATINGS)
    items.write_text(film(1, "Caf\xe9 (1995)", "Western", "Comedy") + film(2, "?", "unknown"), encoding="latin-1")
    return ratings, items, out


def test_rating_is_the_action_and_the_first_genre_the_category(files: tuple[Path, Path, Path]) -> None:
    assert main([str(f) for f in files]) == 0
    assert files[2].read_text() == (
        "user\titem\taction\ttimestamp\tcategory\n"
        "7\t2\t5\t881250949\tunknown\n"
        "7\t1\t3\t881250950\tComedy\n"
        "9\t2\t1\t881250000\tunknown\n"
    )
    log = read_log(files[2], {"like": ["5"]}, held_out=0.5)
    assert log.labels.tolist() == [[1], [0], [0]]
    assert log.sizes["category"] == 2  # Comedy is in the held-out event alone


@pytest.mark.parametrize(
    ("which", "text", "expected"),
    [
        (0, RATINGS + "9\t2\t1\n", "u.data, line 4: has 3 cells between '\\t', expected 4"),
        (0, RATINGS + "9\t3\t1\t5\n", "u.data, line 4: film '3' is not in "),
        (1, film(1, "a|b", "War"), "u.item, line 1: has 25 cells between '|', expected 24"),
        (1, film(1, "a"), "u.item, line 1: film '1' has no genre"),
        (1, "", "u.item, line 1: has 1 cells"),
    ],
)
def test_bad_files_are_named_with_their_line(
    files: tuple[Path, Path, Path], which: int, text: str, expected: str
) -> None:
    files[which].write_text(text)
    with pytest.raises(StcaError) as e:
        convert(*files)
    assert expected in str(e.value)
    assert not files[2].exists()


def test_command_says_what_is_wrong_in_one_line(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, message in (
        (["a", "b", "c", "d"], "expected ml-100k.zip"),
        ([str(tmp_path / "none"), *map(str, files[1:])], "cannot be read"),
        ([*map(str, files[:2]), str(tmp_path)], "cannot be written"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_the_source_as_it_is_given_away(files: tuple[Path, Path, Path], tmp_path: Path, packed: bool) -> None:
    ratings, items, out = files
    source = tmp_path / "ml-100k"
    source.mkdir()
    for file in (ratings, items):
        file.rename(source / file.name)
    if packed:
        with zipfile.ZipFile(tmp_path / "ml-100k.zip", "w") as z:
            for name in ("README", "u.data", "u.item"):
                z.writestr(f"ml-100k/{name}", (source / name).read_bytes() if name != "README" else b"")
        source = tmp_path / "ml-100k.zip"
    assert main([str(source), str(out)]) == 0
    assert out.read_text().count("\n") == 4


def test_help_and_a_file_that_is_no_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    assert "ml-100k.zip" in capsys.readouterr().out
    (tmp_path / "junk.zip").write_bytes(b"junk")
    assert main([str(tmp_path / "junk.zip"), str(tmp_path / "out.tsv")]) == 2
    assert "cannot be read" in capsys.readouterr().err
