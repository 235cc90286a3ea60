"""The plugins under NVIDIA's real bindings: what a build learns from them, and that the launch it would make is right.

`plugin_driver` is the part of a build; the launches it evaluates run through the same kernel source in Triton's
interpreter, with that grid and that argument list, on outputs full of NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stca.errors import BuildError
from stca.plugins import aot, tiling
from stca.plugins.interpret import Interpreter
from stca.plugins.reference import target_history_attention
from stca.plugins.tiling import ARTIFACT_SMS, PORTABLE_SHARED_LIMIT, Shape

pytest.importorskip("triton", reason="compiling kernels needs Triton: pip install triton")
from support import nvidia_bindings

trt = nvidia_bindings.load_or_skip()
from support import plugin_driver  # noqa: E402

from stca.plugins import tensorrt_plugin as plugin  # noqa: E402

SINGLE = "TargetHistoryAttention"
TIED, PARTS, JOIN = SINGLE + "Tied", SINGLE + "Parts", SINGLE + "Join"
TYPES = {"bfloat16": trt.bfloat16, "float16": trt.float16, "float32": trt.float32}


@pytest.fixture(autouse=True)
def build_settings() -> Iterator[None]:
    """A build for one SM with one tactic a node."""
    before = plugin.Settings(**vars(plugin.settings))
    plugin.settings.sm, plugin.settings.tactics = 90, 1
    yield
    vars(plugin.settings).update(vars(before))


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as made:
        yield made


def attend_inputs(shape: Shape, **changed: Any) -> list[tuple[Any, plugin_driver.Dims]]:
    """Types and dimensions of the node's inputs; the counts are dynamic."""
    dtype, int32 = TYPES[shape.dtype], trt.int32
    inputs: dict[str, tuple[Any, plugin_driver.Dims]] = {
        "query": (dtype, ("N_t", shape.heads, shape.depth)),
        "key": (dtype, ("N_h", shape.key_heads, shape.depth)),
        "value": (dtype, ("N_h", shape.key_heads, shape.value_depth)),
        "target_offsets": (int32, ("B+1",)),
        "history_offsets": (int32, ("B+1",)),
        "history_lengths": (int32, ("B",)),
    }
    return list({**inputs, **changed}.values())


def sizes(targets: int, tokens: int, requests: int) -> dict[str, int]:
    return {"N_t": targets, "N_h": tokens, "B": requests, "B+1": requests + 1}


TYPICAL = sizes(300, 10_000, 1)


def build(name: str, shape: Shape, scale: float = 0.125, **attributes: Any) -> plugin_driver.Built:
    return plugin_driver.build(name, {"scale": scale, **attributes}, attend_inputs(shape), TYPICAL)


def entry_parameters(ptx: str) -> list[str]:
    declared = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    assert declared is not None
    return re.findall(r"\.param \.(u64|u32)", declared[1])


class TestRegistration:
    @pytest.mark.parametrize("name", [SINGLE, TIED, PARTS, JOIN])
    def test_the_registry_has_every_plugin(self, name: str) -> None:
        creator = trt.get_plugin_registry().get_creator(name, "1", "stca")
        assert creator is not None
        expected = {
            SINGLE: {"scale": trt.PluginFieldType.FLOAT64},
            TIED: {"scale": trt.PluginFieldType.FLOAT64},
            PARTS: {
                "scale": trt.PluginFieldType.FLOAT64,
                "parts": trt.PluginFieldType.INT64,
                "tied": trt.PluginFieldType.INT64,
            },
            JOIN: {"dtype": trt.PluginFieldType.CHAR},
        }[name]
        assert {field.name: field.type for field in creator.field_names} == expected

    def test_nvidias_validators_see_the_signatures(self) -> None:
        """A signature that the validators accept and read, not merely one they ignore."""
        definition = getattr(trt.plugin.op.stca, PARTS)
        assert definition.input_tensor_names == [
            "query", "key", "value", "target_offsets", "history_offsets", "history_lengths",
        ]  # fmt: skip
        assert definition.input_attrs == {"scale": float, "parts": int, "tied": int}
        assert definition.num_outputs == 2
        assert definition.aot_impl_attr_names == definition.autotune_attr_names == ["scale", "parts", "tied"]
        assert definition.impl_func is None

    def test_nvidias_validators_refuse_what_they_should(self) -> None:
        def attribute_without_type(x: Any, scale: float) -> Any:
            return x

        attribute_without_type.__annotations__ = {"x": trt.plugin.TensorDesc, "return": trt.plugin.TensorDesc}
        with pytest.raises(ValueError, match="scale does not have a type annotation"):
            trt.plugin.register("stca_test::Broken")(attribute_without_type)


