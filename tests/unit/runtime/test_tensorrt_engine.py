"""TensorRT at run time, as far as a machine without a GPU goes: with stand-ins for the library and for CUDA.

The stand-in for CUDA is real memory with a device side and a host side that only a copy connects, so an engine that
forgets to stage, copy or synchronise gives wrong numbers here too. What it cannot show is that TensorRT agrees.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.errors import one_line
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import CAPTURED, ENTRY, make, request

import stca.runtime.tensorrt_engine
from stca.errors import BuildError, EngineError
from stca.runtime.cuda_device import Device, join_on_device
from stca.runtime.tensorrt_plan import bucket


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("lowering", ["plugin", "quick", "fused", None])
def test_code_in_a_plan_may_run_only_where_the_manifest_says_that_there_is_some(tmp_path, flavour, lowering):
    entry = dataclasses.replace(CAPTURED, flavour=flavour, lowering=lowering)
    assert make(tmp_path, entry=entry, library=lowering == "plugin", graphs=0).outputs == ("scores", "echo")


def expected(inputs):
    scores = np.stack([inputs["target"], np.full(len(inputs["target"]), inputs["offsets"][1])], axis=1)
    return {"scores": scores.astype(np.float32), "echo": inputs["state"]}


def same(out, inputs):
    assert {n: (x.dtype, x.shape) for n, x in out.items()} == {
        n: (x.dtype, x.shape) for n, x in expected(inputs).items()
    }
    assert all(np.array_equal(out[n], x) for n, x in expected(inputs).items())


@pytest.mark.parametrize("graphs", [0, 1, 16])
def test_runs_of_all_shapes_again_and_again(tmp_path, graphs):
    engine = make(tmp_path, graphs=graphs)
    assert engine.name == "tensorrt 1.7.1.116 (SM 89, bf16)"
    assert engine.outputs == ("scores", "echo")
    for seed in range(5):
        for tokens, targets in ((8, 4), (9, 1), (64, 3), (1, 1)):
            same(engine.run(inputs := request(tokens, targets, seed)), inputs)
    launched = engine._device.cuda.log.count("cudaGraphLaunch")
    assert launched == {0: 0, 1: 3, 16: 3 * 4}[graphs]  # from the third run of a shape on
    assert len(engine._replays) == {0: 0, 1: 1, 16: 4}[graphs]


def test_a_shape_that_comes_again_among_many_that_do_not(tmp_path):
    engine = make(tmp_path, graphs=1)
    for seed in range(20):
        for tokens in (8, 9 + seed):
            same(engine.run(inputs := request(tokens, 4, seed)), inputs)
    assert engine._device.cuda.log.count("cudaGraphLaunch") == 18
    assert len(engine._seen) <= 4


def test_rows_are_added_where_that_changes_nothing(tmp_path):
    """Histories of any length share few graphs. Where the manifest does not say that rows may be added, none are."""
    engine = make(tmp_path, entry=dataclasses.replace(CAPTURED, padded=["N_h", "N_t"]))
    for tokens in range(65):
        same(engine.run(inputs := request(tokens, 1 + tokens % 4, tokens)), inputs)
    log = engine._device.cuda.log
    assert len(engine._replays) == 5  # 8 in the first profile; 16, 32, 48 and 64 in the second
    assert log.count("cudaGraphLaunch") == 65 - 2 * 5
    state = engine._buffers["state"]
    engine.run(request(50, 2))
    rest = np.frombuffer((ctypes.c_uint8 * state.bytes({"N_h": 64})).from_address(state.address), np.uint8)
    assert not rest[50 * 4 :].any()
    assert rest[: 50 * 4].any()
    assert len(make(tmp_path, graphs=0, entry=dataclasses.replace(CAPTURED, padded=["N_h"]))._replays) == 0


def test_the_sizes_that_rows_are_filled_up_to():
    sizes = [bucket(n) for n in range(1, 10_241)]
    assert sorted(set(sizes))[:8] == [16, 32, 48, 64, 80, 96, 112, 128]
    assert all(n <= size <= max(1.25 * n, n + 15) for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert all(bucket(size) == size for size in sizes)
    assert len(set(sizes)) == 33


def test_a_library_that_makes_graphs_itself_is_let_to(tmp_path):
    engine = make(tmp_path, entry=ENTRY)
    for seed in range(4):
        same(engine.run(inputs := request(8, 4, seed)), inputs)
    assert engine.name.startswith("tensorrt-rtx")
    assert "cudaStreamBeginCapture" not in engine._device.cuda.log


def test_no_graph_is_made_of_the_memory_that_is_left(tmp_path):
    engine = make(tmp_path)
    cuda, contexts = engine._device.cuda, engine._context.trt.contexts

    def run(times, tokens):
        for seed in range(times):
            same(engine.run(inputs := request(tokens, 4, seed)), inputs)

    run(3, 8)
    assert (len(engine._replays), len(contexts)) == (1, 2)
    cuda.free = (1 << 30, 16 << 30)
    run(4, 40)
    assert (len(engine._replays), len(contexts)) == (1, 2)
    assert engine.name.endswith("bf16)")  # nothing failed
    cuda.free = ((1 << 30) + 1, 16 << 30)
    run(3, 40)
    assert (len(engine._replays), len(contexts)) == (2, 3)


def test_all_is_given_back(tmp_path):
    """As a swap does: a new session's engines are loaded, and the old ones are garbage."""
    cuda = FakeCuda()
    engine = make(tmp_path, device=Device(cuda=cuda), graphs=2)
    for seed in range(4):
        for tokens in (8, 9, 10):
            engine.run(request(tokens, 4, seed))
            engine.run(request(tokens, 4, seed))
    assert cuda.held == (6, 5, 2, 2)  # five tensors and the scratch memory, two graphs
    contexts = engine._context.trt.contexts
    assert len(contexts) == 3
    del engine
    gc.collect()
    assert cuda.held == (0, 0, 0, 0)
    assert not contexts


