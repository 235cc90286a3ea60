"""The page: what is there and what is not, the data's own numbers, nothing loaded, nothing run, equal bytes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from decimal import Decimal
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from support import tiny

from stca import report
from stca.bundle import Bundle
from stca.errors import StcaError
from stca.export.pipeline import split_onnx
from stca.report import ReportData, formats
from stca.report.blocks import condense
from stca.report.page import block_name

SVG = "{http://www.w3.org/2000/svg}"
STAGES = ("user_encoder", "target_scorer", "hit", "miss", "pointwise")

PARITY = {
    "passed": True,
    "weights": "0" * 64,
    "precision": "float32",
    "reference": "float64 torch",
    "stages": [
        {
            "name": name, "against": "float64 torch", "max_abs": error, "max_rel": 3 * error, "cosine": 1 - 1e-13,
            "topk_overlap": 1.0, "limit": limit, "passed": True,
        }
        for name, error, limit in
        (("torch", 2.03e-7, 0.01), ("request_graph", 1.51e-7, 6.25e-7), ("session", 0.0, 6.25e-7))
    ],
}  # fmt: skip
BENCH = {
    "rows": [
        {
            "history": n, "targets": m, "stage": stage, "p50_ms": 0.731 * (i + 1) * n * m / 100,
            "p95_ms": 0.757 * (i + 1) * n * m / 100, "p99_ms": 0.811 * (i + 1) * n * m / 100, "runs": 11 + i,
            "measured_targets": min(m, 2) if stage == "pointwise" else m,
        }
        for n in (512, 2048)
        for m in (1, 32)
        for i, stage in enumerate(STAGES)
    ],
    "ratios": [
        {"history": n, "targets": m, "pointwise_over_miss": n / 41, "miss_over_hit": m / 7 + 1}
        for n in (512, 2048)
        for m in (1, 32)
    ],
    "machine": {"cpu": "A CPU", "cores": 2},
    "versions": {"onnxruntime": "8.8"},
}  # fmt: skip
AUC = [
    {"history": n, "task": task, "auc": 0.6 + n / 100_000, "best": 0.7 + n / 90_000}
    for n in (512, 2048, 8192)
    for task in ("finish", "like")
]


@pytest.fixture
def data(bundle_dir) -> ReportData:
    return ReportData(
        title="A report",
        bundle=Bundle.load(bundle_dir),
        parity=PARITY,
        bench=BENCH,
        auc=AUC,
        trained_history=2048,
        machine={"memory": "8 GiB"},
        commands=("stca demo --out x",),
        versions={"torch": "9.9"},
    )


def _parse(page: str) -> ET.Element:
    head, _, rest = page.partition("\n")
    assert head == "<!DOCTYPE html>"
    return ET.fromstring(rest)


def _text(element: ET.Element) -> str:
    return "".join(element.itertext())


def _table(page: ET.Element, caption: str) -> list[list[str]]:
    """The body of a table: exact values where there are any, else text."""
    found = next(t for t in page.iter("table") if _text(t.find("caption")) == caption)
    return [
        [cell.find("data").attrib["value"] if cell.find("data") is not None else _text(cell) for cell in row]
        for row in found.find("tbody")
    ]


def test_numbers_are_the_data(data):
    page = _parse(report.render(data))
    keys = ("p50_ms", "p95_ms", "p99_ms", "runs")
    assert [row[:2] + row[3:7] for row in _table(page, "Latency of each stage")] == [
        [repr(r["history"]), repr(r["targets"]), *(repr(r[k]) for k in keys)]
        for r in sorted(BENCH["rows"], key=lambda r: (r["history"], r["targets"]))
    ]
    assert _table(page, "Ratios of medians") == [[repr(v) for v in r.values()] for r in BENCH["ratios"]]
    assert [row[1:6] for row in _table(page, "Parity")] == [
        [repr(s[k]) for k in ("max_abs", "limit", "max_rel", "cosine", "topk_overlap")] for s in PARITY["stages"]
    ]
    by_task = sorted(AUC, key=lambda r: r["task"])
    assert _table(page, "AUC") == [[r["task"], *(repr(r[k]) for k in ("history", "auc", "best"))] for r in by_task]
    headline = [d.attrib["value"] for d in page.find(".//header").iter("data")]
    assert headline == [repr(2048 / 41), repr(32 / 7 + 1), repr(1.51e-7), repr(AUC[-2]["auc"])]
    words = [_text(d) for d in page.find(".//header").iter("dt")]
    assert ["scaled from 2" in w for w in words] == [True, False, False, False]
    files = data.bundle.manifest.files
    assert _table(page, "Files") == [[n, repr(f["bytes"]), f["sha256"]] for n, f in files.items()]


def test_every_number_shown_is_rounded_from_its_value(data):
    """What a person reads beside each exact value is that value to the digits shown."""
    units = {"s": 1e3, "ms": 1, "µs": 1e-3, "kB": 1e3, "MB": 1e6, "kFLOP": 1e3, "MFLOP": 1e6, "GFLOP": 1e9, "%": 0.01}
    checked = 0
    page = _parse(report.render(data))
    parity = next(t for t in page.iter("table") if _text(t.find("caption")) == "Parity")
    complements = {row[4].find("data") for row in parity.find("tbody")}  # of the cosine, 1 − cosine is shown
    for d in page.iter("data"):
        exact, shown = float(d.attrib["value"]), d.text
        if d in complements or shown[0] in "<>":
            continue
        number, _, unit = shown.replace(",", "").replace("×10", "e").rstrip("×").partition(" ")
        number = Decimal(number.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
        last_digit = 10.0 ** number.as_tuple().exponent * units.get(unit, 1)
        assert float(number) * units.get(unit, 1) == pytest.approx(exact, rel=0.005, abs=0.501 * last_digit), shown
        checked += 1
    assert checked > 100


def _charts(page: ET.Element) -> dict[tuple[str, str], ET.Element]:
    """Charts by name and size; the picture of the graph has the size `graph`."""
    return {(svg.find(f"{SVG}title").text, svg.get("class").split()[-1]): svg for svg in page.iter(f"{SVG}svg")}


def _line(chart: ET.Element, name: str) -> list[list[tuple[float, float]]]:
    """The points of a line by panel, in pixels."""
    return [
        [tuple(map(float, p.split())) for p in re.split("[ML]", g.find(f"{SVG}path").get("d"))[1:]]
        for g in chart.iter(f"{SVG}g")
        if re.fullmatch(rf".*-line-{name}", g.get("id", ""))
    ]


def test_pictures_hold_the_data(data):
    charts = _charts(_parse(report.render(data)))
    named = ("Error of each stage", "Latency", "What is inside a miss", "AUC")
    sizes = ("narrow", "middle", "wide")
    assert set(charts) == {("The two graphs and their cut", "graph"), *((n, s) for n in named for s in sizes)}
    for size in sizes:
        latency = charts["Latency", size]
        lines = {name: _line(latency, name) for name in ("pointwise", "miss", "hit")}
        assert [len(panels) for panels in lines.values()] == [2, 2, 2]  # 1 and 32 candidates
        for panel in (0, 1):
            for i in (0, 1):  # slower is higher up, which is a smaller y
                heights = [lines[name][panel][i][1] for name in ("pointwise", "miss", "hit")]
                assert heights == sorted(heights)
            # On a log-log chart the same factor is the same distance: time grows as the history does in all three.
            rises = [at[panel][0][1] - at[panel][1][1] for at in lines.values()]
            assert rises == pytest.approx([rises[0]] * 3, abs=0.05)
        assert "512" in _text(latency)
        assert "exact" in _text(charts["Error of each stage", size])


def test_tasks_share_their_axes(data):
    """Equal AUC at equal height: what one task's chart shows can be read beside the other's."""
    auc = [
        {"history": n, "task": task, "auc": 0.6 + 0.2 * (task == "like")} for n in (512, 2048) for task in ("a", "like")
    ]
    auc.append({"history": 4096, "task": "a", "auc": 0.8})
    auc.append({"history": 4096, "task": "like", "auc": 0.8})
    chart = _charts(_parse(report.render(dataclasses.replace(data, auc=auc))))["AUC", "wide"]
    a, like = _line(chart, "model")
    assert a[2][1] == pytest.approx(like[2][1], abs=0.01)
    assert a[0][1] > like[0][1] + 20


def test_charts_tell_the_same_times(data):
    """The miss that holds the two halves ends where the miss of the first chart is, whatever the halves alone took."""
    charts = _charts(_parse(report.render(data)))
    times = [r for r in BENCH["rows"] if (r["targets"], r["stage"]) == (32, "miss")]
    at_512, at_2048 = (formats.milliseconds(r["p50_ms"]) for r in times)
    assert f"32 candidates, 2,048 events: {at_2048}" in _text(charts["What is inside a miss", "wide"])
    assert f"miss: {at_512} at 512, {at_2048} at 2,048" in charts["Latency", "wide"].find(f"{SVG}desc").text


def test_engines_stand_side_by_side_and_the_charts_are_of_the_first(data):
    first = [{**r, "engine": "tensorrt"} for r in BENCH["rows"] if r["stage"] != "pointwise"]
    other = [{**r, "engine": "graphs", **{p: 10 * r[p] for p in ("p50_ms", "p95_ms", "p99_ms")}} for r in BENCH["rows"]]
    halves = {"user_encoder": "an encoder", "target_scorer": "a scorer"}
    said = {"measured": {"tensorrt": halves, "graphs": halves}, "absent": {"tensorrt-rtx": "there is no GPU here"}}
    ratios = [{**r, "engine": e} for e in ("tensorrt", "graphs") for r in BENCH["ratios"]]
    bench = {**BENCH, "rows": [*first, *other], "ratios": ratios, **said}
    page = _parse(report.render(dataclasses.replace(data, bench=bench)))
    alone = _parse(report.render(data))
    hit = next(r["p50_ms"] for r in BENCH["rows"] if (r["history"], r["targets"], r["stage"]) == (512, 1, "hit"))
    row = _table(page, "Engines side by side")[0]
    assert [float(x) for x in row[3:]] == pytest.approx([hit, 10 * hit])
    assert ["tensorrt-rtx", "not measured: there is no GPU here"] in _table(page, "The engines")
    assert _table(page, "Ratios of medians") == _table(alone, "Ratios of medians")
    charts, plain = (_charts(p)["What is inside a miss", "wide"] for p in (page, alone))
    assert _text(charts) == _text(plain)
    assert not any("Engines" in _text(t.find("caption")) for t in alone.iter("table"))


def test_text_is_never_small(data):
    """At each width the drawing for it is shown, so that its text is 11 pixels or more."""
    page = _parse(report.render(data))
    css = _text(page.find(".//style"))
    for (_, size), svg in _charts(page).items():
        if size == "graph":
            width = float(svg.get("viewBox").split()[2])
            least = float(re.search(r"min-width: (\d+)px", svg.get("style"))[1])
            fonts = [12.0, 13.0, 16.0]
            assert {float(n) for n in re.findall(r"svg\.graph[^}]*font-size: ([\d.]+)px", css)} == set(fonts)
            assert min(fonts) * least / width >= 11
        else:
            fonts = [
                float(n)
                for e in svg.iter(f"{SVG}text")
                for n in re.findall(r"font(?:-size)?: (?:bold )?([\d.]+)px", e.get("style", ""))
            ]
            assert fonts
            assert min(fonts) >= 12


def test_every_picture_has_words(data):
    for svg in _parse(report.render(data)).iter(f"{SVG}svg"):
        alone = ET.fromstring(ET.tostring(svg))
        assert alone.get("role") == "img"
        assert len(alone.find(f"{SVG}title").text) > 2
        assert len(alone.find(f"{SVG}desc").text) > 40
        assert alone.find(f"{SVG}desc").text in alone.get("aria-label")


def test_a_phone_sees_both_sides_of_the_cut(data):
    """The picture as a list has every block and every tensor that crosses."""
    page = _parse(report.render(data))
    upright = _text(next(d for d in page.iter("div") if d.get("class") == "upright"))
    graph = condense(data.bundle)
    for block in graph.blocks:
        assert block_name(block, graph) in upright
    for state in graph.state:
        assert state.name in upright
    assert upright.index("User encoder") < upright.index("User state") < upright.index("Target scorer")


def test_tables_name_each_cell(data):
    """On a phone a row is a card: each cell says which column it is of."""
    for table in _parse(report.render(data)).iter("table"):
        head = [_text(h) for h in table.iter("th")]
        for row in table.find("tbody"):
            assert [cell.get("data-label") for cell in row] == (head or ["", ""])


def test_versions_that_made_the_numbers(data):
    rows = {row[0]: row[1:] for row in _table(_parse(report.render(data)), "Versions")}
    assert rows["torch"][-1] == "9.9"
    assert rows["onnxruntime"][-1] == "8.8"  # from the bench
    assert rows["stca"][0] == data.bundle.manifest.producer["stca"]


PARTS = {
    "parity": ("Are the numbers", "stca verify", "Error of each stage", {"parity": None}),
    "bench": ("How fast", "stca bench", "Latency", {"bench": None}),
    "auc": ("Does a longer", "takes a log", ">AUC<", {"auc": ()}),
}


def calibrated(data: ReportData, *, searched: bool = True) -> ReportData:
    """The data of a bundle that went to 8 bits under a budget."""

    def tried(count: int, verdict: str) -> dict[str, object]:
        measure = {"name": "top10 finish", "estimate": {"value": 0.9 + count / 1000}, "verdict": verdict}
        names = [f"tensor.{i}" for i in range(20)]
        return {
            "quantized": names[:count], "high": names[count:], "bytes": 1000 - 30 * count, "ratio": 0.27,
            "weights_ratio": 0.6, "rms": count * 1e-5, "measures": [measure], "verdict": verdict,
        }  # fmt: skip

    parts = [{"name": f"tensor.{i}", "node": f"node 'n{i}'", "rms": (i + 1) * 1e-6, "saved": 30} for i in range(20)]
    chosen = [tried(20, "broken"), tried(15, "undecided"), tried(10, "holds")]
    told = {
        "budget": {"auc": 0.0005, "top": {"10": 0.99}}, "requests": 64, "float32_bytes": 1000,
        "tried": chosen if searched else [tried(20, "holds")], "parts": parts if searched else [],
    }  # fmt: skip
    manifest = dataclasses.replace(data.bundle.manifest, quantization=told)
    return dataclasses.replace(data, bundle=dataclasses.replace(data.bundle, manifest=manifest))


def test_what_is_in_8_bits_is_shown_with_what_it_costs(data):
    page = _parse(report.render(calibrated(data)))
    assert "10 of 20 tensors are in 8 bits. On 64 recorded requests, AUC may change by 0.0005 and" in _text(page)
    assert [row[0] for row in _table(page, "What was tried")] == ["20", "15", "10"]
    alone = _table(page, "Each tensor alone")
    assert (len(alone), alone[9][4], alone[10][4]) == (20, "8 bits", "as it was")
    front = _charts(page)["Bytes against error", "wide"]
    assert len(_line(front, "added-up")[0]) == 20
    assert "holds: 0.00010 at 70" in front.attrib["aria-label"]
    bars = _charts(page)["Error of each tensor alone", "narrow"].attrib["aria-label"]
    assert "tensor.19" in bars
    assert "tensor.7" not in bars


def test_what_held_at_once_needs_no_chart(data):
    page = _parse(report.render(calibrated(data, searched=False)))
    assert "20 of 20 tensors are in 8 bits" in _text(page)
    assert not {title for title, _ in _charts(page)} & {"Bytes against error", "Error of each tensor alone"}
    assert "What is kept in 8 bits?" not in _text(_parse(report.render(data)))


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_left_out_with_its_reason(data, part):
    heading, reason, picture, nothing = PARTS[part]

    def section(**changes: object) -> ET.Element:
        page = _parse(report.render(dataclasses.replace(data, **changes)))
        return next(s for s in page.iter("section") if s.find("h2").text.startswith(heading))

    assert picture in ET.tostring(section(), encoding="unicode")
    assert not [p for p in section().iter("p") if p.get("class") == "missing"]
    left_out = section(**nothing)
    assert reason in _text(left_out)
    assert not list(left_out.iter(f"{SVG}svg"))
    assert not list(left_out.iter("table"))
    assert "no log here" in _text(section(**nothing, absent={part: "no log here"}))


def test_bare_bundle(bundle_dir):
    page = _parse(report.render(ReportData(title="Bare", bundle=Bundle.load(bundle_dir))))
    assert "Not checked" in _text(page)
    assert page.find(".//header").find(".//data") is None  # no headline number that was not measured
    assert [s.find("h2").text for s in page.iter("section")][1] == "The graph and its cut"
    assert len(list(page.iter(f"{SVG}svg"))) == 1


def test_what_failed_or_is_no_number_says_so(data):
    stages = [dict(s) for s in PARITY["stages"]]
    stages[1].update(max_abs=math.inf, max_rel=math.inf, cosine=math.nan, passed=False)
    ratios = [{**r, "pointwise_over_miss": math.nan} for r in BENCH["ratios"]]
    page = _parse(
        report.render(
            dataclasses.replace(
                data, parity={**PARITY, "passed": False, "stages": stages}, bench={**BENCH, "ratios": ratios}
            )
        )
    )
    badge = next(s for s in page.iter("span") if "badge" in s.get("class", ""))
    assert badge.get("class") == "badge bad"
    assert "request_graph" in badge.text
    assert _table(page, "Parity")[1][-1] == "failed"
    assert _table(page, "Ratios of medians")[0][2] == "–"
    headline = [_text(d) for d in page.find(".//header").iter("data")]
    assert headline == ["5.57×", "∞", "0.6819", headline[3]]
    assert "nan" not in ET.tostring(page.find(".//body"), encoding="unicode").lower().replace("reference_nan", "")


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\x00\ud800'


def test_everything_is_escaped(tmp_path):
    name = '"><script>alert(1)</script>&'
    model = parser.parse_model("""<ir_version: 10, opset_import: ["": 18]>
        g (int64[N_h] clicks, int64[N_t] candidates) => (float[N_t, 4] score) {
        h = Gather <axis: int = 0> (table, clicks)
        e = MatMul (h, w)
        u = ReduceSum <keepdims: int = 0> (e, axis)
        t = Gather <axis: int = 0> (table, candidates)
        score = Mul (t, u)
        }""")
    for n, value in (("table", np.ones((5, 4), "f4")), ("w", np.ones((4, 4), "f4")), ("axis", np.array([0]))):
        model.graph.initializer.append(numpy_helper.from_array(value, n))
    for node in model.graph.node:
        node.input[:] = [f"{i}{name}" if i in ("clicks", "e") else i for i in node.input]
        node.output[:] = [f"{o}{name}" if o == "e" else o for o in node.output]
    model.graph.input[0].name += name
    onnx.save(model, tmp_path / "m.onnx")
    scopes = {f"clicks{name}": "user", "candidates": "target"}
    bundle = split_onnx(tmp_path / "m.onnx", scopes, tmp_path / "<script>b", prove=tiny.no_proof)  # type: ignore[arg-type]
    rows = [{**r, "stage": r["stage"] if r["stage"] != "miss" else HOSTILE} for r in BENCH["rows"]]
    out = report.write(
        tmp_path / "r.html",
        ReportData(
            title=HOSTILE,
            bundle=bundle,
            parity={**PARITY, "reference": HOSTILE, "stages": [{**s, "name": HOSTILE} for s in PARITY["stages"]]},
            bench={
                "rows": rows,
                "ratios": [{**r, HOSTILE: 2.0} for r in BENCH["ratios"]],
                "machine": {HOSTILE: HOSTILE},
            },
            auc=[{**r, "task": HOSTILE, HOSTILE: 0.7} for r in AUC],
            commands=(HOSTILE,),
            versions={HOSTILE: HOSTILE},
            absent={"auc": HOSTILE},
        ),
    )
    page = _parse(out.read_text(encoding="utf-8"))
    tags = {e.tag for e in page.iter()}
    assert {"script", "img", "link", "iframe", "object", "a"}.isdisjoint(tags)
    assert not [k for e in page.iter() for k in e.attrib if k.startswith("on")]
    assert _text(page.find(".//h1")).startswith('"><script>alert(1)</script><img')
    assert any(name in (t.text or "") for t in page.iter("code"))


def test_nothing_is_loaded(data):
    text = report.render(data)
    page = _parse(text)
    assert not [e for e in page.iter() for k in e.attrib if k in ("src", "srcset", "data", "action", "poster")]
    assert all(e.get("href", "#").startswith("#") for e in page.iter())
    assert "script" not in {e.tag for e in page.iter()}
    addresses = text.replace("http://www.w3.org/2000/svg", "")
    for forbidden in ("http:", "https:", "//cdn", "@import", "@font-face", "javascript:"):
        assert forbidden not in addresses
    assert text.count("url(") == text.count("url(#")
    assert len(text.encode()) < 1_500_000


def test_equal_data_gives_equal_bytes(data, tmp_path):
    """In another process, too, where sets have another order; and without torch."""
    code = """if True:
        import json, sys
        from stca import report
        from stca.bundle import Bundle
        values = json.load(open(sys.argv[1]))
        report.write(sys.argv[3], report.ReportData(bundle=Bundle.load(sys.argv[2]), **values))
        assert "torch" not in sys.modules, "a report needs no torch"
        """
    values = {k: v for k, v in vars(data).items() if k != "bundle"}
    (tmp_path / "data.json").write_text(json.dumps(values))
    outs = [tmp_path / "here.html", tmp_path / "there.html"]
    report.write(outs[0], data)
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    args = [sys.executable, "-c", code, tmp_path / "data.json", data.bundle.path, outs[1]]
    subprocess.run(list(map(str, args)), check=True, env=env)
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_write_is_whole_or_not_at_all(data, tmp_path):
    out = tmp_path / "deep" / "report.html"
    assert report.write(out, data) == out
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    before = out.read_bytes()
    report.write(out, data)
    assert out.read_bytes() == before
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(StcaError, match="cannot be written") as caught:
        report.write(blocked / "report.html", data)
    assert "\n" not in str(caught.value)
    with pytest.raises(StcaError, match="cannot be written"):
        report.write(out.parent, data)  # a folder has that name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "file"]
    assert Path(out).is_file()
