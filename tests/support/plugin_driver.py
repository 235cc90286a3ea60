"""Drive a TensorRT plugin as a build does, on a CPU: NVIDIA's own plugin class, over a stand-in for the expressions.

TensorRT hands a plugin symbolic dimensions and evaluates the launch it gets back for each request's shapes. Here a
dimension is a small tree (`Expression`) that `evaluate` computes for concrete ones; everything between the registry and
the plugin's functions is NVIDIA's code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from support import nvidia_bindings

trt = nvidia_bindings.load()
from tensorrt_bindings.plugin import _tensor  # noqa: E402  (needs the libraries that `load` brings)

Dims = Sequence[int | str]  # a name is a dynamic dimension

_OPERATIONS = {
    trt.DimensionOperation.SUM: lambda a, b: a + b,
    trt.DimensionOperation.PROD: lambda a, b: a * b,
    trt.DimensionOperation.SUB: lambda a, b: a - b,
    trt.DimensionOperation.MAX: max,
    trt.DimensionOperation.MIN: min,
    trt.DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
    trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
    trt.DimensionOperation.EQUAL: lambda a, b: int(a == b),
    trt.DimensionOperation.LESS: lambda a, b: int(a < b),
}


class Expression(trt.IDimensionExpr):  # type: ignore[misc, name-defined]
    """A constant, a named dimension, or an operation on two expressions."""

    # The bindings give the base class no constructor; made with `__new__` it is only a type to check against.
    value: int | str
    operation: Any
    operands: tuple[Expression, ...]

    @classmethod
    def make(cls, value: int | str = 0, operation: Any = None, operands: tuple[Expression, ...] = ()) -> Expression:
        """A leaf (`value`) or a node (`operation` and `operands`)."""
        made = cls.__new__(cls)
        made.value, made.operation, made.operands = value, operation, operands
        return made

    def is_constant(self) -> bool:
        """Whether it has a value without knowing any dimension."""
        return all(o.is_constant() for o in self.operands) if self.operands else isinstance(self.value, int)

    def get_constant_value(self) -> int:
        """That value."""
        return evaluate(self, {})


class ExpressionBuilder:
    """What TensorRT passes as `exprBuilder`."""

    def constant(self, value: int) -> Expression:
        """A leaf."""
        return Expression.make(value)

    def operation(self, operation: Any, first: Expression, second: Expression) -> Expression:
        """A node."""
        return Expression.make(operation=operation, operands=(first, second))


def evaluate(expression: Expression, sizes: Mapping[str, int]) -> int:
    """The expression's value for concrete dimensions, in TensorRT's integer arithmetic."""
    if expression.operands:
        return int(_OPERATIONS[expression.operation](*(evaluate(o, sizes) for o in expression.operands)))
    return expression.value if isinstance(expression.value, int) else sizes[expression.value]


@dataclass
class Evaluated:
    """One launch, as TensorRT would make it."""

    kernel: str
    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    values: tuple[int, ...]


@dataclass
class Tactic:
    """What a plugin answered for one tactic; its launch is still symbolic."""

    number: int
    kernel: str
    ptx: str
    params: SimpleNamespace
    values: tuple[Any, ...]

    def at(self, sizes: Mapping[str, int]) -> Evaluated:
        """The launch for concrete dimensions."""
        number = {name: evaluate(symbol.expression, sizes) for name, symbol in vars(self.params).items()}
        grid, block = (tuple(number[f"{kind}_{axis}"] for axis in "xyz") for kind in ("grid", "block"))
        values = tuple(evaluate(symbol.expression, sizes) for symbol in self.values)
        return Evaluated(self.kernel, self.ptx, grid, block, number["shared_mem"], values)  # type: ignore[arg-type]


@dataclass
class Built:
    """All that a build asks of a plugin."""

    output_types: list[Any]
    output_dims: list[tuple[Expression, ...]]
    combinations: list[tuple[Any, ...]]
    tactics: list[Tactic]


class _Dims(list[Any]):
    """NVIDIA's class of that name would keep the C++ side of each expression, which a stand-in has not."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class _Symbol(_tensor.SymExprImpl):  # type: ignore[misc]
    """NVIDIA's class, which checks the symbol's type, and keeps what it sets: its own property cannot be read."""

    def __init__(self, symbol: Any) -> None:
        super().__init__(symbol)
        self.expression: Expression = symbol._expr


