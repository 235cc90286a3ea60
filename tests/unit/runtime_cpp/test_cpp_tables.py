"""Tables beside the graphs in C++: the same rows, scores and refusals as in Python, to the last bit and letter."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from building import MISSING, command
from make_golden import score, tensor
from onnx import TensorProto, helper, numpy_helper
from support import tables

from stca import commands as cli
from stca.bundle import Bundle
from stca.calibration.quantized_bundle import write_quantized
from stca.calibration.quantized_weights import RowFormat
from stca.errors import StcaError
from stca.manifest import MANIFEST
from stca.runtime import Request, Session

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to build the C++ runtime")

HIST, ITEM = [1, 7, 4999, 7, 1030], [5, 0, 4998]


class IdRows:
    """As golden.cpp's: every number of a row is its id."""

    def __init__(self, width: int, most: int) -> None:
        self.width, self.most = width, most

    def rows(self, ids: Any) -> Any:
        return np.repeat(ids[:, None], self.width, 1).astype(np.float32)


def hashed() -> onnx.ModelProto:
    """Ids that are hashed, and -1 for some of them: what is computed is looked up."""
    node = helper.make_node
    ids = [
        node("Mul", ["hist", "by"], ["far"], "mul"),
        node("Mod", ["far", "n"], ["low"], "mod"),
        node("Equal", ["hist", "seven"], ["is"], "is"),
        node("Where", ["is", "last", "low"], ["ids"], "where"),
    ]
    numbers = {"by": 2654435761, "n": 4999, "seven": 7, "last": -1}
    return tables.model(ids, tuple(numpy_helper.from_array(np.int64(x), n) for n, x in numbers.items()))


