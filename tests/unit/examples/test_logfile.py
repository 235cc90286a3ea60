from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stca.errors import StcaError
from stca.examples.train.logfile import read_log

GOOD = """\
timestamp,user,note,item,action,category
300,bob,x,tea,buy,drinks
100,bob,x,bun,view,food
200,ann,x,tea,view,drinks
100,ann,x,bun,like,food
400,bob,x,jam,like,spreads
300,ann,x,bun,view,food
"""


def write(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "log.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_reads_sorts_and_splits_by_time(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, GOOD), {"liked": ["like", "buy"], "bought": ["buy"]}, held_out=0.34)
    assert log.tasks == ("liked", "bought")
    assert log.user_offsets.tolist() == [0, 3, 6]
    assert log.held_out.tolist() == [2, 5]
    assert log.time.tolist() == [100, 200, 300, 100, 300, 400]
    assert log.labels.tolist() == [[1, 0], [0, 0], [0, 0], [0, 0], [1, 1], [1, 0]]
    # Ids count from 1 in the training events; jam and spreads are known from a held-out one alone.
    assert log.item.tolist() == [1, 2, 1, 1, 2, 0]
    assert log.items == 3
    assert log.event_fields["category"].tolist() == [2, 1, 2, 2, 1, 0]
    assert log.sizes == {"action": 4, "category": 3}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda s: s.replace(",", "\t"), "tabs"),
        (lambda s: s.replace("\n", "\r\n"), "line ends"),
        (lambda s: "\ufeff" + s + "\n\n", "byte order mark and empty last lines"),
        (lambda s: s.replace("00,", "00.5,"), "fractions of a second"),
    ],
)
def test_the_same_log_in_other_clothes(tmp_path: Path, change: object, name: str) -> None:
    tasks = {"liked": ["like"]}
    plain = read_log(write(tmp_path, GOOD), tasks, held_out=0.34)
    other = read_log(write(tmp_path, change(GOOD)), tasks, held_out=0.34)  # type: ignore[operator]
    assert (plain.item == other.item).all(), name
    assert (plain.time == other.time).all(), name


def test_labels(tmp_path: Path) -> None:
    rows = "".join(f"u,i{k},{k},{k % 2}\n" for k in range(10))
    log = read_log(write(tmp_path, "user,item,timestamp,label\n" + rows))
    assert log.tasks == ("label",)
    assert log.labels[:, 0].tolist() == [0, 1] * 5
    assert log.held_out.tolist() == [8]
    assert log.event_fields == {}
    assert np.unique(log.action[:8]).tolist() == [1, 2]


TASKS = {"liked": ["like"]}


@pytest.mark.parametrize(
    ("text", "tasks", "expected"),
    [
        ("", TASKS, "has no events"),
        ("user,item,timestamp,action\n", TASKS, "has no events"),
        (
            "user,thing,timestamp,action\na,b,1,like\n",
            TASKS,
            "line 1: no column 'item' in user, thing, timestamp, action",
        ),
        ("user,item,timestamp\na,b,1\n", TASKS, "line 1: expected one of the columns 'label' and 'action'"),
        ("user,item,timestamp,label,action\na,b,1,1,like\n", TASKS, "line 1: expected one of"),
        ("user,item,timestamp,action\na,b,1,like\na,b,2\n", TASKS, "line 3: has 3 cells, the header 4"),
        ("user,item,timestamp,action\n\na,b,1,like\n", TASKS, "line 2: has 1 cells"),
        ('user,item,timestamp,action\na,"b",1,like\n', TASKS, "line 2: has a quote"),
        ("user,item,timestamp,action\na,b,1,like\na,,1,like\n", TASKS, "line 3: column 'item' is empty"),
        ("user,item,timestamp,action\na,b,1,like\na,b,noon,like\n", TASKS, "line 3: column 'timestamp' is 'noon'"),
        ("user,item,timestamp,action\na,b,nan,like\n", TASKS, "line 2: column 'timestamp' is 'nan'"),
        (
            "user,item,timestamp,action\na,b,-1,like\n",
            TASKS,
            "line 2: column 'timestamp' is '-1'; expected UTC seconds",
        ),
        ("user,item,timestamp,action\na,b,1767225600000,like\n", TASKS, "milliseconds"),
        ("user,item,timestamp,label\na,b,1,0\na,b,2,2\n", {}, "line 3: column 'label' is '2'; expected 0 or 1"),
        ("user,item,timestamp,label\na,b,1,0\n", TASKS, "leave it out"),
        ("user,item,timestamp,action\na,b,1,like\na,b,2,view\n", {}, "say with --task NAME=ACTION,…"),
        (
            "user,item,timestamp,action\na,b,1,view\n",
            TASKS,
            "no event has the action 'like' of task 'liked'; it has view",
        ),
    ],
)
def test_bad_files_are_named_with_line_and_fix(
    tmp_path: Path, text: str, tasks: dict[str, list[str]], expected: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(StcaError) as e:
        read_log(file, tasks)
    assert expected in str(e.value)
    assert str(e.value).startswith(str(file))
    assert "\n" not in str(e.value)


def test_missing_file_and_bad_share(tmp_path: Path) -> None:
    with pytest.raises(StcaError, match=r"none\.csv: cannot be read"):
        read_log(tmp_path / "none.csv")
    with pytest.raises(StcaError, match="between 0 and 1"):
        read_log(write(tmp_path, GOOD), TASKS, held_out=1.0)