class _Symbols(list[Any]):
    """What TensorRT passes as `symExprSetter`."""

    @property
    def nbSymExprs(self) -> int:
        return len(self)

    @nbSymExprs.setter
    def nbSymExprs(self, count: int) -> None:
        self[:] = [None] * count


def build(
    name: str, attributes: Mapping[str, Any], inputs: Sequence[tuple[Any, Dims]], sizes: Mapping[str, int]
) -> Built:
    """Take a registered plugin through a build.

    Args:
        name: of the plugin, in namespace `stca`.
        attributes: as the ONNX node has them; the parser hands floats as float32 and integers as int32.
        inputs: type and dimensions of each input tensor.
        sizes: the dynamic dimensions' values that the build tunes for.
    """
    kinds = {float: np.float32, int: np.int32}
    fields = [
        trt.PluginField(key, value.encode(), trt.PluginFieldType.CHAR)
        if isinstance(value, str)
        else trt.PluginField(
            key,
            np.array([value], dtype=kinds[type(value)]),
            trt.PluginFieldType.FLOAT32 if isinstance(value, float) else trt.PluginFieldType.INT32,
        )
        for key, value in attributes.items()
    ]
    creator = trt.get_plugin_registry().get_creator(name, "1", "stca")
    assert creator is not None, f"stca::{name} is not registered"
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(name, "stca", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD, request)
    try:
        with mock.patch.object(trt, "DimsExprs", _Dims), mock.patch.object(_tensor, "SymExprImpl", _Symbol):
            return _build(plugin, inputs, sizes)
    finally:
        _tensor.SymIntExpr._exprBuilder = None  # NVIDIA's class leaves it behind when a plugin raises


def _build(plugin: Any, inputs: Sequence[tuple[Any, Dims]], sizes: Mapping[str, int]) -> Built:
    builder = ExpressionBuilder()
    output_types = plugin.get_output_data_types([dtype for dtype, _ in inputs], [len(dims) for _, dims in inputs])
    symbolic = [_expressions(dims) for _, dims in inputs]
    output_dims = [tuple(dims) for dims in plugin.get_output_shapes(symbolic, [], builder)]
    concrete = [tuple(evaluate(e, sizes) for e in dims) for dims in (*symbolic, *output_dims)]
    described = [
        _describe(dtype, [e.is_constant() for e in dims], opt)
        for dtype, dims, opt in zip(
            [*(dtype for dtype, _ in inputs), *output_types], [*symbolic, *output_dims], concrete, strict=True
        )
    ]
    answered = plugin.get_supported_format_combinations(described, len(inputs))
    combinations = [tuple(answered[i : i + len(described)]) for i in range(0, len(answered), len(described))]
    for desc, chosen in zip(described, combinations[0], strict=True):
        desc.desc.type, desc.desc.format = chosen.type, chosen.format
    plugin.configure_plugin(described[: len(inputs)], described[len(inputs) :])

    tactics = []
    for number in plugin.get_valid_tactics():
        plugin.set_tactic(number)
        params, symbols = SimpleNamespace(), _Symbols()
        plugin.get_launch_params(symbolic, described, len(inputs), params, symbols, builder)
        static = [desc.desc for desc in described]
        kernel, ptx = plugin.get_kernel(static[: len(inputs)], static[len(inputs) :])
        tactics.append(Tactic(number, kernel, ptx.decode(), params, tuple(symbols)))
    return Built(output_types, output_dims, combinations, tactics)


def _expressions(dims: Dims) -> list[Expression]:
    return [Expression.make(d) for d in dims]


def _describe(dtype: Any, static: Sequence[bool], opt: Sequence[int]) -> Any:
    desc = trt.DynamicPluginTensorDesc()
    desc.desc = trt.PluginTensorDesc()
    desc.desc.dims = tuple(n if fixed else -1 for n, fixed in zip(opt, static, strict=True))
    desc.desc.type, desc.desc.format = dtype, trt.TensorFormat.LINEAR
    desc.opt = desc.min = desc.max = tuple(opt)
    return desc
