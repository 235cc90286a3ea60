"""The page about a load: its data's own numbers, whatever is missing, nothing loaded, equal bytes."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from support.errors import one_line

from stca import commands
from stca.errors import StcaError
from stca.report.load_page import write_load

RUN: dict[str, Any] = {
    "scenario": "server", "seconds": 20.0, "requests": 400, "offered_per_second": 20.0, "answered_per_second": 18.5,
    "goodput_per_second": 17.3, "deadline_ms": 250.0,
    "latency_ms": {"p50": 21.5, "p95": 104.25, "p99": 178.125, "mean": 30.0, "max": 340.0},
    "codes": {"ok": 370, "overloaded": 30}, "hits": 350, "misses": 20, "resent": 7, "appended": 190,
    "not_appended": 3, "late_ms": 1.0,
    "percentiles_ms": {
        "all": {"50": 21.5, "90": 80.0, "99": 178.125}, "hits": {"50": 20.75, "99": 90.0}, "misses": {"50": 95.5},
    },
    "timeline": [
        {"at": 10.0 * i, "offered_per_second": 20.0 + i, "answered_per_second": 18.0 - i, "p50_ms": 20.0 + i,
         "p95_ms": 90.0 + i}
        for i in range(3)
    ],
    "left": 0, "store": {},
}  # fmt: skip
NOBODY: dict[str, Any] = {
    **RUN, "latency_ms": {}, "answered_per_second": 0.0, "codes": {"connection": 400}, "hits": 0, "misses": 0,
    "percentiles_ms": {"all": {}, "hits": {}, "misses": {}},
    "timeline": [{**part, "p50_ms": None, "p95_ms": None} for part in RUN["timeline"]],
}  # fmt: skip
TRAFFIC = {"users": 50, "history": [10, 40], "spike": None, "events": 1.5}


def page(tmp_path: Path, *, target: str = "bundle", **runs: Any) -> str:
    made = write_load(
        tmp_path / "load.html",
        {"target": target, "traffic": TRAFFIC, **runs},
        commands=("stca load bundle",),
        machine={"cpu": "A CPU"},
        versions={"stca": "0"},
    )
    return made.read_text(encoding="utf-8")


def test_every_number_is_the_datas_own(tmp_path):
    text = page(tmp_path, load=RUN)
    root = ET.fromstring(text.removeprefix("<!DOCTYPE html>"))
    shown = {element.attrib["value"] for element in root.iter("data")}
    wanted = [RUN["requests"], RUN["hits"], RUN["misses"], RUN["resent"], RUN["appended"], RUN["not_appended"], 30]
    wanted += [RUN["answered_per_second"], *(ms for of in RUN["percentiles_ms"].values() for ms in of.values())]
    assert {repr(n) for n in wanted} <= shown
    assert repr(RUN["goodput_per_second"] / RUN["answered_per_second"]) in shown
    assert "30 of 400 requests got no scores" in text
    assert "server scenario" in text
    assert text == page(tmp_path, load=RUN), "equal data, equal bytes"
    assert not re.search(r'(?:src|href)="(?!#)|url\((?!#)|<script', text)


def test_the_pictures_show_the_run(tmp_path):
    root = ET.fromstring(page(tmp_path, load=RUN).removeprefix("<!DOCTYPE html>"))
    told = {
        svg.attrib["aria-label"].partition(".")[0]: svg.attrib["aria-label"]
        for svg in root.iter()
        if "aria-label" in svg.attrib
    }
    assert "hits: 20.8 ms at 2, 90.0 ms at 100" in told["Latency by rarity"]
    assert "misses: 95.5 ms at 2" in told["Latency by rarity"]
    assert "offered: 20 at 0, 21 at 10, 22 at 20" in told["Requests a second"]
    assert "p95: 90.0 ms at 0" in told["Latency over time"]
    assert "target 350, user 20, other 30" in told["What came of the requests"]


def test_runs_are_compared_and_the_offline_scenario_says_what_a_store_gains(tmp_path):
    offline = {**RUN, "scenario": "offline", "codes": {"ok": 400}, "deadline_ms": None}
    without = {**copy.deepcopy(offline), "answered_per_second": 5.0, "hits": 0, "misses": 400}
    text = page(tmp_path, load=offline, without_store=without)
    assert "without a store" in text
    assert "3.70×" in text
    assert "Every request was answered" in text
    assert "offered:" not in text, "offline there is no rate at which requests come"


@pytest.mark.parametrize("run", [NOBODY, {**NOBODY, "requests": 0, "codes": {}, "timeline": []}])
def test_a_run_without_an_answer_is_a_page_too(tmp_path, run):
    text = page(tmp_path, load=run, target="http://127.0.0.1:1/v2/models/<&>")
    ET.fromstring(text.removeprefix("<!DOCTYPE html>"))
    assert "Too few requests were answered" in text


def test_the_command_writes_it(bundle_dir, tmp_path, capsys):
    out = tmp_path / "made" / "load.html"
    command = ["load", str(bundle_dir), "--seconds", "0.5", "--rate", "60", "--history", "3,20", "--targets", "1,4"]
    assert commands.main([*command, "--report", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(out)
    assert repr(told["load"]["hits"]) in re.findall(r'<data value="([^"]+)"', out.read_text(encoding="utf-8"))
    assert commands.main([*command, "--report", str(tmp_path)]) == 2
    assert "--report" in capsys.readouterr().err
    with one_line(StcaError):
        write_load("/dev/null/page.html", {"target": "b", "traffic": {}, "load": RUN})
