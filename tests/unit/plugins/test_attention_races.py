"""A barrier that is missing from a compiled kernel is found: small blocks of each kind, then the headline kernels."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from stca.plugins import tiling
from stca.plugins.aot import Artifact
from stca.plugins.devices import device_for

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import attention_races

    return attention_races  # type: ignore[no-any-return]


# Each thread stores a word, and reads one of another warp.
EXCHANGED = """
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    add.s32 %r3, %r2, global_smem;
    st.shared.b32 [%r3], %r1;
    bar.sync 0;
    xor.b32 %r4, %r2, 128;
    ld.shared.b32 %r5, [%r4];
    bar.sync 0;
    st.shared.b32 [%r3], %r5;
"""
# A copy that runs beside the warp, four bytes a thread, then a read of another warp's.
COPIED = """
    ld.param.b64 %rd1, [k_param_0];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    cvt.u64.u32 %rd2, %r2;
    add.s64 %rd3, %rd1, %rd2;
    cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    xor.b32 %r4, %r2, 128;
    ld.shared.b32 %r5, [%r4];
"""
# One thread has 128 bytes copied in bulk, which all await; then each warp says that it has read them.
BULK = """
    mov.u32 %r1, %tid.x;
    setp.eq.b32 %p1, %r1, 0;
    and.b32 %r2, %r1, 31;
    setp.eq.b32 %p2, %r2, 0;
    shl.b32 %r3, %r2, 2;
    mov.b32 %r4, 256;
    mov.b32 %r5, 264;
    mov.b32 %r6, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r4], 1;
    @%p1 mbarrier.init.shared::cta.b64 [%r5], 2;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 128;
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r6], [%rd1, {%r1, %r1}], [%r4];
    { .reg .pred complete; waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r4], %r6;
    @!complete bra.uni waitLoop; }
    ld.shared.b32 %r7, [%r3];
    @%p2 mbarrier.arrive.shared::cta.b64 _, [%r5], 1;
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r5], %r6;
    st.shared.b32 [%r3], %r7;
"""


def block(races: ModuleType, body: str, *arguments: object) -> tuple[Artifact, object]:
    """Two warps of it."""
    ptx = f".visible .entry k() .reqntid 64 {{ {body} ret; }}"
    return Artifact("k", ptx, "sm_90a", 64, 512, ()), races.Launch((0, 0, 0), (1, 1, 1), arguments)


@pytest.mark.parametrize(("body", "number"), [(EXCHANGED, 2), (COPIED, 3), (BULK, 7)], ids=["store", "copy", "bulk"])
def test_a_small_block_needs_each_of_its_barriers(races: ModuleType, body: str, number: int) -> None:
    artifact, launch = block(races, body, 256)
    assert races.wrong(artifact, launch) is None
    tried = races.barriers(races.parsed(artifact.ptx)[0])
    assert len(tried) == number
    assert [i.op for i in tried if races.wrong(artifact, launch, i.at) is None] == []


def test_what_a_barrier_does_not_order_is_told(races: ModuleType) -> None:
    artifact, launch = block(races, EXCHANGED.replace("bar.sync 0;", "bar.warp.sync -1;", 1))
    assert "not ordered after a" in str(races.wrong(artifact, launch))
    artifact, launch = block(races, EXCHANGED.replace("[%r3], %r5", "[%r3 + 512], %r5"))
    assert "outside of shared memory" in str(races.wrong(artifact, launch))
    for held, said in ((256, None), (252, "outside of tensor 0"), (np.zeros(60, np.int32), "outside of tensor 0")):
        found = races.wrong(*block(races, COPIED, held))
        assert found is said if said is None else said in found


def test_what_is_not_known_here_is_no_silence(races: ModuleType) -> None:
    assert "no such instruction here: popc" in races.wrong(*block(races, "popc.b32 %r1, 3;"))
    said = races.wrong(*block(races, "mov.b32 %r1, 0f00000000; ld.shared.b32 %r2, [%r1];"))
    assert "depends on a number that is not computed here" in said


def headline(races: ModuleType, number: int, sm: int) -> list[tuple[Artifact, object]]:
    case = races.CASES[number]
    plan = tiling.choose(case.shape, case.sizes, device_for(sm), case.limit)
    return races.launches(case.shape, plan.tile, sm, plan.parts > 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("number", [0, 1])
def test_the_headline_kernels_order_all_that_they_do_on_sm_90(races: ModuleType, number: int) -> None:
    for artifact, launch in headline(races, number, 90):
        assert races.wrong(artifact, launch) is None, artifact.kernel


def test_each_barrier_taken_out_of_the_kernel_for_sm_80_is_missed(races: ModuleType) -> None:
    ((artifact, launch),) = headline(races, 0, 80)
    assert races.wrong(artifact, launch) is None
    tried = races.barriers(races.parsed(artifact.ptx)[0])
    assert len(tried) > 20
    # The first two groups of copies are awaited together, so that one group would do.
    idle = [i.op for i in tried if races.wrong(artifact, launch, i.at) is None]
    assert idle in ([], ["cp.async.commit_group"])


def test_each_barrier_taken_out_of_the_loops_in_bulk_is_missed(races: ModuleType) -> None:
    """Of the loop that copies, and of one group's that multiplies; the other group's is the same."""
    artifact, launch = headline(races, 2, 90)[0]
    code, labels = races.parsed(artifact.ptx)
    spans = [(labels[i.operands[0]], i.at) for i in code if i.op == "bra" and labels[i.operands[0]] <= i.at]
    loops = [[i for i in races.barriers(code) if a <= i.at <= b] for a, b in spans]
    copying = next(x for x in loops if any("expect_tx" in i.op for i in x))
    multiplying = next(x for x in loops if any(i.op.startswith("wgmma") for i in x))
    assert (len(copying), len(multiplying)) >= (6, 12)
    # Only the first warp issues copies: the others' order among themselves is nothing that a copy needs.
    tried = [*(i for i in copying if i.op != "bar.sync"), *multiplying]
    assert [str(i) for i in tried if races.wrong(artifact, launch, i.at) is None] == []
