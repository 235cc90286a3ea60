"""Plans of TensorRT: which profile admits what, and what is told of one that cannot be loaded."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.errors import one_line
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import CAPTURED, ENTRY, FakeTensorRT, make, request

from stca.errors import BuildError, RequestError
from stca.runtime.cuda_device import Device
from stca.runtime.tensorrt_engine import TensorRTEngine
from stca.runtime.tensorrt_plan import check_fit, choose_profile, explain_refusal, sizes_of


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
