"""A session on TensorRT engines, with stand-ins: the library runs the bundle's graphs on ONNX Runtime.

Everything around the library is real: the choice of engines, states that stay on the device, batches, appended events,
added rows, replayed graphs, and what is given back. Scores must be those of a session on the bundle's own graphs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import itertools
import shutil
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from support.errors import one_line
from support.fake_cuda import IO_MODE, FakeCuda, tensors_of

import stca.runtime.cuda_device
import stca.runtime.engine_choice
import stca.runtime.tensorrt_engine
from stca import probe
from stca.bundle import Bundle, seal
from stca.checks.bench import bench
from stca.errors import BundleError, RequestError
from stca.manifest import EngineEntry
from stca.runtime import OnnxRuntimeEngine, Request, RequestBatch, Session
from stca.runtime.cuda_device import DeviceArray
from stca.runtime.engine_choice import Machine

VERSION, SM = "11.4.0.106", 90
MOST = {"N_h": 24, "N_t": 16, "B": 3, "B_plus_1": 4}


class FakeTensorRT:
    """A library whose plans name a graph of the bundle."""

    __version__ = VERSION
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    TensorIOMode = IO_MODE

    class ILogger:
        INTERNAL_ERROR, ERROR = range(2)

    def __init__(self, root, cuda):
        self.root, self.cuda = root, cuda

    def Runtime(self, log):
        def deserialize(plan):
            run = OnnxRuntimeEngine(self.root / plan.decode(), threads=1)
            specs = Bundle.load(self.root).manifest.graphs[plan.decode().removesuffix(".onnx")]
            told = tensors_of(*([(s.name, s.dtype, s.shape) for s in ts] for ts in (specs.inputs, specs.outputs)))
            return SimpleNamespace(
                create_execution_context=lambda _: FakeContext(run, specs, self.cuda), device_memory_size_v2=64, **told
            )

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class FakeContext:
    def __init__(self, run, specs, cuda):
        self.run, self.specs, self.cuda, self.addresses, self.shapes, self.generation = run, specs, cuda, {}, {}, 0

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def set_device_memory(self, address, size):
        pass

    def set_optimization_profile_async(self, profile, stream):
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        self.generation += 1
        return True

    def execute_async_v3(self, stream):
        context, generation = weakref.ref(self), self.generation

        def work():
            self = context()
            assert self.generation == generation
            feeds = {s.name: self.memory(s, self.shapes[s.name]).copy() for s in self.specs.inputs}
            for name, x in self.run.run(feeds).items():
                spec = next(s for s in self.specs.outputs if s.name == name)
                self.memory(spec, x.shape)[...] = x

        self.cuda.submit(work, stream)
        return True

    def memory(self, spec, shape):
        dtype = np.dtype(spec.dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        assert self.cuda.on_device(self.addresses[spec.name], size)
        block = (ctypes.c_uint8 * size).from_address(self.addresses[spec.name])
        return np.frombuffer(block, dtype).reshape(shape)


@pytest.fixture
def bundle(bundle_dir, tmp_path):
    """With "plans" for TensorRT: two profiles, three requests per run, rows that may be added to the history."""
    root = shutil.copytree(bundle_dir, tmp_path / "B")
    manifest = Bundle.load(root).manifest
    entries = []
    for half in ("user_encoder", "target_scorer"):
        graph = manifest.graphs[half]
        (root / f"{half}.plan").write_bytes(graph.file.encode())
        dims = {d for t in graph.inputs for d in t.shape if isinstance(d, str)}
        low = {d: [2 if d == "B_plus_1" else 1, n, n] for d, n in MOST.items() if d in dims}
        entry = {
            "graph": half,
            "file": f"{half}.plan",
            "flavour": "tensorrt",
            "version": VERSION,
            "sm": SM,
            "precision": "fp32",
            "requests": MOST["B"],
            "padded": ["N_h"],
            "profiles": [{**low, "N_h": [1, 8, 8]}, {**low, "N_h": [9, 24, 24]}],
            "inputs": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in graph.inputs],
            "outputs": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in graph.outputs],
        }
        entries.append(EngineEntry.of(entry))
    seal(root, dataclasses.replace(manifest, engines=tuple(entries)))
    return root


@pytest.fixture
def cuda(bundle, monkeypatch):
    made = FakeCuda(SM)
    real = stca.runtime.cuda_device.Device
    monkeypatch.setattr(stca.runtime.cuda_device, "Device", lambda index: real(index, cuda=made))
    monkeypatch.setattr(stca.runtime.cuda_device, "_shared", {})
    monkeypatch.setattr(stca.runtime.tensorrt_engine, "load", lambda _: FakeTensorRT(bundle, made))
    here = Machine(SM, {"tensorrt": VERSION})
    monkeypatch.setattr(stca.runtime.engine_choice.Machine, "here", lambda gpu: here)
    return made


@pytest.fixture
def sessions(bundle, cuda):
    """On "TensorRT", and on the bundle's own graphs."""
    fast, plain = Session.load(bundle), Session.load(bundle, engine="graphs", threads=1)
    assert fast.engines["target_scorer"] == f"tensorrt {VERSION} (SM {SM}, fp32)"
    return fast, plain


def same(sessions, request):
    fast, plain = (session.score(request) for session in sessions)
    assert fast.dtype == plain.dtype
    assert np.allclose(fast, plain, rtol=0, atol=1e-6)


def requests(session, sizes, seed=0):
    specs = session.manifest.graphs["request"].inputs
    rng = np.random.default_rng(seed)
    return specs, [probe.single(specs, n, m, rng) for n, m in sizes]