def test_a_state_stays_on_the_gpu(tmp_path):
    """What one engine leaves there another takes, whole, cut and joined; it is given back when it is garbage."""
    cuda = FakeCuda()
    device = Device(cuda=cuda)
    encoder = make(tmp_path, device=device, keep=("echo",))
    scorer = make(tmp_path, device=device, entry=dataclasses.replace(CAPTURED, padded=["N_h"]))
    held = cuda.held
    for seed, tokens in enumerate((20, 20, 20, 20, 33, 0, 5)):
        inputs = request(tokens, 3, seed)
        out = encoder.run(inputs)
        assert isinstance(out["scores"], np.ndarray)
        state = out["echo"]
        assert (len(state), state.shape, state.nbytes) == (tokens, (tokens, 2), 4 * tokens)
        same(scorer.run({**inputs, "state": state}), inputs)
        assert np.array_equal(state.to_host(), inputs["state"])
        both = join_on_device([state[2:], state[:2], state[1:1]])
        assert np.array_equal(both.to_host(), np.concatenate([inputs["state"][2:], inputs["state"][:2]]))
        assert np.array_equal(state[1:3].copy().to_host(), inputs["state"][1:3])
        del state, out, both
    before = cuda.log.count("cudaGraphLaunch")
    for seed in range(4):
        inputs = request(40 + seed, 3, seed)
        same(scorer.run({**inputs, "state": encoder.run(inputs)["echo"]}), inputs)
    assert cuda.log.count("cudaGraphLaunch") == before + 3  # one graph, whatever address a state has
    assert {key[3:] for key in scorer._replays} == {("offsets", "target")}  # what crosses the bus
    device.collect()
    cuda._cudaStreamSynchronize(77)
    assert cuda.held[0] == held[0]


def test_a_state_outlives_the_engines_that_made_it(tmp_path):
    cuda = FakeCuda()
    state = make(tmp_path, device=Device(cuda=cuda), keep=("echo",)).run(inputs := request(9, 3))["echo"]
    part = state[4:]
    del state
    gc.collect()
    assert np.array_equal(part.to_host(), inputs["state"][4:])
    assert cuda.held[0] == 2  # the state and the scratch memory
    del part
    gc.collect()
    assert cuda.held == (0, 0, 0, 0)


