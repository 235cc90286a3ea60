"""The search under a budget, what it refuses and whom it blames; and the command from a trace to a bundle."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from support.errors import one_line

from stca import commands, probe
from stca.bundle import Bundle
from stca.calibration.calibrate import calibrate
from stca.calibration.choices import Options
from stca.calibration.quality import Budget, Estimate, Measure
from stca.calibration.quantized_state import StateFormat
from stca.calibration.search import Part, Search, Tried, _rms
from stca.checks.trace_runs import TraceRuns, tasks_of
from stca.errors import ParityError, StcaError, UsageError
from stca.trace import Trace, Traced, TraceWriter

REQUESTS = 10


@pytest.fixture(scope="module")
def own(exported):
    return Bundle.load(exported("log", "projected"))


@pytest.fixture(scope="module")
def requests(own):
    """Valid requests with labels that follow the model's own scores."""
    specs = own.manifest.graphs["request"].inputs
    rng = np.random.default_rng(0)
    bare = [Traced(probe.single(specs, 20, 30, rng)) for _ in range(REQUESTS)]
    scores = TraceRuns(1).scores(own, bare)
    return [
        dataclasses.replace(r, labels=(rng.random(s.shape) < s / s.max()).astype(np.float32))
        for r, s in zip(bare, scores, strict=True)
    ]


class Faked(TraceRuns):
    """Scores that move by so much for each tensor of the state that is in 8 bits."""

    def __init__(self, **harm: float) -> None:
        super().__init__(1)
        self.harm = harm

    def scores(self, bundle, requests):
        kept = {s.name for s in bundle.manifest.state}
        moved = sum(x for name, x in self.harm.items() if f"{name}_int8" in kept)
        for i, scores in enumerate(super().scores(bundle, requests)):
            yield scores + moved * np.random.default_rng(i).standard_normal(scores.shape).astype(np.float32)


def search(own, requests, out, budget="auc=0.4,top10=0.5", run=None, **options):
    return calibrate(
        own,
        lambda: requests,
        options=Options(**{"kind": "int8", **options}),
        budget=Budget.parse(budget),
        out=out,
        run=run or TraceRuns(1),
        tasks=tasks_of(own.manifest),
        prove=lambda _: {},
    )


def test_the_bundle_itself_is_not_replaced(own, requests):
    with one_line(UsageError, "is the bundle to calibrate"):
        search(own, requests, own.path)
    assert Bundle.load(own.path).manifest == own.manifest


def test_all_that_holds_is_quantized_and_the_manifest_says_so(tmp_path, own, requests):
    made, found = search(own, requests, tmp_path / "q")
    assert len(found.tried) == 1
    assert found.tried[0].holds
    assert found.tried[0].high == ()
    assert 0 < found.tried[0].largest < 0.05
    told = Bundle.load(made.path).manifest
    assert told.quantization["state"]["tensors"] == list(found.tried[0].quantized)
    assert told.quantization["budget"] == {"auc": 0.4, "top": {"10": 0.5}}
    assert told.quantization["tried"][0]["verdict"] == "holds"
    assert (
        told.split["bytes_per_token"]
        == sum(s.bytes_per_token for s in told.state)
        < own.manifest.split["bytes_per_token"]
    )
    assert {m.name for m in found.tried[0].measures} == {"auc finish", "auc like", "top10 finish", "top10 like"}


def test_the_tensors_that_cost_most_are_kept(tmp_path, own, requests):
    run = Faked(attention_1_key=1.0, attention_0_value=2.0)
    made, found = search(own, requests, tmp_path / "q", "top10=0.9", run)
    assert {*found.taken.high} == {"attention_0_value", "attention_1_key"}
    assert [p.name for p in found.parts[-2:]] == ["attention_1_key", "attention_0_value"]
    assert all(p.node.endswith("(MatMul)") and p.saved > 0 for p in found.parts)  # not the Reshape into heads
    assert sorted((len(t.quantized), t.verdict) for t in found.tried) == [(2, "holds"), (3, "broken"), (4, "broken")]
    dtypes = {s.name: s.dtype for s in made.manifest.state}
    assert dtypes["attention_0_value"] == "float32"
    assert dtypes["attention_0_key_int8"] == "int8"
    assert found.left_open is None


def test_when_nothing_holds_the_node_to_blame_is_named(tmp_path, own, requests):
    names = [s.name for s in own.manifest.state if s.name.startswith("attention")]
    with pytest.raises(
        ParityError,
        match=r"no tensor of the state can be int8 .* a scale for each token, made by node '.*alone gives top10",
    ) as e:
        search(own, requests, tmp_path / "q", "top10=0.99", Faked(**dict.fromkeys(names, 3.0)))
    assert one_line(e.value)
    assert not (tmp_path / "q").exists()


def test_what_leaves_it_open_is_kept_and_told(tmp_path, own, requests):
    run = Faked(attention_0_value=0.02)
    _, found = search(own, requests, tmp_path / "loose", "top10=0.2", run)
    bound = min(m.estimate.value for m in found.taken.measures)
    _, found = search(own, requests, tmp_path / "q", f"top10={bound}", run)
    assert [(len(t.quantized), t.verdict) for t in found.tried[1:]] == [(2, "holds"), (3, "holds")]
    assert found.tried[0].verdict == "undecided"
    assert found.taken.high == ("attention_0_value",)
    assert re.match(r"4 tensors in 8 bits are neither .* record about \d+ requests, now 10", found.left_open)


