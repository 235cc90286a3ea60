"""TensorRT at run time, as far as a machine without a GPU goes: with stand-ins for the library and for CUDA.

The stand-in for CUDA is real memory with a device side and a host side that only a copy connects, so an engine that
forgets to stage, copy or synchronise gives wrong numbers here too. What it cannot show is that TensorRT agrees.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from support.errors import one_line
from support.fake_cuda import IO_MODE, FakeCuda, tensors_of

import stca.runtime.tensorrt_engine
from stca.errors import BuildError, EngineError, RequestError
from stca.manifest import EngineEntry
from stca.runtime.cuda_device import Device, join_on_device
from stca.runtime.tensorrt_engine import TensorRTEngine
from stca.runtime.tensorrt_plan import bucket, check_fit, choose_profile, explain_refusal, sizes_of

ENTRY = EngineEntry.of(
    {
        "graph": "target_scorer",
        "file": "target_scorer.tensorrt-rtx.sm89.bf16.plan",
        "flavour": "tensorrt-rtx",
        "version": "1.7.1.116",
        "sm": 89,
        "precision": "bf16",
        "requests": 1,
        "profiles": [{"N_h": [1, 8, 8], "N_t": [1, 4, 4]}, {"N_h": [9, 64, 64], "N_t": [1, 4, 4]}],
        "inputs": [
            {"name": "state", "dtype": "bfloat16", "shape": ["N_h", 2]},
            {"name": "offsets", "dtype": "int32", "shape": [2]},
            {"name": "target", "dtype": "int64", "shape": ["N_t"]},
        ],
        "outputs": [
            {"name": "scores", "dtype": "float32", "shape": ["N_t", 2]},
            {"name": "echo", "dtype": "bfloat16", "shape": ["N_h", 2]},
        ],
    }
)


class FakeTensorRT:
    """`scores[t] = (target[t], offsets[1])`, `echo = state`; it wants its calls in TensorRT's order."""

    __version__ = "1.7.1.116"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    LayerInformationFormat = SimpleNamespace(JSON=1)
    TensorIOMode = IO_MODE

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self, cuda, says=None, scratch=64, fails=False, library=False):
        self.library = library  # whether the plan carries code of ours
        self.inputs, self.outputs = ([tuple(t.values()) for t in ts] for ts in (ENTRY.inputs, ENTRY.outputs))
        self.cuda, self.says, self.scratch, self.fails = cuda, says, scratch, fails
        self.contexts = weakref.WeakSet()

    def Runtime(self, log):
        def deserialize(plan):
            assert runtime.engine_host_code_allowed == self.library
            if self.says is not None:
                log.log(self.ILogger.ERROR, self.says)
                return None
            assert plan == b"plan"
            told = SimpleNamespace(get_engine_information=lambda _: '{"Layers": ["fused"]}')
            return SimpleNamespace(
                create_execution_context=self.context,
                create_runtime_config=FakeConfig,
                create_engine_inspector=lambda: told,
                device_memory_size_v2=self.scratch,
                **tensors_of(self.inputs, self.outputs),
            )

        runtime = SimpleNamespace(deserialize_cuda_engine=deserialize, engine_host_code_allowed=False)
        return runtime

    def context(self, how):
        assert how == "user" or (how.strategy, how.cuda_graph_strategy) == ("user", "whole")
        made = FakeContext(self)
        self.contexts.add(made)
        return made


class FakeConfig:
    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class FakeContext:
    """What it captured holds for the shapes it then had, on the first run of which it does things it does only once."""

    def __init__(self, trt):
        self.trt, self.addresses, self.shapes, self.profile, self.scratch = trt, {}, {}, 0, None
        self.generation, self.settled = 0, False

    def set_tensor_address(self, name, address):
        assert address in self.trt.cuda.memory
        self.addresses[name] = address
        return True

    def set_device_memory(self, address, size):
        assert size >= self.trt.scratch
        self.scratch = address
        self.generation += 1

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile
        self.generation += 1
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        self.generation += 1
        self.settled = False
        return True

    def execute_async_v3(self, stream):
        cuda, generation = self.trt.cuda, self.generation
        assert self.scratch in cuda.memory
        assert cuda.captured is None or self.settled
        self.settled = True
        tokens, targets, profile = self.shapes["state"][0], self.shapes["target"][0], self.profile
        low, _, high = ENTRY.profiles[profile]["N_h"]
        assert low <= tokens <= high
        context, addresses, scratch = weakref.ref(self), dict(self.addresses), self.scratch

        def view(name, count, dtype):
            size = count * np.dtype(dtype).itemsize
            return np.frombuffer((ctypes.c_uint8 * size).from_address(addresses[name]), dtype)

        def work():
            assert scratch in cuda.memory
            assert context().generation == generation  # of a graph too: its context must be as it was
            scores = view("scores", 2 * targets, np.float32).reshape(-1, 2)
            scores[:, 0], scores[:, 1] = view("target", targets, np.int64), view("offsets", 2, np.int32)[1]
            view("echo", 2 * tokens, np.uint16)[:] = view("state", 2 * tokens, np.uint16)

        self.trt.cuda.submit(work, stream)
        return not self.trt.fails


CAPTURED = dataclasses.replace(ENTRY, flavour="tensorrt", file=ENTRY.file.replace("-rtx", ""))


