"""What a plan counts of states in 8 bits, and of tables in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from support import tables
from support.errors import one_line

from stca import commands, probe
from stca.bundle import Bundle
from stca.calibration.choices import Options, formats_of
from stca.calibration.quantized_bundle import state_bytes, write_quantized
from stca.calibration.quantized_state import Kind, quantizable
from stca.checks import forecast
from stca.checks.ceilings import CpuCeilings
from stca.checks.forecast import items
from stca.checks.plan import GPUS, Demand, GpuRates, formats_for, next_steps, plan, table_bytes
from stca.errors import UsageError
from stca.runtime import Request, Session
from stca.specs import HALVES

H100 = GpuRates(GPUS["h100"].device)
DEMAND = Demand(users=10**6, history=32, targets=8)


def quantized(bundle: Bundle, folder: Path, kind: Kind) -> Bundle:
    state = {
        s.name: np.ones((3, *(n for n in s.shape if isinstance(n, int))), np.float32) for s in bundle.manifest.state
    }
    formats = formats_of(bundle, quantizable(bundle.manifest.state), Options(kind), [state])
    return write_quantized(bundle, formats, folder)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_calibrated_state_keeps_its_bytes_in_every_precision(tmp_path: Path, exported, kind: Kind) -> None:
    own = Bundle.load(exported("log", "projected"))
    made = quantized(own, tmp_path / "q", kind)
    size = state_bytes(made.manifest, DEMAND.history)
    assert plan(own, H100, DEMAND, 10**9, "int8").state_bytes == size
    for gpu in (True, False):
        assert {plan(made, H100, DEMAND, 10**9, name).state_bytes for name in formats_for(made, gpu)} == {size}
    assert formats_for(own, gpu=False) == ("float32", "int8")
    assert "int8" not in formats_for(made, gpu=True)
    assert any("8 bits" in step for step in next_steps(own, H100, DEMAND, 10**9, "bfloat16"))
    assert not any("8 bits" in step for step in next_steps(made, H100, DEMAND, 10**9, "bfloat16"))


@pytest.mark.parametrize("kind", [None, "int8"])
def test_it_counts_of_a_user_what_a_session_counts(tmp_path: Path, exported, kind: Kind | None) -> None:
    own = Bundle.load(exported("log", "projected"))
    made = quantized(own, tmp_path / "q", kind) if kind else own
    session = Session.load(made.path, threads=1)
    values = probe.single(made.manifest.graphs["request"].inputs, DEMAND.history, 1, np.random.default_rng(0))
    session.score(Request(values, user=7, version=1))
    found = plan(own, H100, DEMAND, 10**8, kind or "float32")
    assert found.user_bytes == session.stats().bytes > found.state_bytes == session.stats().state_bytes
    assert found.users == (9 * 10**7 - found.weights_bytes) // found.user_bytes


def test_the_command_tells_of_a_calibrated_state(tmp_path: Path, exported, capsys: pytest.CaptureFixture[str]) -> None:
    made = quantized(Bundle.load(exported("log", "projected")), tmp_path / "q", "fp8")
    argv = ["plan", str(made.path), "--workload", "history=32,targets=8", "--memory", "1G"]
    assert commands.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["quantized"], told["table_bytes"]) == ("fp8", 0)
    assert told["plans"].keys() == {"float32", "bfloat16"}
    assert commands.main(argv) == 0
    assert "states in fp8 as calibrated, the rest in bfloat16" in capsys.readouterr().out


def test_tables_in_files_count_where_they_lie_in_the_same_memory(tmp_path: Path) -> None:
    bundle = tables.split(tables.model(), tmp_path)
    size = tables.ROWS * tables.WIDTH * 4
    assert table_bytes(bundle) == size
    weights = {i.weight: (1.0, 0.0, 0.0) for half in HALVES for i in items(bundle, half, 8, 8) if i.weight}
    rates = dict.fromkeys(get_args(forecast.Kind), 1e9)
    stages = dict.fromkeys(("user_encoder", "target_scorer", "miss", "hit"), 1e-3)
    cpu = CpuCeilings(rates, 0.0, stages, weights, {})
    demand = Demand(users=10**6, history=32, targets=8)
    on_gpu, on_cpu = (plan(bundle, m, demand, 10**6, "float32") for m in (H100, cpu))
    assert on_cpu.weights_bytes - on_gpu.weights_bytes == size
    assert (on_gpu.users - on_cpu.users) * on_gpu.user_bytes == pytest.approx(size, abs=on_gpu.user_bytes)
    with one_line(UsageError, "--memory: 300,000 bytes", f"and {size:,} of tables", "give more"):
        plan(bundle, cpu, demand, 300_000, "float32")
    assert plan(bundle, H100, demand, 300_000, "float32").users > 0


def test_the_command_says_where_tables_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tables.split(tables.model(), tmp_path)
    assert commands.main(["plan", str(bundle.path), "--memory", "1G"]) == 0
    assert "tables in files: 320,000 bytes, mapped into the host's memory" in capsys.readouterr().out
    assert commands.main(["plan", str(bundle.path), "--gpu", "cpu", "--threads", "1"]) == 0
    assert "mapped into this memory too" in capsys.readouterr().out
