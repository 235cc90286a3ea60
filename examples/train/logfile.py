"""A real interaction log from a text file.

Comma- or tab-separated (whichever the header uses), one event a line, no quotes, with a header that names the columns
in any order; other columns are ignored:

| column | what |
|---|---|
| `user`, `item` | any text |
| `timestamp` | UTC seconds |
| `label` | 0 or 1; or instead |
| `action` | any text (`view`, `buy`, a rating …); tasks then say which actions count as a positive |
| `category` | optional, of the item; any text |

Each user's last events are held out for evaluation, the earlier ones are for training. Ids are numbered from 1 in the
training events; 0 is whatever occurs in held-out events alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stca.errors import StcaError
from stca.examples.train.log import Log

Cells = NDArray[np.bytes_]

# Seconds stay below this until the year 5138; milliseconds have been above it since 1973.
_LARGEST_SECONDS = 1e11


def read_log(
    path: str | os.PathLike[str], tasks: Mapping[str, Sequence[str]] | None = None, *, held_out: float = 0.2
) -> Log:
    """Read a log.

    Args:
        path: of the file.
        tasks: for a file with `action`: which actions are a positive of each task, by the task's name.
        held_out: share of each user's events, the latest, to evaluate on; rounded down.

    Raises:
        StcaError: naming file, line and column of what is wrong, and what is expected.
    """
    file = Path(path)
    tasks = tasks or {}
    if not 0 < held_out < 1:
        raise StcaError(f"the held-out share is {held_out}; it must be between 0 and 1")
    columns = _read_cells(file)
    labels = _labels(file, columns, tasks)
    _, user = np.unique(columns["user"], return_inverse=True)
    seconds = _numbers(file, columns, "timestamp", "UTC seconds", lambda x: (x >= 0) & (x < _LARGEST_SECONDS))
    order = np.lexsort((seconds, user))  # stable: events of one second stay in the file's order
    begin = np.searchsorted(user[order], np.arange(user.max() + 2))
    held_from = begin[1:] - np.floor(np.diff(begin) * held_out).astype(np.int64)
    training = np.arange(len(order)) < np.repeat(held_from, np.diff(begin))

    ids = {
        name: _ids(columns[name][order], training)
        for name in ("item", "action", "label", "category")
        if name in columns
    }
    action, actions = ids["action"] if "action" in ids else ids["label"]
    item, items = ids["item"]
    category = {"category": ids["category"]} if "category" in ids else {}
    return Log(
        user_offsets=begin.astype(np.int64),
        held_out=held_from,
        item=item,
        time=seconds[order].astype(np.int64),
        action=action,
        labels=labels[order],
        items=items,
        sizes={"action": actions, **{name: size for name, (_, size) in category.items()}},
        tasks=tuple(tasks) or ("label",),
        event_fields={name: column for name, (column, _) in category.items()},
    )


def _read_cells(file: Path) -> dict[str, Cells]:
    """The known columns by name, as bytes."""
    try:
        raw = file.read_bytes()
    except OSError as e:
        raise StcaError(f"{file}: cannot be read ({e.strerror}); --log needs a CSV or TSV file") from e
    lines = raw.removeprefix(b"\xef\xbb\xbf").rstrip().splitlines()
    if len(lines) < 2:
        raise StcaError(f"{file}: has no events; expected a header line and one event a line")
    delimiter = b"\t" if b"\t" in lines[0] else b","
    names = [name.decode(errors="replace").strip() for name in lines[0].split(delimiter)]
    for name in ("user", "item", "timestamp"):
        if name not in names:
            raise StcaError(f"{file}, line 1: no column {name!r} in {', '.join(names)}; name it in the header")
    if ("label" in names) == ("action" in names):
        raise StcaError(f"{file}, line 1: expected one of the columns 'label' and 'action'; rename or remove the other")
    body = np.array(lines[1:])
    found = np.char.count(body, delimiter) + 1
    if (found != len(names)).any():
        row = int(np.argmax(found != len(names)))
        raise StcaError(f"{file}, line {row + 2}: has {found[row]} cells, the header {len(names)}; add or remove cells")
    if (np.char.find(body, b'"') >= 0).any():
        row = int(np.argmax(np.char.find(body, b'"') >= 0))
        raise StcaError(
            f"{file}, line {row + 2}: has a quote; write cells without quotes, with tabs between if need be"
        )
    cells = np.char.strip(np.array(delimiter.join(lines[1:]).split(delimiter)).reshape(-1, len(names)))
    columns = {}
    for name in ("user", "item", "timestamp", "label", "action", "category"):
        if name in names:
            columns[name] = cells[:, names.index(name)]
            if (columns[name] == b"").any():
                row = int(np.argmax(columns[name] == b""))
                raise StcaError(f"{file}, line {row + 2}: column {name!r} is empty; fill it in or remove the line")
    return columns


def _labels(file: Path, columns: Mapping[str, Cells], tasks: Mapping[str, Sequence[str]]) -> NDArray[np.uint8]:
    """`[N, tasks]` 0 or 1, from `label` or from what the tasks say of `action`."""
    if "label" in columns:
        if tasks:
            raise StcaError(f"{file}: has labels, and --task is for files with actions; leave it out")
        label = _numbers(file, columns, "label", "0 or 1", lambda x: (x == 0) | (x == 1))
        return label.astype(np.uint8)[:, None]
    known = np.unique(columns["action"])
    shown = ", ".join(a.decode(errors="replace") for a in known[:10].tolist())
    if not tasks:
        raise StcaError(f"{file}: say with --task NAME=ACTION,… which actions count as positive; it has {shown}")
    positives = []
    for name, actions in tasks.items():
        for action in actions:
            if action.encode() not in known:
                raise StcaError(f"{file}: no event has the action {action!r} of task {name!r}; it has {shown}")
        positives.append(np.isin(columns["action"], np.array([a.encode() for a in actions])))
    return np.stack(positives, axis=1).astype(np.uint8)


def _numbers(file: Path, columns: Mapping[str, Cells], name: str, expected: str, valid: Any) -> NDArray[np.float64]:
    """A column as float64, every value of which is `valid`."""
    cells = columns[name]
    try:
        values = cells.astype(np.float64)
    except ValueError:
        values = np.array([_number(cell) for cell in cells.tolist()])
    wrong = ~valid(values)  # NaN included: it compares false
    if wrong.any():
        row = int(np.argmax(wrong))
        hint = " (milliseconds? divide by 1000)" if name == "timestamp" and values[row] >= _LARGEST_SECONDS else ""
        text = cells[row].decode(errors="replace")
        raise StcaError(f"{file}, line {row + 2}: column {name!r} is {text!r}; expected {expected}{hint}")
    return values


def _number(cell: bytes) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _ids(cells: Cells, training: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """Ids from 1 for what the training rows have, 0 for the rest; and how many ids there are."""
    values, index = np.unique(cells, return_inverse=True)
    seen = np.zeros(len(values), bool)
    seen[index[training]] = True
    return np.where(seen, np.cumsum(seen), 0)[index], int(seen.sum()) + 1