def make(tmp_path, *, graphs=16, keep=(), device=None, entry=CAPTURED, **fake):
    (tmp_path / "p").write_bytes(b"plan")
    device = device or Device(cuda=FakeCuda())
    module = FakeTensorRT(device.cuda, **fake)
    return TensorRTEngine(tmp_path / "p", entry, device, keep=keep, graphs=graphs, module=module)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("lowering", ["plugin", "quick", "fused", None])
def test_code_in_a_plan_may_run_only_where_the_manifest_says_that_there_is_some(tmp_path, flavour, lowering):
    entry = dataclasses.replace(CAPTURED, flavour=flavour, lowering=lowering)
    assert make(tmp_path, entry=entry, library=lowering == "plugin", graphs=0).outputs == ("scores", "echo")


def request(tokens, targets, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "state": rng.integers(0, 1 << 16, (tokens, 2)).astype(np.uint16),
        "offsets": np.array([0, tokens], np.int32),
        "target": rng.integers(0, 1000, targets),
        "unused": np.zeros(1),
    }


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


def test_the_tightest_profile():
    assert choose_profile(ENTRY, {"N_h": 8, "N_t": 1}) == 0
    assert choose_profile(ENTRY, {"N_h": 9, "N_t": 4}) == 1
    both = dataclasses.replace(ENTRY, profiles=({"N_h": (1, 64, 64)}, {"N_h": (1, 8, 8)}))
    assert choose_profile(both, {"N_h": 3, "N_t": 4}) == 1
    with one_line(RequestError, "N_h is 65", "64"):
        choose_profile(ENTRY, {"N_h": 65, "N_t": 1})
    with one_line(RequestError, "N_t is 5", "4", ENTRY.file):
        choose_profile(ENTRY, {"N_h": 5, "N_t": 5})
    with one_line(RequestError, "no profile"):
        choose_profile(dataclasses.replace(ENTRY, profiles=({"N_h": (4, 8, 8)},)), {"N_h": 2})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": np.zeros((3, 3), np.uint16)}, ("state", "[3, 3]")),
        ({"state": np.zeros(3, np.uint16)}, ("state", "[3]")),
        ({"state": np.zeros((3, 2), np.float32)}, ("state", "float32", "bfloat16")),
        ({"offsets": np.zeros(3, np.int32)}, ("offsets", "[3]", "one request per run")),
    ],
)
def test_inputs_of_another_shape(change, words):
    with one_line(RequestError, *words):
        sizes_of(ENTRY, {**request(5, 2), **change})


def test_a_missing_input():
    inputs = request(5, 2)
    del inputs["target"]
    with one_line(RequestError, "target", "missing"):
        sizes_of(ENTRY, inputs)


def test_a_run_that_fails(tmp_path):
    engine = make(tmp_path, fails=True)
    with one_line(EngineError, "tensorrt 1", "failed"):
        engine.run(request(5, 2))


def test_the_wrong_machine():
    check_fit(ENTRY, "1.7.1.116", 89)
    with one_line(BuildError, "1.7.1.116", "1.8.0", "stca build"):
        check_fit(ENTRY, "1.8.0", 89)
    with one_line(BuildError, "SM 89", "SM 90", "--sm 90"):
        check_fit(ENTRY, "1.7.1.116", 90)


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("IPluginRegistry::getCreator: Error Code 4: Cannot find plugin: Foo, version: 1", ("plugin", "register")),
        (
            "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed. Version tag does not match",
            ("version",),
        ),
        (
            "The engine plan file is generated on an incompatible device, expecting compute capability 8.9",
            ("another GPU", "stca build"),
        ),
        (
            "Error Code 1: Serialization (assertion header.magicTag == kMAGIC failed. Magic tag mismatch)",
            ("damaged",),
        ),
        ("Requested amount of GPU memory (34359738368 bytes) could not be allocated. OutOfMemory", ("memory",)),
        ("IRuntime::deserializeCudaEngine: something\nelse", ("cannot be loaded", "something else")),
        ("", ("no reason",)),
    ],
)
def test_a_plan_the_library_refuses(tmp_path, says, words):
    with one_line(BuildError, CAPTURED.file, *words):
        make(tmp_path, says=says)
    assert len(explain_refusal(ENTRY, [says] * 20).splitlines()) == 1


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda trt: trt.inputs.pop(), ("no input 'target'",)),
        (lambda trt: trt.inputs.append(("more", "int64", ("N_t",))), ("'more'", "says nothing")),
        (lambda trt: trt.inputs.__setitem__(2, ("target", "int32", ("N_t",))), ("int32", "int64")),
        (lambda trt: trt.inputs.__setitem__(0, ("state", "bfloat16", ("N_h", 4))), ("4]", "[N_h, 2]")),
        (lambda trt: trt.outputs.reverse() or trt.outputs.pop(), ("no output 'scores'",)),
        (lambda trt: trt.outputs.append(("more", "int64", ("N_t",))), ("gives 'more'",)),
    ],
)
def test_a_plan_that_is_not_what_its_entry_says(tmp_path, monkeypatch, change, said):
    """Buffers are made by the entry: a plan that reads more than it says would read what is not there."""
    (tmp_path / "p").write_bytes(b"plan")
    device = Device(cuda=FakeCuda())
    module = FakeTensorRT(device.cuda)
    change(module)
    with one_line(BuildError, ENTRY.file, "stca build", *said):
        TensorRTEngine(tmp_path / "p", ENTRY, device, module=module)
