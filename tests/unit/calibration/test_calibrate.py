"""The search under a budget, what it refuses and whom it blames; and the command from a trace to a bundle."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from support.errors import one_line

from stca import commands, probe
from stca.bundle import Bundle
from stca.calibration.calibrate import calibrate
from stca.calibration.choices import Options
from stca.calibration.quality import Budget
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
    made, tried = search(own, requests, tmp_path / "q")
    assert len(tried) == 1
    assert tried[0].holds
    assert tried[0].high == ()
    assert 0 < tried[0].largest < 0.05
    found = Bundle.load(made.path).manifest
    assert found.quantization["state"]["tensors"] == list(tried[0].quantized)
    assert found.quantization["budget"] == {"auc": 0.4, "top": {"10": 0.5}}
    assert (
        found.split["bytes_per_token"]
        == sum(s.bytes_per_token for s in found.state)
        < own.manifest.split["bytes_per_token"]
    )
    assert {m.name for m in tried[0].measures} == {"auc finish", "auc like", "top10 finish", "top10 like"}


def test_the_tensors_that_move_the_scores_most_are_kept_one_by_one(tmp_path, own, requests):
    run = Faked(attention_1_key=1.0, attention_0_value=2.0)
    made, tried = search(own, requests, tmp_path / "q", "top10=0.9", run)
    assert [set(t.high) for t in tried] == [set(), {"attention_0_value"}, {"attention_0_value", "attention_1_key"}]
    assert [t.broken for t in tried] == [True, True, False]
    assert {s.name: s.dtype for s in made.manifest.state if s.name.startswith("attention")}[
        "attention_0_value"
    ] == "float32"
    assert [t.ratio for t in tried] == sorted(t.ratio for t in tried)


def test_when_nothing_holds_the_node_to_blame_is_named(tmp_path, own, requests):
    names = [s.name for s in own.manifest.state if s.name.startswith("attention")]
    with pytest.raises(
        ParityError, match=r"no tensor of the state can be int8 .*made by node '.*alone gives top10"
    ) as e:
        search(own, requests, tmp_path / "q", "top10=0.99", Faked(**dict.fromkeys(names, 3.0)))
    assert one_line(e.value)
    assert not (tmp_path / "q").exists()


def test_the_one_tensor_that_leaves_it_open_is_kept(tmp_path, own, requests):
    run = Faked(attention_0_value=0.02)
    _, (all_in_8_bits,) = search(own, requests, tmp_path / "loose", "top10=0.2", run)
    bound = min(m.estimate.value for m in all_in_8_bits.measures)
    _, tried = search(own, requests, tmp_path / "q", f"top10={bound}", run)
    assert [(t.broken, t.holds, t.high) for t in tried] == [
        (False, False, ()),
        (False, True, ("attention_0_value",)),
    ]


def test_a_trace_that_cannot_decide_says_how_much_would(tmp_path, own, requests):
    _, tried = search(own, requests, tmp_path / "q", "auc=0.4")
    bound = 1.02 * max(abs(m.estimate.value) for m in tried[-1].measures)
    with pytest.raises(UsageError, match=r"too small to decide: auc .* record about \d+ requests, now 10"):
        search(own, requests, tmp_path / "w", f"auc={bound}")
    assert not (tmp_path / "w").exists()


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
    _made, tried = search(own, some, tmp_path / "q", "auc=0.45")
    assert tried[-1].measures[0].exact != search(own, requests, tmp_path / "w", "auc=0.45")[1][-1].measures[0].exact


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
    assert "not a trace" in capsys.readouterr().err
    assert commands.main([*argv, "--trace", "demo", "--demo-users", "8"]) == 2  # the generated log has other ids
