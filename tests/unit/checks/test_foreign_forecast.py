"""Work of models of other people, whose sizes shape inference loses: counted at the sizes that run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from support import tiny
from torch import Tensor, nn

from stca import commands, probe
from stca.bundle import Bundle
from stca.checks import bench
from stca.checks.forecast import counted, forecast, items
from stca.checks.plan import GPUS, Demand, GpuRates, next_steps
from stca.export import RequestModel, TensorSpec
from stca.export.pipeline import export_module
from stca.plugins.tiling import Shape
from stca.report.blocks import condense
from stca.specs import HALVES, GraphSpec

EVENTS, WIDTH, HEADS = 12, 16, 4


class Attending(nn.Module):
    """Attention of the target to the history, as torch has it."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(50, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.out = nn.Linear(2 * WIDTH, 1)

    def forward(self, hist: Tensor, item: Tensor) -> Tensor:
        events, target = self.item(hist), self.item(item)
        attended, _ = self.attention(target[:, None], events, events, key_padding_mask=hist == 0)
        return self.out(torch.cat([attended[:, 0], target], -1))


class Sequence(nn.Module):
    """A transformer over the history with the target at its end: nothing of it can be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(50, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, hist: Tensor, item: Tensor) -> Tensor:
        seen = torch.cat([hist, item[:, None]], 1)
        return self.out(self.encoder(self.item(seen), src_key_padding_mask=seen == 0)[:, -1])


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[nn.Module]], Bundle]:
    root = tmp_path_factory.mktemp("foreign")

    @functools.cache
    def export(kind: type[nn.Module]) -> Bundle:
        torch.manual_seed(0)
        inputs = TensorSpec("hist", "int64", ("B", EVENTS), "user"), TensorSpec("item", "int64", ("B",), "target")
        model = RequestModel(kind().eval(), inputs)
        return export_module(model, root / kind.__name__, prove=tiny.no_proof, source={"kind": "callable"})

    return export


@pytest.mark.parametrize("kind", [Attending, Sequence])
def test_all_count_the_same_work(foreign: Callable[[type[nn.Module]], Bundle], kind: type[nn.Module]) -> None:
    bundle = foreign(kind)
    split = bundle.manifest.split
    of_half = {}
    for half in HALVES:
        model, sizes = counted(bundle, half, split["workload"])
        assert not sizes.guesses
        of_half[half] = sum(map(sizes.work, model.graph.node))
    scored = split["recomputed_work"] + split["request_work"] + split["target_work"]
    assert of_half["target_scorer"] == pytest.approx(scored, rel=0.05)  # but for work on constants alone
    assert condense(bundle).flops == pytest.approx(sum(of_half.values()), rel=0.1)


def test_a_layers_work_is_what_its_formula_says(foreign: Callable[[type[nn.Module]], Bundle]) -> None:
    """Of a transformer's layer over `n` places: 8 n d² of projections, 8 n d² of an FFN of 2 d, 4 n² d of attention."""
    for targets in (1, 300):
        found = items(foreign(Sequence), "target_scorer", 10_000, targets)
        places = EVENTS + 1
        layer = 16 * places * WIDTH**2 + 4 * places**2 * WIDTH
        products = sum(item.operations for item in found if item.kind in ("product", "attention"))
        assert products == pytest.approx(targets * layer, rel=0.05)


def test_an_attentions_heads_are_those_that_run(foreign: Callable[[type[nn.Module]], Bundle]) -> None:
    bundle = foreign(Attending)
    shapes = {i.shape for half in HALVES for i in items(bundle, half, EVENTS, 5) if i.shape is not None}
    assert shapes == {Shape(HEADS, HEADS, 16, 16, "float32")}
    assert commands.main(["plan", str(bundle.path)]) == 0


def test_what_is_fixed_is_planned_as_it_runs(foreign: Callable[[type[nn.Module]], Bundle]) -> None:
    bundle, rates = foreign(Attending), GpuRates(GPUS["h100"].device)
    demand = Demand.parse("history=10000,targets=8", bundle)
    assert (demand.history, demand.targets) == (EVENTS, 8)
    assert "half the history" not in next_steps(bundle, rates, demand, 10**9, "float32")
    assert forecast(bundle, rates, 10_000, 8) == forecast(bundle, rates, EVENTS, 8)
    four = GraphSpec("", (TensorSpec("item", "int64", (4,), "target"),), (TensorSpec("scores", "float32", (4, 1)),))
    assert probe.targets_of(four, 300) == 4
    assert probe.targets_of(bundle.manifest.graphs["request"], 300) == 300


def test_a_forecast_that_fails_costs_no_measurement(
    foreign: Callable[[type[nn.Module]], Bundle], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = foreign(Sequence)
    sizes = ["--targets", "2", "--threads", "1", "--seconds", "0.01"]
    assert commands.main(["bench", str(bundle.path), *sizes]) == 0
    assert "predicted" in capsys.readouterr().out

    def fails(*_: object) -> None:
        raise KeyError((7, 1))

    monkeypatch.setattr(bench, "forecast", fails)
    assert commands.main(["bench", str(bundle.path), *sizes]) == 0
    told = capsys.readouterr().out
    assert "nothing predicted: KeyError: (7, 1)" in told
    assert "target_scorer" in told


def test_features_of_a_user_are_no_history() -> None:
    profile = TensorSpec("profile", "float32", (1, 40), "user")
    assert probe.history_of((profile,), 7) == 0
    assert probe.history_of((profile, TensorSpec("hist", "int64", (1, 40), "user")), 7) == 40
    assert probe.history_of((TensorSpec("events", "float32", (30, 8), "user"),), 7) == 30
