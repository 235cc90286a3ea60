"""The golden requests and bundles, run by the Python runtime; `golden.cpp` runs the same files in C++."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_golden import cases_text

import stca.errors
from stca.bundle import Bundle
from stca.errors import StcaError
from stca.runtime import Deadline, Request, RequestBatch, Session
from stca.runtime.cache import REASONS
from stca.runtime.store import JOINED, MEMORY

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
DOCS = HERE.parents[2] / "docs" / "cpp_runtime.md"


def error_codes() -> dict[type[StcaError], int]:
    """The code of each error class, from the table in the documentation."""
    rows = re.findall(r"^\| (\d+) \| `(?:STCA_\w+)` \| `(\w+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return {getattr(stca.errors, name): int(code) for code, name in rows if hasattr(stca.errors, name)}


def arrays(inputs: dict[str, Any]) -> dict[str, Any]:
    def array(dtype: str, shape: list[int], data: list[Any]) -> Any:
        kind = float if dtype.startswith("float") else int
        return np.array([kind(x) for x in data], dtype=dtype).reshape(shape)

    return {name: array(**tensor) for name, tensor in inputs.items()}


def deadline_of(step: dict[str, Any]) -> Deadline | None:
    if "deadline" not in step:
        return None
    deadline = Deadline(step["deadline"]["seconds"])
    if step["deadline"]["cancelled"]:
        deadline.cancel()
    return deadline


def perform(session: Session, step: dict[str, Any]) -> dict[str, Any]:
    """One step's outcome, in the form in which the file expects it."""
    match step["call"]:
        case "score":
            request = step["request"]
            one = Request(arrays(request["inputs"]), request["user"], request["version"])
            return {"scores": session.score(one, deadline=deadline_of(step)).tolist()}
        case "score_batch":
            request = step["request"]
            batch = RequestBatch(arrays(request["inputs"]), request["users"], request["versions"])
            return {"scores": session.score(batch, deadline=deadline_of(step)).tolist()}
        case "append":
            inputs = arrays(step["events"])
            return {"kept": session.append(step["user"], inputs, step["version"], after=step.get("after"))}
        case "amend":
            of = {"at": step["at"], "after": step["after"]}
            return {"kept": session.amend(step["user"], arrays(step["events"]), step["version"], **of)}
        case "warm":
            history = arrays(step["history"])
            return {"kept": session.warm(step["user"], history, step["version"], deadline=deadline_of(step))}
        case "forget":
            return {"kept": session.forget(step["user"])}
        case "residence":
            found = session.residence(step["user"], step["version"])
            return {"tier": found and found.tier, "kept_version": found and found.version}
        case "swap":
            session.swap(GOLDEN / step["bundle"])
            return {}
        case "stats":
            kept = session.stats()
            counts = {f"misses_{kind}": kept.misses_for.get(kind, 0) for kind in REASONS}
            counts |= {f"hits_{kind}": kept.hits_from.get(kind, 0) for kind in (MEMORY, JOINED)}
            counts |= dataclasses.asdict(kept)
            return {"stats": {name: counts[name] for name in step["stats"]}}
    raise AssertionError(step["call"])


def assert_error(error: StcaError, expected: dict[str, Any]) -> None:
    codes = error_codes()
    assert expected["code"] in [codes[c] for c in type(error).__mro__ if c in codes], error
    message = str(error)
    assert "\n" not in message
    assert [part for part in expected["says"] if part not in message] == [], message


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda c: c["name"].replace(" ", "-"))
def test_requests(case: dict[str, Any]) -> None:
    names = ("cache_bytes", "truncate", "max_users", "max_targets", "check_versions")
    session = Session.load(GOLDEN / case["bundle"], threads=1, **{n: case[n] for n in names if n in case})
    for number, step in enumerate(case["steps"]):
        if "error" in step:
            with pytest.raises(StcaError) as caught:
                perform(session, step)
            assert_error(caught.value, step["error"])
        else:
            expected = {k: step[k] for k in ("scores", "kept", "stats", "tier", "kept_version") if k in step}
            assert perform(session, step) == expected, f"step {number}"


def damaged(case: dict[str, Any], folder: Path) -> Path:
    """A copy of the case's bundle after its operations."""
    bundle = folder / "bundle"
    shutil.copytree(GOLDEN / case["bundle"], bundle)
    for op in case["ops"]:
        file = bundle / op.get("file", "manifest.json")
        data = file.read_bytes() if file.exists() else b""
        match op["op"]:
            case "remove":
                file.unlink()
            case "add":
                file.write_bytes(data + b"more")
            case "cut":
                file.write_bytes(data[: op["at"]])
            case "flip":
                file.write_bytes(data[: op["at"]] + bytes([data[op["at"]] ^ 0x80]) + data[op["at"] + 1 :])
            case "link":
                file.rename(folder / "elsewhere")
                file.symlink_to(folder / "elsewhere")
            case "edit":
                assert op["find"].encode() in data
                file.write_bytes(data.replace(op["find"].encode(), op["put"].encode() * op["times"], 1))
            case other:
                raise AssertionError(other)
    return bundle


@pytest.mark.parametrize("case", CASES["damages"], ids=lambda c: c["name"].replace(" ", "-"))
def test_bundles(case: dict[str, Any], tmp_path: Path) -> None:
    bundle = damaged(case, tmp_path)
    if "error" not in case:
        assert Bundle.load(bundle).manifest.weights
        return
    with pytest.raises(StcaError) as caught:
        Bundle.load(bundle)
    assert_error(caught.value, case["error"])


def test_every_error_class_has_a_code() -> None:
    classes = {c for c in vars(stca.errors).values() if isinstance(c, type) and issubclass(c, StcaError)}
    codes = error_codes()
    assert set(codes) == classes
    assert len(set(codes.values())) == len(codes)


def test_the_file_is_what_the_generator_writes() -> None:
    assert (GOLDEN / "cases.json").read_text(encoding="utf-8") == cases_text(), "run make_golden.py"
