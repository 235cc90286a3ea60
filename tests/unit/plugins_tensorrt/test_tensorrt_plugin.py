"""The plugins under NVIDIA's real bindings: what a build learns from them, and that the launch it would make is right.

`plugin_driver` is the part of a build; the launches it evaluates run through the same kernel source in Triton's
interpreter, with that grid and that argument list, on outputs full of NaN.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support import attention_cases, nvidia_bindings

from stca.errors import BuildError
from stca.plugins import aot, tiling
from stca.plugins.devices import ARTIFACT_SMS, device_for
from stca.plugins.interpret import Interpreter
from stca.plugins.tiling import PORTABLE_SHARED_LIMIT, Shape

pytest.importorskip("triton", reason="compiling kernels needs Triton: pip install triton")
trt = nvidia_bindings.load_or_skip()
from support import plugin_driver  # noqa: E402

from stca.plugins import tensorrt_plugin as plugin  # noqa: E402

SINGLE = "TargetHistoryAttention"
TIED, PARTS, JOIN = SINGLE + "Tied", SINGLE + "Parts", SINGLE + "Join"
LISTS, LISTS_PARTS = SINGLE + "Segments", SINGLE + "SegmentsParts"
PARTS_FIELDS = {"scale": trt.PluginFieldType.FLOAT64, **dict.fromkeys(("parts", "tied"), trt.PluginFieldType.INT64)}
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
        "history_offsets": (int32, ("N_s+1" if shape.segments else "B+1",)),
        "history_lengths": (int32, ("N_s" if shape.segments else "B",)),
    }
    if shape.segments:
        inputs |= {"segment_offsets": (int32, ("B+1",)), "segment_bias": (trt.float32, ("N_s",))}
    return list({**inputs, **changed}.values())


def sizes(targets: int, tokens: int, requests: int, segments: int = 5) -> dict[str, int]:
    counts = {"N_t": targets, "N_h": tokens, "B": requests, "N_s": segments}
    return {**counts, "B+1": requests + 1, "N_s+1": segments + 1}


TYPICAL = sizes(300, 10_000, 1)


def build(name: str, shape: Shape, scale: float = 0.125, **attributes: Any) -> plugin_driver.Built:
    return plugin_driver.build(name, {"scale": scale, **attributes}, attend_inputs(shape), TYPICAL)


def entry_parameters(ptx: str) -> list[str]:
    declared = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    assert declared is not None
    return re.findall(r"\.param \.(u64|u32)", declared[1])


class TestRegistration:
    @pytest.mark.parametrize("name", [SINGLE, TIED, PARTS, JOIN, LISTS, LISTS_PARTS])
    def test_the_registry_has_every_plugin(self, name: str) -> None:
        creator = trt.get_plugin_registry().get_creator(name, "1", "stca")
        assert creator is not None
        expected = {
            SINGLE: {"scale": trt.PluginFieldType.FLOAT64},
            TIED: {"scale": trt.PluginFieldType.FLOAT64},
            PARTS: PARTS_FIELDS,
            LISTS_PARTS: PARTS_FIELDS,
            LISTS: {"scale": trt.PluginFieldType.FLOAT64, "tied": trt.PluginFieldType.INT64},
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
    Case(SINGLE, Shape(8, 1, 64, 64, "float32"), sm=86),
    Case(SINGLE, Shape(2, 2, 48, 96, "float16"), sm=89),
    Case(TIED, Shape(16, 1, 1024, 1024, "bfloat16", tied=True)),
    Case(TIED, Shape(8, 1, 256, 256, "float16", tied=True), sm=100),
    Case(PARTS, Shape(16, 16, 64, 64, "bfloat16"), parts=7),
    Case(PARTS, Shape(8, 1, 256, 256, "bfloat16", tied=True), parts=32),
    Case(LISTS, Shape(8, 8, 64, 64, "float16", segments=True), sm=80),
    Case(LISTS_PARTS, Shape(8, 1, 256, 256, "bfloat16", tied=True, segments=True), parts=7),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_types_shapes_kernel_and_launch(case: Case) -> None:
    plugin.settings.sm = case.sm
    shape, parts = case.shape, case.parts
    extra = {"parts": parts} if parts > 1 else {}
    extra |= {"tied": int(shape.tied)} if parts > 1 or shape.segments else {}
    built = build(case.name, shape, **extra)

    element = TYPES[shape.dtype]
    at = sizes(37, 5000, 3)
    dims = [tuple(plugin_driver.evaluate(d, at) for d in output) for output in built.output_dims]
    if parts > 1:
        assert built.output_types == [trt.float32, trt.float32]
        assert dims == [(parts, 37, shape.heads, shape.value_depth), (parts, 37, shape.heads, 2)]
    else:
        assert built.output_types == [element]
        assert dims == [(37, shape.heads, shape.value_depth)]
    (combination,) = built.combinations
    lists = [trt.int32, trt.float32] if shape.segments else []
    assert [desc.type for desc in combination] == [element] * 3 + [trt.int32] * 3 + lists + built.output_types
    assert {desc.format for desc in combination} == {trt.TensorFormat.LINEAR}

    (tactic,) = built.tactics
    assert tactic.kernel == "attend_kernel"
    assert f".target sm_{case.sm}" in tactic.ptx
    assert f".visible .entry {tactic.kernel}(" in tactic.ptx
    inputs, counts = ["u64"] * (6 + len(lists)), ["u32"] * (4 if shape.segments else 3)
    assert entry_parameters(tactic.ptx) == inputs + counts + ["u64"] * len(built.output_types)
    tile = plugin.candidates(shape, case.sm, PORTABLE_SHARED_LIMIT)[tactic.number - 1]
    for targets, tokens, requests in ((1, 1, 1), (300, 10_000, 1), (1024, 640_000, 64)):
        launch = tactic.at(sizes(targets, tokens, requests))
        assert launch.values == (targets, tokens, requests, *([5] if shape.segments else []))
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
    plugin.settings.tactics, plugin.settings.sm = 2, 80
    built = build(SINGLE, Shape(8, 1, 64, 64, "bfloat16"))
    assert len({tactic.number for tactic in built.tactics}) == 2
    assert len({tactic.ptx for tactic in built.tactics}) == 2
    assert all(tactic.at(TYPICAL).shared <= PORTABLE_SHARED_LIMIT for tactic in built.tactics)

    plugin.settings.shared_limit, plugin.settings.tactics = 8 * 1024, 1
    lower = build(SINGLE, Shape(8, 1, 64, 64, "bfloat16"))
    assert all(tactic.at(TYPICAL).shared <= 8 * 1024 for tactic in lower.tactics)

    plugin.settings.shared_limit = 64
    with pytest.raises(BuildError, match=r"no tile .* 64 bytes of shared memory on SM 80; raise"):
        build(SINGLE, Shape(8, 1, 64, 64, "bfloat16"))


class TestErrors:
    SHAPE = Shape(2, 2, 64, 64, "bfloat16")

    def refuse(self, match: str, name: str = SINGLE, parts: int = 1, **changed: Any) -> None:
        attributes = {"scale": 0.125} if name == SINGLE else {"scale": 0.125, "parts": parts, "tied": 0}
        shape = dataclasses.replace(self.SHAPE, segments=name == LISTS_PARTS)
        with pytest.raises(BuildError, match=match):
            plugin_driver.build(name, attributes, attend_inputs(shape, **changed), TYPICAL)

    def test_dtype(self) -> None:
        self.refuse("query, key, value are INT8, BF16, BF16; supported", query=(trt.int8, ("N_t", 2, 64)))
        self.refuse("supported is one of BF16, HALF, FLOAT for all", value=(trt.float16, ("N_h", 2, 64)))

    def test_offsets_that_are_not_int32(self) -> None:
        self.refuse(r"history_offsets is INT64; supported is INT32 \(cast it", history_offsets=(trt.int64, ("B+1",)))

    def test_a_bias_that_is_not_float32(self) -> None:
        said = r"segment_bias is HALF; supported is FLOAT \(cast it"
        self.refuse(said, LISTS_PARTS, 2, segment_bias=(trt.float16, ("N_s",)))

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
        self.refuse("1 parts; supported are 2 to 128", name=PARTS)
        self.refuse("129 parts; supported are 2 to 128", name=PARTS, parts=129)

    @pytest.mark.parametrize(
        ("most", "message"),
        [
            (sizes(2**30, 10_000, 1), f"N_t \\* H is {2**31}, expected less than {2**31 - 2**15}"),
            (sizes(300, 2**31 - 2**15, 1), f"N_h is {2**31 - 2**15}, expected less than {2**31 - 2**15}"),
            (sizes(300, 10_000, 2**30), f"B is {2**30}, expected less than {2**30}"),
        ],
    )
    def test_sizes_beyond_int32(self, most: dict[str, int], message: str) -> None:
        with pytest.raises(BuildError, match=message):
            plugin_driver.build(SINGLE, {"scale": 0.125}, attend_inputs(self.SHAPE), most)

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
        monkeypatch.setattr("stca.plugins.driver.device_sm", no_gpu)
        self.refuse("for which GPU. Set stca.plugins.tensorrt_plugin.settings.sm, as no NVIDIA driver")


# --- numbers ----------------------------------------------------------------------------------------------------------


def run(case: attention_cases.Case, parts: int, tactics: int, interpreter: Interpreter) -> int:
    """Build the case's plugins, launch every tactic in the interpreter on NaN, and check; returns how many it was."""
    x = attention_cases.inputs(case)
    scale = attention_cases.signed_scale(case)
    shape = case.shape
    at = sizes(len(x.query), len(x.key), len(x.target_offsets) - 1, len(x.history_lengths))
    plugin.settings.tactics = tactics
    lists = bool(x.segments())
    name = (LISTS_PARTS if lists else PARTS) if parts > 1 else LISTS if lists else TIED if case.tied else SINGLE
    extra = {"parts": parts} if parts > 1 else {}
    extra |= {"tied": int(case.tied)} if parts > 1 or lists else {}
    built = plugin_driver.build(name, {"scale": scale, **extra}, attend_inputs(shape), at)
    dims = [tuple(plugin_driver.evaluate(d, at) for d in output) for output in built.output_dims]
    for tactic in built.tactics:
        tile = plugin.candidates(shape, 90, PORTABLE_SHARED_LIMIT)[tactic.number - 1]
        constants = aot.attend_constants(shape, tile, np.float32(scale).item(), parts > 1, upcast=True)
        out = torch.full((len(x.query), case.heads, case.value_depth), math.nan, dtype=x.query.dtype)
        outputs = [torch.full(d, math.nan) for d in dims] if parts > 1 else [out]
        launch = tactic.at(at)
        none = [] if lists else [None]
        given = [*x.tensors(), *(x.segments() or none * 2), *launch.values, *none, *outputs]
        interpreter.launch(launch.kernel, launch.grid, given, constants)
        if parts > 1:
            inputs = [(trt.float32, (parts, "N_t", *d[2:])) for d in dims]
            join = plugin_driver.build(JOIN, {"dtype": case.dtype}, inputs, at).tactics[0].at(at)
            constants = aot.combine_constants(case.value_depth)
            interpreter.launch(join.kernel, join.grid, [*outputs, *join.values, out], constants)
        attention_cases.check(case, out)
    return len(built.tactics)


