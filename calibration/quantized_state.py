"""A user state in 8 bits: the encoder ends in quantizing it, the scorer begins with undoing that.

Only standard operators are added, so whatever runs the graphs runs these, and a runtime keeps the state like any other:
a tensor `NAME_int8` or `NAME_fp8` in place of `NAME` and, where each token has scales of its own, `NAME_scale`.

    step = largest magnitude of the token's head / levels      (`token`; otherwise a constant of the graph)
    kept = round(value / step)                                  int8, or the nearest E4M3 number
    read = kept · step

Scales of tokens are kept in float16, relative to the largest one of a trace, so that they stay in float16's range
whatever the model's is. A token is quantized by itself: appending to a state stays exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stca.arrays import Array
from stca.calibration.collectors import Granularity
from stca.errors import StcaError
from stca.export.analysis.scope import opset_of
from stca.export.passes.nodes import NewNodes, names_in
from stca.specs import ITEM_BYTES, TOKENS, StateSpec

Kind = Literal["int8", "fp8"]

# Of each kind: ONNX's type, numpy's name of it, and the number that the largest magnitude becomes.
_TYPES: Final[Mapping[Kind, tuple[int, str, int]]] = {
    "int8": (TensorProto.INT8, "int8", 127),
    "fp8": (TensorProto.FLOAT8E4M3FN, "float8_e4m3fn", 448),
}
# The least relative scale, float16's least normal number: a token of which every value is smaller keeps fewer digits.
_LEAST_SCALE: Final = 2.0**-14
# ONNX's version from which its operators take all types that are used here; the one before has the same operators.
_OPSET: Final = 19
# A head narrower than this would take more bytes for its scales than it saves.
_NARROWEST: Final = 4


@dataclass(frozen=True)
class StateFormat:
    """How one tensor of the state is kept.

    Attributes:
        kind: int8, or fp8 for E4M3.
        granularity: what has a scale of its own; `token` is each head of each token, as the request comes, and needs
            no more of a trace than the order of magnitude.
        ranges: what the largest level stands for, float32 of a shape that multiplies the tensor; of `token`, the
            largest range of all.
    """

    kind: Kind
    granularity: Granularity
    ranges: Array

    @property
    def steps(self) -> Array:
        """The values' distance of one level, as `ranges`; a normal float32, never 0."""
        steps = np.asarray(self.ranges, np.float64) / levels(self.kind)
        # A range of 0 was never more in the trace: it gets the smallest of the others, so that a value there is kept.
        some = steps[steps > 0]
        steps = np.where(steps > 0, steps, some.min() if some.size else 1.0)
        return np.maximum(steps, np.finfo(np.float32).tiny).astype(np.float32)


def levels(kind: Kind) -> int:
    """The number that the largest magnitude becomes."""
    return _TYPES[kind][2]


def onnx_type(kind: Kind) -> int:
    """ONNX's number of the type."""
    return _TYPES[kind][0]


def quantizable(state: Sequence[StateSpec]) -> tuple[StateSpec, ...]:
    """The tensors of a state that can be kept in 8 bits: computed, float32, with a row per token or user."""
    return tuple(
        s
        for s in state
        if s.input is None
        and s.dtype == "float32"
        and len(s.shape) > 1
        and isinstance(s.shape[-1], int)
        and s.shape[-1] >= _NARROWEST
    )


def kept_as(spec: StateSpec, kind: Kind, granularity: Granularity) -> tuple[StateSpec, ...]:
    """The tensors that stand for `spec` in the state."""
    made = [StateSpec(f"{spec.name}_{kind}", _TYPES[kind][1], spec.shape, 0)]
    if granularity == "token":
        made.append(StateSpec(f"{spec.name}_scale", "float16", (*spec.shape[:-1], 1), 0))
    return tuple(StateSpec(s.name, s.dtype, s.shape, _bytes_per_token(s)) for s in made)


def _bytes_per_token(spec: StateSpec) -> int:
    each = [n for n in spec.shape if isinstance(n, int)]
    return math.prod(each) * ITEM_BYTES[spec.dtype] if TOKENS in spec.shape else 0


def quantize(
    encoder: onnx.ModelProto, scorer: onnx.ModelProto, state: Sequence[StateSpec], formats: Mapping[str, StateFormat]
) -> tuple[StateSpec, ...]:
    """Keep tensors of the state in other formats, in place.

    Args:
        encoder, scorer: the halves; their large weights may be left out.
        state: what passes between them.
        formats: of those tensors that change, by name.

    Returns:
        The new state, in the encoder's output order.

    Raises:
        StcaError: when the graphs are of an ONNX version that is too old.
    """
    for half in (encoder, scorer):
        require_opset(half)
    ends, begins = _Half(encoder), _Half(scorer)
    made: list[StateSpec] = []
    for spec in state:
        if (format := formats.get(spec.name)) is None:
            made.append(spec)
            continue
        kept = kept_as(spec, format.kind, format.granularity)
        ends.end(spec, format, kept)
        begins.begin(spec, format, kept)
        made += kept
    encoder.graph.node.extend(ends.new.nodes)
    body = list(scorer.graph.node)
    del scorer.graph.node[:]
    scorer.graph.node.extend([*begins.new.nodes, *body])
    return tuple(made)