def test_a_plan_that_is_refused_leaves_nothing_behind(tmp_path):
    cuda = FakeCuda(fail={"cudaHostAlloc": "cudaErrorMemoryAllocation"})
    with one_line(BuildError, "out of memory"):
        make(tmp_path, device=Device(cuda=cuda))
    gc.collect()
    assert cuda.held == (0, 0, 0, 0)


def test_what_is_inside(tmp_path):
    assert make(tmp_path, scratch=64).inspect() == {"layers": ["fused"], "device_memory": 64}


def test_nothing_is_allocated_while_requests_run(tmp_path):
    engine = make(tmp_path)
    engine.run(request(8, 4))
    cuda = engine._device.cuda
    cuda.log.clear()
    for tokens in (64, 3, 8, 8, 8):
        engine.run(request(tokens, 2))
    assert not {"cudaMalloc", "cudaHostAlloc", "cudaFree"} & set(cuda.log)


def test_results_are_the_callers_own(tmp_path):
    engine = make(tmp_path)
    first = engine.run(request(8, 4))
    kept = {n: x.copy() for n, x in first.items()}
    engine.run(request(8, 4, seed=1))
    assert all(np.array_equal(first[n], kept[n]) for n in first)


def test_an_empty_history_is_one_token_of_zeros_that_the_offsets_leave_out(tmp_path):
    engine = make(tmp_path)
    engine.run(request(8, 4))
    out = engine.run(inputs := request(0, 2))
    same(out, inputs)
    assert out["echo"].shape == (0, 2)
    state = engine._buffers["state"]
    assert not np.frombuffer((ctypes.c_uint8 * 4).from_address(state.address), np.uint8).any()


def test_no_targets_no_run(tmp_path):
    engine = make(tmp_path)
    engine._device.cuda.log.clear()
    out = engine.run(request(5, 0))
    assert out["scores"].shape == (0, 2)
    assert not engine._device.cuda.log


def test_two_engines_share_scratch_memory(tmp_path):
    device = Device(cuda=FakeCuda())
    small, large = (make(tmp_path, device=device, scratch=n) for n in (64, 4096))
    for seed in range(4):
        for engine in (small, large):
            same(engine.run(inputs := request(8, 4, seed)), inputs)
    assert small._context.scratch == large._context.scratch
    assert len(device.cuda.memory) == 2 * 5 + 1
    grown = make(tmp_path, device=device, scratch=1 << 16)  # its scratch memory moves under the graphs of the others
    for seed in range(4):
        for engine in (small, grown, large):
            same(engine.run(inputs := request(8, 4, seed)), inputs)
    assert len(device.cuda.memory) == 3 * 5 + 1


def test_an_engine_there_is_no_room_for_leaves_the_others_as_they_were(tmp_path):
    device = Device(cuda=FakeCuda())
    engine = make(tmp_path, device=device)
    for seed in range(3):
        same(engine.run(inputs := request(8, 4, seed)), inputs)
    held, large = device.cuda.held, 1 << 20
    device.cuda.largest = large - 1
    with one_line(BuildError, "out of memory"):
        make(tmp_path, device=device, scratch=large)
    gc.collect()
    assert device.cuda.held == held
    same(engine.run(inputs := request(8, 4, 5)), inputs)
    assert device.cuda.log[-2] == "cudaGraphLaunch"


def test_states_there_is_no_room_to_join(tmp_path):
    device = Device(cuda=FakeCuda())
    state = make(tmp_path, device=device, keep=("echo",)).run(request(9, 3))["echo"]
    device.cuda.largest = 40
    with one_line(EngineError, "joined", "out of memory"):
        join_on_device([state, state])


def test_threads_take_turns(tmp_path):
    engine, wrong = make(tmp_path), []

    def work(seed):
        for i in range(50):
            inputs = request(1 + (seed * 7 + i) % 64, 1 + i % 4, seed)
            if not all(np.array_equal(engine.run(inputs)[n], x) for n, x in expected(inputs).items()):
                wrong.append(seed)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not wrong