RAGGED = attention_cases.Layout("tensorrt-ragged", (5, 0, 3, 17), (40, 7, 0, 65), (33, 7, 0, 65))


@pytest.mark.parametrize(
    ("case", "parts", "tactics"),
    [
        (attention_cases.Case(RAGGED, 2, 2, 32, 32, "bfloat16"), 1, 2),
        (attention_cases.Case(RAGGED, 4, 1, 64, 32, "float32"), 1, 1),
        (attention_cases.Case(RAGGED, 2, 2, 48, 16, "float16"), 3, 1),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_launch_computes_the_operator(
    case: attention_cases.Case, parts: int, tactics: int, interpreter: Interpreter
) -> None:
    assert run(case, parts, tactics=tactics, interpreter=interpreter) == tactics


@pytest.mark.parametrize("parts", [1, 5])
def test_the_launch_computes_the_operator_with_key_and_value_tied(parts: int, interpreter: Interpreter) -> None:
    layout = attention_cases.Layout("tensorrt-tied", (7, 2), (129, 300))
    case = attention_cases.Case(layout, 4, 1, 64, 64, "bfloat16", tied=True)
    run(case, parts, tactics=1, interpreter=interpreter)


def uncompiled(shape: Shape, tile: tiling.Tile, sm: int, scale: float, split: bool) -> aot.Artifact:
    """What the launch needs to know of a kernel, without the seconds it takes to compile."""
    shared = tiling.shared_bytes(shape, tile, sm)
    return aot.Artifact("attend_kernel", "", f"sm_{sm}", 32 * tile.warps, shared, ())


# The shared table, thinned: its cases differ in more ways than a launch does. Nothing is launched for no targets.
TABLE = [
    case
    for case in attention_cases.TABLE
    if case.products < 10_000 and sum(case.layout.targets) and not case.layout.lists
][::7]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_the_table(case: attention_cases.Case, interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "compile_attend", uncompiled)
    parts = 1 if len(case.layout.targets) > 100 else 1 + len(case.name) % 3
    run(case, parts, tactics=1, interpreter=interpreter)


def test_the_check_notices_a_wrong_grid_and_a_wrong_argument(
    interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of rows or a request too few, and the same case fails."""
    monkeypatch.setattr(aot, "compile_attend", uncompiled)
    case = attention_cases.Case(RAGGED, 2, 2, 32, 32, "float32")
    run(case, 1, tactics=1, interpreter=interpreter)
    right = plugin_driver.Tactic.at

    def short(tactic: plugin_driver.Tactic, at: dict[str, int]) -> plugin_driver.Evaluated:
        launch = right(tactic, at)
        return dataclasses.replace(launch, grid=(launch.grid[0] - 1, *launch.grid[1:]))

    def forgotten(tactic: plugin_driver.Tactic, at: dict[str, int]) -> plugin_driver.Evaluated:
        launch = right(tactic, at)
        return dataclasses.replace(launch, values=(*launch.values[:2], launch.values[2] - 1))

    for wrong in (short, forgotten):
        monkeypatch.setattr(plugin_driver.Tactic, "at", wrong)
        with pytest.raises(AssertionError):
            run(case, 1, tactics=1, interpreter=interpreter)


def test_settings_reach_the_cost_model() -> None:
    """The tactic timed first is the model's first choice for the sizes the build tunes for."""
    shape = Shape(16, 16, 64, 64, "bfloat16")
    few, many = sizes(1, 10_000, 1), sizes(1024, 10_000, 1)
    chosen = []
    for at in (few, many):
        built = plugin_driver.build(SINGLE, {"scale": 0.125}, attend_inputs(shape), at)
        tile = plugin.candidates(shape, 90, PORTABLE_SHARED_LIMIT)[built.tactics[0].number - 1]
        chosen.append(tile)
        device, counts = device_for(90), tiling.Sizes(at["N_t"], at["N_h"], at["B"])
        every = tiling.tiles(shape, 90, PORTABLE_SHARED_LIMIT)
        assert tile == min(every, key=lambda one: tiling.seconds(shape, counts, one, 1, device))
    assert chosen[0].block_m < chosen[1].block_m