def test_misses_hits_and_appended_events(sessions, cuda):
    fast, plain = sessions
    specs, made = requests(fast, [(n, 1 + n % 5) for n in (0, 1, 7, 8, 9, 20, 24, 11, 12, 10)])
    of_user = {s.name for s in specs if s.scope == "user"}
    for i, inputs in enumerate(made):
        same(sessions, Request(inputs, user=i, version=0))
        targets = {n: x for n, x in inputs.items() if n not in of_user}
        same(sessions, Request(targets, user=i, version=0))
        held = fast._store.find(i)[1].tensors
        assert {n for n, x in held.items() if isinstance(x, DeviceArray)} == {
            s.name for s in fast.manifest.state if s.shape[0] == "N_h"
        }
        events = {s.name: inputs[s.name][-3:] for s in specs if s.scope == "user" and s.shape[0] == "N_h"}
        events = {n: x for n, x in events.items() if n in inputs}
        assert [s.append(i, events, 1, after=0) for s in sessions] == [True, True]
        grown = np.concatenate([inputs["history_item"], events["history_item"]])
        if len(grown) <= MOST["N_h"]:
            same(sessions, Request(targets, user=i, version=1))
        else:  # the oldest fall off where the engines' window ends, which is narrower than the bundle's
            latest = {
                s.name: np.concatenate([inputs[s.name], events[s.name]])[-MOST["N_h"] :]
                for s in specs
                if s.name in events
            }
            true = plain.score(Request({**inputs, **latest}))
            assert np.allclose(fast.score(Request(targets, user=i, version=1)), true, rtol=0, atol=1e-6)
    assert fast.stats().hits == 2 * len(made)
    assert cuda.log.count("cudaGraphLaunch") > 5


def test_batches_go_in_runs_that_the_engines_take(sessions):
    """Five users in runs of at most three, 24 tokens and 16 targets; one that fits no run is refused."""
    fast, _ = sessions
    for sizes in (
        [(5, 3), (0, 2), (8, 4), (1, 1), (6, 6)],
        [(20, 3), (20, 3), (3, 3)],
        [(2, 9), (2, 9), (2, 16)],
        [(0, 1), (0, 0), (0, 2)],
    ):
        specs, made = requests(fast, sizes)
        for users in ((), tuple(range(len(sizes)))):
            same(sessions, RequestBatch(probe.pack(specs, made), users))
    for size, words in (((25, 1), ("25 tokens", "24")), ((1, 17), ("N_t is 17", "16"))):
        _, (inputs,) = requests(fast, [size])
        with one_line(RequestError, *words):
            fast.score(Request(inputs))


def test_a_longer_history_is_cut_to_what_the_engines_serve(bundle, cuda):
    fast, plain = Session.load(bundle, truncate=True), Session.load(bundle, engine="graphs", threads=1)
    specs, (inputs,) = requests(fast, [(30, 3)])
    latest = {s.name: inputs[s.name][-24:] for s in specs if s.shape[0] == "N_h" and s.name in inputs}
    found, true = fast.score(Request(inputs)), plain.score(Request({**inputs, **latest}))
    assert np.allclose(found, true, rtol=0, atol=1e-6)


def test_a_swap_gives_the_old_engines_back(sessions, bundle, cuda):
    """States stay, since weights and encoder are the same, and are served by the new engines."""
    fast, _ = sessions
    _, made = requests(fast, [(9, 3)] * 6)
    held = []
    for _ in range(4):
        for i, inputs in enumerate(made):
            same(sessions, Request(inputs, user=i, version=0))
        gc.collect()
        held.append(cuda.held)
        fast.swap(bundle)
    memory, pinned, _, streams = held[0]
    assert [(m, p, s) for m, p, _, s in held] == [(memory, pinned, streams)] * 4
    assert [graphs for _, _, graphs, _ in held] == [2, 1, 1, 1]  # the encoder had nothing to do after the first round
    assert fast.stats().misses == 6


def test_bench_measures_it_through_the_session(bundle, cuda):
    report = bench(Bundle.load(bundle), [8, 16], [3], engines=["tensorrt", "graphs"], seconds=0.01, pointwise=False)
    assert {(r.engine, r.history, r.stage) for r in report.rows} == set(
        itertools.product(("tensorrt", "graphs"), (8, 16), ("user_encoder", "target_scorer", "miss", "hit"))
    )
    assert report.measured["tensorrt"]["target_scorer"] == f"tensorrt {VERSION} (SM {SM}, fp32)"
    assert not report.absent
    assert cuda.log.count("cudaGraphLaunch") >= 4 * 5  # what is measured are replays


def test_nothing_is_held_after_the_last_session(bundle, cuda):
    session = Session.load(bundle)
    _, made = requests(session, [(9, 3), (3, 2)])
    for i, inputs in enumerate(made * 3):
        session.score(Request(inputs, user=i, version=0))
    assert all(cuda.held)
    del session
    gc.collect()
    assert cuda.held == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "other"}, "takes 'other'"),
        ({"dtype": "float64"}, "float64"),
        ({"shape": ["N_t", 3]}, "[N_t, 3]"),
    ],
)
def test_plans_are_held_against_the_manifest(bundle, cuda, monkeypatch, change, said):
    """Both the entry and the plan say the same, and another thing than the half's graph: wrong scores, or none."""
    manifest = Bundle.load(bundle).manifest
    scorer = next(e for e in manifest.engines if e.graph == "target_scorer")
    inputs = [({**t, **change} if t["name"] == "target_item" else t) for t in scorer.inputs]
    entries = [dataclasses.replace(e, inputs=tuple(inputs)) if e is scorer else e for e in manifest.engines]
    seal(bundle, dataclasses.replace(manifest, engines=tuple(entries)))
    monkeypatch.setattr(stca.runtime.tensorrt_engine, "check_plan", lambda *_: None)
    with one_line(BundleError, "target_scorer", said):
        Session.load(bundle)