class Told(Search):
    """A search among 33 tensors of equal size, where so many in 8 bits keep a share of the best as it is told."""

    def __init__(self, own, told):
        self.told, self.looks = told, 0
        names = [f"t{i:02}" for i in range(33)]
        super().__init__(
            own, dict.fromkeys(names, StateFormat("int8", "tensor", None)), None, None, [None] * 9, None, None
        )

    def _tried(self, names, left):
        self.looks += 1
        kept = Measure("top10 all", Estimate(*self.told(len(names))), 0.5)
        return Tried(tuple(names), (), 100 - len(names), 1.0, 1.0, (kept,), 0.0)

    def _parts(self):
        return [Part(n, "node 'it'", float(i), 1) for i, n in enumerate(self.formats)]


@pytest.mark.parametrize("most", range(1, 34))
def test_as_many_as_hold_are_found_with_few_looks(own, most):
    search = Told(own, lambda n: (1, 1, 1) if n <= most else (0, 0, 0))
    assert list(search.found().formats) == list(search.formats)[:most]
    assert search.looks <= 7


def test_a_request_without_targets_tells_nothing():
    assert _rms([np.float32([3, -3]), np.float32([])]) == 3
    assert _rms([np.float32([])]) == 0


def test_a_trace_that_cannot_decide_says_how_much_would(own):
    with one_line(
        UsageError, "too small to decide: top10 all is 0.", "allows at least 0.5", "record about 36 requests, now 9"
    ):
        Told(own, lambda n: (0.75, 0.25, 1.25)).found()
    with one_line(
        ParityError, "'t00' with a scale for each tensor, made by node 'it'", "top10 all 0.400000, allowed at least 0.5"
    ):
        Told(own, lambda n: (0.4, 0.4, 0.4)).found()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r[:3], "3 requests, a budget needs at least 8"),
        (lambda r: [dataclasses.replace(x, labels=None) for x in r], "the trace has none; add labels"),
        (lambda r: [dataclasses.replace(x, labels=np.zeros_like(x.labels)) for x in r], "all negative"),
        (lambda r: [dataclasses.replace(x, labels=x.labels[:, :1]) for x in r], "request 0: labels have shape"),
        (
            lambda r: [*r, dataclasses.replace(r[0], inputs={**r[0].inputs, "target_item": [[1, 2]]})],
            "request 10: target_item",
        ),
        (lambda r: [*r, dataclasses.replace(r[0], inputs={**r[0].inputs, "extra": np.ones(3)})], "request 10: 'extra'"),
        (
            lambda r: [*r, dataclasses.replace(r[0], inputs={**r[0].inputs, "history_item": np.full(20, np.nan)})],
            "request 10: history_item",
        ),
    ],
)
def test_what_is_wrong_with_a_trace_is_one_line(tmp_path, own, requests, change, said):
    with pytest.raises(StcaError, match=said) as e:
        search(own, change(requests), tmp_path / "q")
    assert one_line(e.value)
    assert not (tmp_path / "q").exists()


def test_labels_may_be_known_of_some_requests_alone(tmp_path, own, requests):
    some = [dataclasses.replace(r, labels=None) if i < 2 else r for i, r in enumerate(requests)]
    _, found = search(own, some, tmp_path / "q", "auc=0.45")
    _, of_all = search(own, requests, tmp_path / "w", "auc=0.45")
    assert found.taken.measures[0].exact != of_all.taken.measures[0].exact


def test_what_is_quantized_is_not_quantized_again(tmp_path, own, requests):
    made, _ = search(own, requests, tmp_path / "q")
    with pytest.raises(UsageError, match="quantized already"):
        search(made, requests, tmp_path / "w")


def test_the_command_from_a_trace_to_a_bundle(tmp_path, own, requests, capsys):
    with TraceWriter(tmp_path / "trace") as writer:
        assert all(map(writer.add, requests))
    assert len(list(Trace(tmp_path / "trace"))) == REQUESTS
    argv = ["calibrate", str(own.path), "--trace", str(tmp_path / "trace"), "--precision", "int8", "--seconds", "0.01"]
    argv += ["--budget", "auc=0.4,top10=0.5", "--threads", "1", "--out", str(tmp_path / "q")]
    assert commands.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["state_bytes"]["int8"] < 0.35 * told["state_bytes"]["float32"]
    assert told["speed"]["stages"].keys() == {"float32", "int8"}
    assert told["parity"]["passed"]
    assert told["tried"][-1]["holds"]
    assert commands.main(argv) == 0
    assert "holds" in capsys.readouterr().out
    assert commands.main([*argv, "--budget", "speed=1"]) == 2
    assert commands.main([*argv, "--trace", str(tmp_path)]) == 2
    assert "is not a trace" in capsys.readouterr().err
    assert commands.main([*argv, "--trace", "demo", "--demo-users", "8"]) == 2  # the generated log has other ids


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: dataclasses.replace(r, labels=None), "--budget: auc needs labels, and the trace has none"),
        (lambda r: dataclasses.replace(r, inputs={"hist": np.ones(3)}), "another model; its requests have hist, and"),
        (
            lambda r: dataclasses.replace(r, inputs={**r.inputs, "target_item": np.ones(2)}),
            "request 0: target_item: has dtype float64, expected int64; is the trace this model's?",
        ),
    ],
)
def test_what_the_trace_lacks_is_said_before_the_long_work(tmp_path, own, requests, capsys, change, said):
    with TraceWriter(tmp_path / "trace") as writer:
        assert all(map(writer.add, map(change, requests)))
    argv = ["calibrate", str(own.path), "--trace", str(tmp_path / "trace"), "--precision", "int8"]
    assert commands.main([*argv, "--out", str(tmp_path / "q")]) == 2
    (line,) = capsys.readouterr().err.splitlines()  # and so no library was loaded
    assert said in line
    assert "did you mean" not in line