@dataclass(frozen=True)
class Case:
    """A row of the table; the launch is checked at three sizes."""

    name: str
    shape: Shape
    sm: int = 90
    parts: int = 1


CASES = [
    Case(SINGLE, Shape(16, 16, 64, 64, "bfloat16")),
    Case(SINGLE, Shape(8, 8, 32, 32, "float16"), sm=80),
    Case(SINGLE, Shape(4, 4, 512, 512, "bfloat16"), sm=120),
    Case(SINGLE, Shape(8, 1, 256, 256, "float32"), sm=86),
    Case(SINGLE, Shape(2, 2, 48, 96, "float16"), sm=89),
    Case(TIED, Shape(16, 1, 1024, 1024, "bfloat16", tied=True)),
    Case(TIED, Shape(8, 1, 256, 256, "float16", tied=True), sm=100),
    Case(PARTS, Shape(16, 16, 64, 64, "bfloat16"), parts=7),
    Case(PARTS, Shape(8, 1, 512, 512, "bfloat16", tied=True), parts=32),
    Case(PARTS, Shape(8, 1, 128, 64, "float32"), parts=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_types_shapes_kernel_and_launch(case: Case) -> None:
    plugin.settings.sm = case.sm
    shape, parts = case.shape, case.parts
    extra = {"parts": parts, "tied": int(shape.tied)} if case.name == PARTS else {}
    built = build(case.name, shape, **extra)

    element = TYPES[shape.dtype]
    at = sizes(37, 5000, 3)
    dims = [tuple(plugin_driver.evaluate(d, at) for d in output) for output in built.output_dims]
    if case.name == PARTS:
        assert built.output_types == [trt.float32, trt.float32]
        assert dims == [(parts, 37, shape.heads, shape.value_depth), (parts, 37, shape.heads, 2)]
    else:
        assert built.output_types == [element]
        assert dims == [(37, shape.heads, shape.value_depth)]
    (combination,) = built.combinations
    assert [desc.type for desc in combination] == [element] * 3 + [trt.int32] * 3 + built.output_types
    assert {desc.format for desc in combination} == {trt.TensorFormat.LINEAR}

    (tactic,) = built.tactics
    assert tactic.kernel == "attend_kernel"
    assert f".target sm_{case.sm}" in tactic.ptx
    assert f".visible .entry {tactic.kernel}(" in tactic.ptx
    assert entry_parameters(tactic.ptx) == ["u64"] * 6 + ["u32"] * 2 + ["u64"] * len(built.output_types)
    tile = plugin.candidates(shape, case.sm, PORTABLE_SHARED_LIMIT)[tactic.number - 1]
    for targets, tokens, requests in ((1, 1, 1), (300, 10_000, 1), (1024, 640_000, 64)):
        launch = tactic.at(sizes(targets, tokens, requests))
        assert launch.values == (targets, requests)
        rows = targets * shape.heads // shape.key_heads
        assert launch.grid == (
            rows // tile.block_m + requests,
            shape.key_heads * math.ceil(shape.value_depth / tile.block_dv),
            parts,
        )
        # Whatever the offsets, every request finds a block for each of its row tiles.
        assert launch.grid[0] >= math.ceil(rows / tile.block_m)
        assert launch.block == (int(re.findall(r"\.reqntid (\d+)", launch.ptx)[0]), 1, 1)
        assert 0 < launch.shared <= PORTABLE_SHARED_LIMIT


@pytest.mark.parametrize("dtype", TYPES)
def test_join(dtype: str) -> None:
    inputs = [(trt.float32, (7, "N_t", 16, 64)), (trt.float32, (7, "N_t", 16, 2))]
    built = plugin_driver.build(JOIN, {"dtype": dtype}, inputs, TYPICAL)
    assert built.output_types == [TYPES[dtype]]
    assert [plugin_driver.evaluate(d, {"N_t": 5}) for d in built.output_dims[0]] == [5, 16, 64]
    (tactic,) = built.tactics
    assert tactic.kernel == "combine_kernel"
    assert entry_parameters(tactic.ptx) == ["u64", "u64", "u32", "u32", "u64"]
    launch = tactic.at({"N_t": 300})
    assert (launch.grid, launch.values) == ((4800, 1, 1), (4800, 7))


def test_tactics_differ_and_keep_to_the_shared_memory_limit() -> None:
    plugin.settings.tactics, plugin.settings.sm = 3, 80
    built = build(SINGLE, Shape(8, 1, 64, 64, "bfloat16"))
    assert len({tactic.number for tactic in built.tactics}) == 3
    assert len({tactic.ptx for tactic in built.tactics}) == 3
    assert all(tactic.at(TYPICAL).shared <= PORTABLE_SHARED_LIMIT for tactic in built.tactics)

    plugin.settings.shared_limit = 8 * 1024
    lower = build(SINGLE, Shape(8, 1, 64, 64, "bfloat16"))
    assert all(tactic.at(TYPICAL).shared <= 8 * 1024 for tactic in lower.tactics)

    plugin.settings.shared_limit = 64
    with pytest.raises(BuildError, match=r"no tile .* 64 bytes of shared memory on SM 80; raise"):
        build(SINGLE, Shape(8, 1, 64, 64, "bfloat16"))


class TestErrors:
    SHAPE = Shape(2, 2, 64, 64, "bfloat16")

    def refuse(self, match: str, name: str = SINGLE, **changed: Any) -> None:
        attributes = {"scale": 0.125} if name == SINGLE else {"scale": 0.125, "parts": 1, "tied": 0}
        with pytest.raises(BuildError, match=match):
            plugin_driver.build(name, attributes, attend_inputs(self.SHAPE, **changed), TYPICAL)

    def test_dtype(self) -> None:
        self.refuse("query, key, value are INT8, BF16, BF16; supported", query=(trt.int8, ("N_t", 2, 64)))
        self.refuse("supported is one of BF16, HALF, FLOAT for all", value=(trt.float16, ("N_h", 2, 64)))

    def test_offsets_that_are_not_int32(self) -> None:
        self.refuse(r"history_offsets is INT64; supported is INT32 \(cast it", history_offsets=(trt.int64, ("B+1",)))

    def test_head_size(self) -> None:
        wide = {name: (trt.bfloat16, (n, 2, 1024)) for name, n in (("query", "N_t"), ("key", "N_h"), ("value", "N_h"))}
        self.refuse("head size D = 1024 is not supported; the kernels take multiples of 16 from 16 to 512", **wide)
        self.refuse("key and query differ in head size", key=(trt.bfloat16, ("N_h", 2, 32)))

    def test_dynamic_head_size(self) -> None:
        self.refuse("query's head count is dynamic; .* must be static", query=(trt.bfloat16, ("N_t", "N_t", 64)))

    def test_head_counts(self) -> None:
        key = dict.fromkeys(("key", "value"), (trt.bfloat16, ("N_h", 3, 64)))
        self.refuse("3 key heads for 2 heads; use 1 or 2", **key)

    def test_rank(self) -> None:
        self.refuse("history_lengths has 2 dimensions, expected 1", history_lengths=(trt.int32, ("B", 1)))

    def test_parts(self) -> None:
        self.refuse("1 parts; supported is 2 or more", name=PARTS)

    def test_join_dtype(self) -> None:
        inputs = [(trt.float32, (7, "N_t", 16, 64)), (trt.float32, (7, "N_t", 16, 2))]
        with pytest.raises(BuildError, match="dtype int8 is not supported; use one of bfloat16, float16, float32"):
            plugin_driver.build(JOIN, {"dtype": "int8"}, inputs, TYPICAL)

    def test_sm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plugin.settings.sm = 75
        self.refuse(f"SM 75: supported are {', '.join(map(str, ARTIFACT_SMS))}")

        def no_gpu() -> int:
            raise BuildError("no NVIDIA driver on this machine")

        plugin.settings.sm = None
        plugin._this_gpu.cache_clear()
        monkeypatch.setattr("stca.plugins.ptx_launch.device_sm", no_gpu)
        self.refuse("for which GPU. Set stca.plugins.tensorrt_plugin.settings.sm, as no NVIDIA driver")


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Arguments of the operator."""

    query: Tensor
    key: Tensor
    value: Tensor
    target_offsets: Tensor
    history_offsets: Tensor
    history_lengths: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        """In the node's order."""
        return list(vars(self).values())

    @property
    def sizes(self) -> dict[str, int]:
        """The dynamic dimensions' values."""
        return sizes(self.query.shape[0], self.key.shape[0], self.history_lengths.shape[0])


def make_batch(shape: Shape, targets: list[int], lengths: list[int], unused: int = 0) -> Batch:
    """One segment per request, with `unused` tokens (NaN) after each segment's used ones."""
    generator = torch.Generator().manual_seed(len(lengths) + shape.depth)
    dtype = getattr(torch, shape.dtype)

    def draw(*dims: int) -> Tensor:
        return torch.randn(dims, generator=generator).to(dtype)

    history = np.cumsum([0, *(n + unused for n in lengths)])
    key = draw(int(history[-1]), shape.key_heads, shape.depth)
    value = key if shape.tied else draw(int(history[-1]), shape.key_heads, shape.value_depth)
    for start, length in zip(history, lengths, strict=False):
        for tensor in (key, value):
            tensor[start + length : start + length + unused] = math.nan
    structure = [torch.tensor(x, dtype=torch.int32) for x in (np.cumsum([0, *targets]), history, lengths)]
    return Batch(draw(sum(targets), shape.heads, shape.depth), key, value, *structure)


def truth(batch: Batch, scale: float) -> Tensor:
    arrays = [x.float().numpy() if x.is_floating_point() else x.numpy() for x in batch.inputs]
    return torch.from_numpy(target_history_attention(*arrays, scale=scale))


def torch_error(batch: Batch, expected: Tensor, scale: float) -> float:
    """Largest error of the same sums in plain torch, in the batch's own precision."""
    worst, heads, key_heads = 0.0, batch.query.shape[1], batch.key.shape[1]
    for b, length in enumerate(batch.history_lengths.tolist()):
        t0, t1 = batch.target_offsets[b : b + 2].tolist()
        l0 = int(batch.history_offsets[b])
        for h in range(heads if length and t1 > t0 else 0):
            k, v = (x[l0 : l0 + length, h if key_heads == heads else 0] for x in (batch.key, batch.value))
            out = torch.softmax(scale * (batch.query[t0:t1, h] @ k.T), dim=-1) @ v
            worst = max(worst, float((out.double() - expected[t0:t1, h]).abs().max()))
    return worst


def run_launch(
    interpreter: Interpreter,
    launch: plugin_driver.Evaluated,
    inputs: list[Tensor],
    outputs: list[Tensor],
    constants: dict[str, Any],
) -> None:
    """The launch with TensorRT's argument list: inputs, int32 values, outputs."""
    for output in outputs:
        output.fill_(math.nan)
    interpreter.launch(launch.kernel, launch.grid, [*inputs, *launch.values, *outputs], constants)


def check(out: Tensor, batch: Batch, scale: float) -> None:
    """By the project's rule: at most twice torch's own error in that precision, and rounding."""
    expected = truth(batch, scale)
    assert out.isfinite().all()
    error = float((out.double() - expected).abs().max())
    floor = torch.finfo(out.dtype).eps * max(1.0, float(expected.abs().max()))
    assert error <= 2 * torch_error(batch, expected, scale) + floor
    for b, length in enumerate(batch.history_lengths.tolist()):
        if length == 0:
            assert (out[int(batch.target_offsets[b]) : int(batch.target_offsets[b + 1])] == 0).all()


NUMBERS = [
    (Case(SINGLE, Shape(2, 2, 32, 32, "bfloat16")), [5, 0, 3, 17], [33, 7, 0, 65], 0),
    (Case(SINGLE, Shape(4, 1, 64, 32, "float32")), [3, 4], [1, 31], 2),
    (Case(TIED, Shape(4, 1, 64, 64, "float16", tied=True)), [9, 2], [127, 129], 0),
    (Case(PARTS, Shape(2, 2, 48, 16, "bfloat16"), parts=3), [5, 1, 20], [130, 0, 15], 3),
    (Case(PARTS, Shape(4, 1, 64, 64, "bfloat16", tied=True), parts=5), [7], [300], 0),
]


@pytest.mark.parametrize(("case", "targets", "lengths", "unused"), NUMBERS, ids=str)
def test_the_launch_computes_the_operator(
    case: Case, targets: list[int], lengths: list[int], unused: int, interpreter: Interpreter
) -> None:
    shape, parts, scale = case.shape, case.parts, 0.25
    batch = make_batch(shape, targets, lengths, unused)
    plugin.settings.tactics = 2
    extra = {"parts": parts, "tied": int(shape.tied)} if case.name == PARTS else {}
    inputs = attend_inputs(shape)
    built = plugin_driver.build(case.name, {"scale": scale, **extra}, inputs, batch.sizes)
    for tactic in built.tactics:
        tile = plugin.candidates(shape, 90, PORTABLE_SHARED_LIMIT)[tactic.number - 1]
        constants = aot.attend_constants(shape, tile, scale, parts > 1, upcast=True)
        launch = tactic.at(batch.sizes)
        out = batch.query.new_empty(batch.query.shape[0], shape.heads, shape.value_depth)
        if parts == 1:
            run_launch(interpreter, launch, batch.inputs, [out], constants)
        else:
            dims = [tuple(plugin_driver.evaluate(d, batch.sizes) for d in output) for output in built.output_dims]
            partial = [torch.empty(d, dtype=torch.float32) for d in dims]
            run_launch(interpreter, launch, batch.inputs, partial, constants)
            join_inputs = [(trt.float32, (parts, "N_t", *d[2:])) for d in dims]
            join = plugin_driver.build(JOIN, {"dtype": shape.dtype}, join_inputs, batch.sizes)
            joined = join.tactics[0].at(batch.sizes)
            run_launch(interpreter, joined, partial, [out], aot.combine_constants(shape.value_depth))
        check(out, batch, scale)


def test_the_check_notices_a_wrong_grid(interpreter: Interpreter) -> None:
    """One block of rows too few leaves NaN where it should have written."""
    case, targets, lengths, _ = NUMBERS[0]
    batch = make_batch(case.shape, targets, lengths)
    built = plugin_driver.build(case.name, {"scale": 0.25}, attend_inputs(case.shape), batch.sizes)
    launch = built.tactics[0].at(batch.sizes)
    launch.grid = (launch.grid[0] - 1, *launch.grid[1:])
    tile = plugin.candidates(case.shape, 90, PORTABLE_SHARED_LIMIT)[built.tactics[0].number - 1]
    out = torch.empty_like(batch.query)
    constants = aot.attend_constants(case.shape, tile, 0.25, False, upcast=True)
    run_launch(interpreter, launch, batch.inputs, [out], constants)
    with pytest.raises(AssertionError):
        check(out, batch, 0.25)


def test_settings_reach_the_cost_model() -> None:
    """The tactic timed first is the model's first choice for the sizes the build tunes for."""
    shape = Shape(16, 16, 64, 64, "bfloat16")
    few, many = sizes(1, 10_000, 1), sizes(1024, 10_000, 1)
    chosen = []
    for at in (few, many):
        built = plugin_driver.build(SINGLE, {"scale": 0.125}, attend_inputs(shape), at)
        tile = plugin.candidates(shape, 90, PORTABLE_SHARED_LIMIT)[built.tactics[0].number - 1]
        chosen.append(tile)
        device, counts = tiling.device_for(90), tiling.Sizes(at["N_t"], at["N_h"], at["B"])
        every = tiling.tiles(shape, 90, PORTABLE_SHARED_LIMIT)
        assert tile == min(every, key=lambda one: tiling.seconds(shape, counts, one, 1, device))
    assert chosen[0].block_m < chosen[1].block_m