def test_the_callers_stream_is_used():
    cuda = FakeCuda()
    assert Device(stream=5, cuda=cuda).stream == 5
    assert cuda.log.count("cudaStreamCreateWithFlags") == 1  # the one that graphs are recorded on


def test_a_shape_that_cannot_be_captured_runs_without(tmp_path):
    device = Device(cuda=FakeCuda(fail={"cudaGraphInstantiate": "cudaErrorStreamCaptureInvalidated"}))
    engine = make(tmp_path, device=device)
    for seed in range(4):
        same(engine.run(inputs := request(8, 4, seed)), inputs)
    assert device.cuda.log.count("cudaStreamBeginCapture") == 1
    assert not device.cuda.graphs
    assert device.cuda.error == 0  # else the next call of whoever uses CUDA here would report it


def test_the_gpu_that_was_asked_for_is_used_and_the_threads_own_left_current(tmp_path):
    cuda = FakeCuda()
    cuda.devices = 3  # the stand-in works on the last one alone
    engine = make(tmp_path, device=Device(2, cuda=cuda), keep=("echo",))
    for seed in range(3):
        kept = engine.run(inputs := request(8, 4, seed))["echo"]
        assert np.array_equal(join_on_device([kept, kept]).to_host()[:8], inputs["state"])
        assert cuda.device == 0
    for index in (3, -1):
        with one_line(BuildError, f"no GPU {index}", "the last is 2"):
            Device(index, cuda=cuda)


def test_a_long_state_is_read_where_it_lies(tmp_path, monkeypatch):
    """Copying it would take longer than a graph spares; nor is page-locked memory made for it."""
    monkeypatch.setattr(stca.runtime.tensorrt_engine, "MOST_COPIED", 16 * 4 - 1)
    cuda = FakeCuda()
    device = Device(cuda=cuda)
    encoder = make(tmp_path, device=device, keep=("echo",))
    scorer = make(tmp_path, device=device, entry=dataclasses.replace(CAPTURED, padded=["N_h"]), keep=("state", "echo"))
    for seed in range(3):
        inputs = request(16, 4, seed)
        inputs["state"] = encoder.run(inputs)["echo"]
        before = cuda.log.count("cudaMemcpyAsync")
        out = scorer.run(inputs)
        same({**out, "echo": out["echo"].to_host()}, {**inputs, "state": inputs["state"].to_host()})
        # Offsets and targets in, scores out, the state that this engine makes to its own memory.
        assert cuda.log.count("cudaMemcpyAsync") - before == 4 + 2
    assert not scorer._replays
    assert scorer._context.addresses["state"] == scorer._buffers["state"].address
    assert "host" not in vars(scorer._buffers["state"])
    short = request(15, 4)
    short["state"] = encoder.run(short)["echo"]
    out = scorer.run(short)
    same({**out, "echo": out["echo"].to_host()}, {**short, "state": short["state"].to_host()})


def test_a_run_that_fails(tmp_path):
    engine = make(tmp_path, fails=True)
    with one_line(EngineError, "tensorrt 1", "failed"):
        engine.run(request(5, 2))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("cudaDeviceGetAttribute", "cudaErrorInsufficientDriver", ("no usable NVIDIA GPU", "ONNX Runtime")),
        ("cudaMalloc", "cudaErrorMemoryAllocation", ("out of memory", "smaller")),
        ("cudaHostAlloc", "cudaErrorUnknown", ("cudaHostAlloc", "cudaErrorUnknown")),
    ],
)
def test_cuda_that_fails(tmp_path, call, error, words):
    with one_line(BuildError, *words):
        make(tmp_path, device=Device(cuda=FakeCuda(fail={call: error})))


def test_no_gpu_here():
    """On a machine with a GPU this finds it, on one without it says so."""
    try:
        device = Device()
    except BuildError as e:
        assert len(str(e).splitlines()) == 1  # noqa: PT017
    else:
        assert device.sm >= 50