MODELS = {
    "straight": tables.model(),
    "half": tables.model(kind=TensorProto.FLOAT16),
    "brain": tables.model(kind=TensorProto.BFLOAT16),
    "hashed": hashed(),
}
# Of the table, as its manifest has it.
TYPES = tuple(f'"digests": "table_0.digests",\n   "dtype": "{name}"' for name in ("float32", "float64"))
NAMES = (*MODELS, "int8", "fp8")  # the last two are the first one's, quantized


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of each model, by its name."""
    root = tmp_path_factory.mktemp("tables")
    for name, model in MODELS.items():
        place = root / f"{name} made"
        place.mkdir()
        tables.split(model, place).path.rename(root / name)
    for kind in ("int8", "fp8"):
        write_quantized(Bundle.load(root / "straight"), {"table": RowFormat(kind)}, root / kind)
    return root


def run(build: Path, library: Path, folder: Path, cases: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(cases))
    environment = {**os.environ, "STCA_ONNXRUNTIME_LIBRARY": str(library)}
    command(build / "tests" / "stca_golden", folder, file, "--engine", "onnxruntime", env=environment)


def outcome(session: Session, inputs: dict[str, Any]) -> dict[str, Any]:
    """What Python makes of a request, as the file expects it."""
    arrays = {n: np.array(t["data"], t["dtype"]).reshape(t["shape"]) for n, t in inputs.items()}
    try:
        return {"scores": session.score(Request(arrays, user="u")).tolist()}
    except StcaError as e:
        return {"error": {"class": type(e).__name__, "kind": e.code, "text": str(e)}}


def case(folder: Path, name: str, *requests: dict[str, Any], own: dict[str, Any] | None = None) -> dict[str, Any]:
    sources = {n: IdRows(**x) for n, x in (own or {}).items()}
    session = Session.load(folder / name, threads=1, tables=sources)
    steps = [score(r, outcome(session, r), "u") for r in requests]
    more = {} if own is None else {"tables": own}
    return {"name": name, "bundle": name, "truncate": False, "cache_bytes": 1 << 20, "steps": steps, **more}


def request(hist: list[int] = HIST, item: list[int] = ITEM) -> dict[str, Any]:
    return {"hist": tensor("int64", hist), "item": tensor("int64", item)}


def test_scores_and_refusals_are_pythons(build: Path, onnxruntime_library: Path, folder: Path, tmp_path: Path) -> None:
    wrong = request(hist=[1, 5000])
    cases = [case(folder, name, request(), request([0]), request(item=[4999])) for name in NAMES]
    cases += [case(folder, "straight", request(), wrong), case(folder, "hashed", wrong)]
    cases += [case(folder, name, request(), own={"table": {"width": 16, "most": 9999}}) for name in NAMES]
    assert any("error" in step for one in cases for step in one["steps"])
    run(build, onnxruntime_library, folder, {"cases": cases}, tmp_path / "cases.json")


def test_a_computed_id_that_is_no_row_is_refused_alike(build: Path, onnxruntime_library: Path, tmp_path: Path) -> None:
    node = helper.make_node
    ids = [node("Mul", ["hist", "hist"], ["ids"], "square")]
    tables.split(tables.model(ids), tmp_path).path.rename(tmp_path / "squares")
    found = case(tmp_path, "squares", request([70]), request([71]))
    text = found["steps"][1]["error"]["text"]
    assert text == "table 'table': is asked for row 5041; it must be in [-5000, 4999]"
    run(build, onnxruntime_library, tmp_path, {"cases": [found]}, tmp_path / "cases.json")


def test_a_source_that_fails_and_one_of_no_table_are_named(
    build: Path, onnxruntime_library: Path, folder: Path, tmp_path: Path
) -> None:
    says = ["table 'table'", "its source failed for 5 ids", "no row 4999"]
    few = case(folder, "straight", own={"table": {"width": 16, "most": 100}})
    few["steps"] = [score(request(), {"error": {"code": 9, "says": says}}, "u")]
    run(build, onnxruntime_library, folder, {"cases": [few]}, tmp_path / "cases.json")
    other = {**few, "tables": {"other": {"width": 16, "most": 100}}}
    with pytest.raises(AssertionError, match="no table 'other' outside its graphs; it has table"):
        run(build, onnxruntime_library, folder, {"cases": [other]}, tmp_path / "cases.json")


def test_damaged_tables_are_refused_alike(build: Path, onnxruntime_library: Path, folder: Path, tmp_path: Path) -> None:
    def edit(find: str, put: str) -> dict[str, Any]:
        return {"op": "edit", "find": find, "put": put, "times": 1}

    damages = []
    for name, op, *says in (
        (
            "a flipped byte",
            {"op": "flip", "file": "table_0.rows", "at": 200_000},
            "block 0 of table 'table'",
        ),
        (
            "a shorter file",
            {"op": "cut", "file": "table_0.rows", "at": 1000},
            "has 1000 bytes",
            "320000",
            "copy it again",
        ),
        ("a longer file", {"op": "add", "file": "table_0.rows"}, "table_0.rows", "320000"),
        ("no rows", {"op": "remove", "file": "table_0.rows"}, "table_0.rows", "missing"),
        ("other digests", {"op": "flip", "file": "table_0.digests", "at": 3}, "table_0.digests", "changed"),
        ("no such table", edit('"table": "table"', '"table": "other"'), "'other'", "does not have"),
        ("another type", edit(*TYPES), "'float64'", "int8 or float8_e4m3fn"),
        ("blocks of three", edit('"block_rows": 16384', '"block_rows": 3'), "block_rows is 3", "power of two"),
        ("a file elsewhere", edit('"file": "table_0.rows"', '"file": "../t.rows"'), "no name of a file"),
        ("ids of nothing", edit('"ids": "hist"', '"ids": "none"'), "'none'", "no input"),
    ):
        damages.append({"name": name, "bundle": "straight", "ops": [op], "error": {"code": 6, "says": says}})
        place = tmp_path / name
        shutil.copytree(folder / "straight", place)
        file = place / op.get("file", MANIFEST)
        data = file.read_bytes()
        match op["op"]:
            case "flip":
                file.write_bytes(data[: op["at"]] + bytes([data[op["at"]] ^ 0x80]) + data[op["at"] + 1 :])
            case "cut":
                file.write_bytes(data[: op["at"]])
            case "add":
                file.write_bytes(data + b"more")
            case "remove":
                file.unlink()
            case _:
                assert op["find"].encode() in data
                file.write_bytes(data.replace(op["find"].encode(), op["put"].encode(), 1))
        with pytest.raises(StcaError) as caught:
            Bundle.load(place)
        assert [part for part in says if part not in str(caught.value)] == [], caught.value
    run(build, onnxruntime_library, folder, {"cases": [], "damages": damages}, tmp_path / "cases.json")


def test_the_command_line_scores_what_cpp_scores(
    build: Path, onnxruntime_library: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"inputs": {"hist": HIST, "item": ITEM}, "user": "u"}))
    arguments = ["score", str(folder / "hashed"), str(tmp_path / "r.json"), "--threads", "1", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["requests"][0]["scores"]
    step = score(request(), found, "u")
    told = {"name": "hashed", "bundle": "hashed", "truncate": False, "cache_bytes": 0, "steps": [step]}
    run(build, onnxruntime_library, folder, {"cases": [told]}, tmp_path / "cases.json")