def require_opset(model: onnx.ModelProto) -> None:
    """Let a graph have quantized types, in place.

    ONNX 19 is 18 with more types, which needs no other change; from older ones a graph would have to be converted.

    Raises:
        StcaError: when it is older.
    """
    own = opset_of(model)
    if own < _OPSET - 1:
        raise StcaError(
            f"the graphs are of ONNX opset {own}, 8-bit numbers need {_OPSET - 1}; export the model in a newer opset"
        )
    for imports in (model.opset_import, *(f.opset_import for f in model.functions)):
        for one in imports:
            if one.domain in ("", "ai.onnx"):
                one.version = max(one.version, _OPSET)
    model.ir_version = max(model.ir_version, 9)


class _Half:
    """What is added to one half."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph, self.new = model.graph, NewNodes(names_in(model.graph))
        self._one = ""
        self._zeros: dict[Kind, str] = {}

    def end(self, spec: StateSpec, format: StateFormat, kept: Sequence[StateSpec]) -> None:
        """value → kept, and its scale."""
        new = self.new
        self.graph.value_info.append(_replaced(self.graph.output, spec.name, kept))
        if format.granularity == "token":
            magnitude = new.node("Abs", [spec.name], f"{spec.name}_magnitude")
            last = self._constant(np.array([-1]))
            largest = new.node("ReduceMax", [magnitude, last], f"{spec.name}_largest", keepdims=1)
            ranges = self._constant(format.steps * np.float32(levels(format.kind)))
            relative = new.node("Div", [largest, ranges], f"{spec.name}_relative")
            least = self._constant(np.float32(_LEAST_SCALE))
            most = self._constant(np.float32(np.finfo(np.float16).max))
            bounded = new.node("Clip", [relative, least, most], f"{spec.name}_bounded")
            new.node("Cast", [bounded], kept[1].name, exact=True, to=TensorProto.FLOAT16)
        zero = self._zero(format.kind)
        if format.granularity == "tensor":  # one number: what the operator itself is for, and the quickest
            steps = self._constant(format.steps.reshape(()))
            new.node("QuantizeLinear", [spec.name, steps, zero], kept[0].name, exact=True)
            return
        units = new.node("Div", [spec.name, self._step(spec, format, kept)], f"{spec.name}_units")
        new.node("QuantizeLinear", [units, self._unit(), zero], kept[0].name, exact=True)

    def begin(self, spec: StateSpec, format: StateFormat, kept: Sequence[StateSpec]) -> None:
        """kept, and its scale → value."""
        self.graph.value_info.append(_replaced(self.graph.input, spec.name, kept))
        zero = self._zero(format.kind)
        if format.granularity == "tensor":
            steps = self._constant(format.steps.reshape(()))
            self.new.node("DequantizeLinear", [kept[0].name, steps, zero], spec.name, exact=True)
            return
        units = self.new.node("DequantizeLinear", [kept[0].name, self._unit(), zero], f"{spec.name}_units")
        self.new.node("Mul", [units, self._step(spec, format, kept)], spec.name, exact=True)

    def _step(self, spec: StateSpec, format: StateFormat, kept: Sequence[StateSpec]) -> str:
        """The value of a level, as it can be had from what is kept."""
        steps = self._constant(format.steps)
        if format.granularity != "token":
            return steps
        wide = self.new.node("Cast", [kept[1].name], f"{spec.name}_scale32", to=TensorProto.FLOAT)
        return self.new.node("Mul", [wide, steps], f"{spec.name}_step")

    def _constant(self, values: Any) -> str:
        """A node, not an initializer: the bundle's weights stay what they are, under the digest that they have."""
        tensor = numpy_helper.from_array(np.asarray(values))
        return self.new.node("Constant", [], "quantization_constant", value=tensor)

    def _unit(self) -> str:
        self._one = self._one or self._constant(np.float32(1.0))
        return self._one

    def _zero(self, kind: Kind) -> str:
        if kind not in self._zeros:
            tensor = helper.make_tensor("zero", _TYPES[kind][0], [], b"\0", raw=True)
            self._zeros[kind] = self.new.node("Constant", [], f"{kind}_zero", value=tensor)
        return self._zeros[kind]


def _value(spec: StateSpec) -> onnx.ValueInfoProto:
    element = next((t for t, name, _ in _TYPES.values() if name == spec.dtype), TensorProto.FLOAT16)
    return helper.make_tensor_value_info(spec.name, element, spec.shape)


def _replaced(values: Any, name: str, kept: Sequence[StateSpec]) -> onnx.ValueInfoProto:
    """Put `kept` in the place of the input or output `name`, which is returned."""
    before: list[onnx.ValueInfoProto] = list(values)
    place = next(i for i, v in enumerate(before) if v.name == name)
    del values[:]
    values.extend([*before[:place], *map(_value, kept), *before[place + 1 :]])
    return before[place]
