"""What is counted of a bundle's graphs, what rates make of it, and what a plan follows from that."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from support.errors import one_line

from stca import commands
from stca.bundle import Bundle
from stca.checks import bench, ceilings
from stca.checks.ceilings import CpuCeilings
from stca.checks.forecast import Item, Kind, forecast, items
from stca.checks.plan import GPUS, Demand, GpuRates, next_steps, plan
from stca.errors import UsageError
from stca.plugins.tiling import Shape, Sizes
from stca.specs import HALVES


class Counting:
    """A machine that takes a second for each operation of products, and nothing for the rest."""

    def least(self, stage: str) -> float:
        return 0.25 if stage == "miss" else 0.0

    def seconds(self, item: Item) -> float:
        return float(item.operations) if item.kind in ("product", "attention") else 0.0


def test_work_follows_the_sizes_of_its_half(bundle_dir: Path) -> None:
    bundle = Bundle.load(bundle_dir)
    few, longer, more = (forecast(bundle, Counting(), *sizes) for sizes in ((8, 4), (16, 4), (8, 8)))
    assert longer.user_encoder == 2 * few.user_encoder
    assert more.user_encoder == few.user_encoder
    assert few.target_scorer < longer.target_scorer < 2 * few.target_scorer
    assert 1.5 * few.target_scorer < more.target_scorer <= 2 * few.target_scorer
    assert few.miss == few.user_encoder + few.target_scorer + 0.25
    assert few.milliseconds()["hit"] == 1e3 * few.hit


def test_attentions_and_constant_matrices_are_told_from_other_work(bundle_dir: Path) -> None:
    bundle = Bundle.load(bundle_dir)
    found = items(bundle, "target_scorer", 20, 5)
    (shape,) = {item.shape for item in found if item.kind == "attention"}
    assert shape == Shape(3, 1, 32, 32, "float32", tied=True)  # a head of 24 counts as one of 32
    assert {item.sizes for item in found if item.kind == "attention"} == {Sizes(5, 20, 1)}
    for item in (item for half in HALVES for item in items(bundle, half, 20, 5) if item.weight is not None):
        assert item.operations == 2 * item.rows * math.prod(item.weight or ())


def test_rates_of_a_cpu() -> None:
    shape = Shape(2, 1, 16, 16, "float32")
    of_kinds: dict[Kind, float] = {"product": 100.0, "function": 10.0, "along axis": 5.0, "transpose": 2.0, "move": 4.0}
    rates = CpuCeilings(of_kinds, 0.5, {"hit": 1.0}, {(2, 3): (32.0, 0.5, 0.25)}, {shape: (0.1, 0.01)})
    assert rates.least("hit") == 1.0
    assert rates.seconds(Item("product", 200)) == 2
    assert rates.seconds(Item("product", 200, matrices=7)) == 2 + 3
    assert rates.seconds(Item("product", 1, 8, (2, 3))) == 8  # a quarter of 32 rows
    assert rates.seconds(Item("product", 1, 132, (2, 3))) == 32 + 50
    assert rates.seconds(Item("product", 1, 1032, (2, 3))) == 32 + 240 + 130  # a quarter for each row beyond 512
    assert rates.seconds(Item("function", 30, bytes=99)) == 3
    assert rates.seconds(Item("along axis", 30, bytes=99)) == 6
    assert rates.seconds(Item("move", bytes=8, between=8)) == 2
    assert rates.seconds(Item("transpose", 8, bytes=8)) == 4  # two pieces a second
    assert rates.seconds(Item("transpose", 8, bytes=80)) == 20
    assert rates.seconds(Item("attention", shape=shape, sizes=Sizes(5, 10, 1))) == pytest.approx(1 + 1)


def test_an_attentions_two_rates_are_found_from_three_sizes() -> None:
    shape = Shape(2, 1, 16, 16, "float32")
    times = [1 + n * (3e-6 + t * shape.heads * 2e-9) for t, n in ceilings._ATTENTIONS]
    assert ceilings._fit(shape, times) == pytest.approx((3e-6, 2e-9))
    assert min(ceilings._fit(shape, [1.0, 0.5, 0.25])) >= 0


def test_this_cpus_rates_are_those_of_the_bundles_own_shapes(bundle_dir: Path) -> None:
    bundle = Bundle.load(bundle_dir)
    rates = bench.cpu_rates(bundle, threads=1)
    has = [item for half in HALVES for item in items(bundle, half, 5, 5)]
    assert rates.weights.keys() == {item.weight for item in has if item.weight}
    assert rates.attentions.keys() == {item.shape for item in has if item.shape}
    assert min(*rates.rates.values(), *rates.requests.values()) > 0
    expected = forecast(bundle, rates, 30, 100)
    assert expected.miss > expected.hit > rates.least("hit")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("what=1", "users, history, targets, zipf, rate"),
        ("users", "users is a whole number from 1 to 1,000,000,000,000, as in users=1000000"),
        ("users=1e6", "users is a whole number from 1 to 1,000,000,000,000, as in users=1000000"),
        ("users=0", "users is a whole number"),
        ("history=nan", "history is a whole number"),
        ("zipf=-1", "zipf is a number from 0 to 1,000,000,000,000, as in zipf=1.0"),
        ("rate=inf", "rate is a number from 0 to 1,000,000,000,000"),
    ],
)
def test_a_workload_that_makes_no_sense(text: str, told: str) -> None:
    with one_line(UsageError, f"--workload '{text}'", told):
        Demand.parse(text)


def test_the_frequent_users_are_those_that_are_kept() -> None:
    assert Demand.parse("users=50,zipf=0,rate=7") == Demand(users=50, zipf=0.0, rate=7.0)
    for zipf in (0.0, 0.8, 1.0, 1.3):
        demand = Demand(users=20_000, zipf=zipf)
        exact = sum(k**-zipf for k in range(1, 5001)) / sum(k**-zipf for k in range(1, 20_001))
        assert demand.hits(5000) == pytest.approx(exact, rel=1e-4)
        assert (demand.hits(0), demand.hits(20_000), demand.hits(10**9)) == (0, 1, 1)


def test_what_fits_and_what_helps(bundle_dir: Path) -> None:
    bundle, rates = Bundle.load(bundle_dir), GpuRates(GPUS["h100"].device)
    demand = Demand(users=10**6, history=32, targets=8)
    wide, narrow = (plan(bundle, rates, demand, 10**8, name) for name in ("float32", "bfloat16"))
    assert narrow.state_bytes < wide.state_bytes < 2 * narrow.state_bytes + 64
    assert wide.users * wide.user_bytes < 0.9 * 10**8 < narrow.users * narrow.user_bytes * 1.2
    assert narrow.hit_share > wide.hit_share
    assert wide.hit_ms < wide.miss_ms
    gains = next_steps(bundle, rates, demand, 10**8, "bfloat16")
    assert list(gains.values()) == sorted(gains.values(), reverse=True)
    assert gains["twice the memory"] > 1
    with one_line(UsageError, "--memory", "give more"):
        plan(bundle, rates, demand, 1000, "bfloat16")
    with one_line(UsageError, "history=33", "at most 32"):
        plan(bundle, rates, dataclasses.replace(demand, history=33), 10**8, "bfloat16")


def test_more_of_a_gpu_is_never_slower() -> None:
    gpus = [GpuRates(GPUS[name].device) for name in ("h100", "h200")]
    for item in (
        Item("product", 10**12, 10_000, (1000, 1000), 10**9),
        Item("move", bytes=10**9, between=10**8),
        Item("attention", shape=Shape(16, 16, 64, 64, "float32"), sizes=Sizes(300, 10_000, 1)),
    ):
        h100, h200 = (gpu.seconds(item) for gpu in gpus)
        assert 0 < h200 <= h100


def test_the_command(bundle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--workload", "history=32,targets=8,rate=100", "--memory", "1G"]
    assert commands.main(["plan", str(bundle_dir), *asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["form"], told["memory"], told["measured"]) == ("absorbed", 10**9, False)
    assert told["plans"].keys() == {"float32", "bfloat16", "int8"}
    assert told["machines_for_rate"] == 1
    assert commands.main(["plan", str(bundle_dir), *asked]) == 0
    assert "nothing was run on a GPU" in capsys.readouterr().out
    for wrong in (["--gpu", "h1"], ["--workload", "a=1"]):
        assert commands.main(["plan", str(bundle_dir), *wrong]) == 2
    with pytest.raises(SystemExit):
        commands.main(["plan", str(bundle_dir), "--memory", "x"])


def test_bench_says_what_it_expected_beside_what_it_found(bundle_dir: Path) -> None:
    report = bench.bench(Bundle.load(bundle_dir), [8], [2, 3], threads=1, seconds=0.01, pointwise=False, predict=True)
    rows = report.as_dict()["predicted"]
    assert [(row["history"], row["targets"]) for row in rows] == [(8, 2), (8, 3)]
    assert all(row[stage] > 0 for row in rows for stage in ("user_encoder", "target_scorer", "miss", "hit"))
