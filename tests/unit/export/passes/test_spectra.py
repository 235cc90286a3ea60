"""A Fourier transform as a product: of every kind, what it is worth in float32, and where it stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from support.rules import freed, same, view_of

from stca.export.passes.rules import Rewrite, View
from stca.export.passes.spectra import Match, SpectrumAsProduct
from stca.specs import TensorSpec

ITEM = TensorSpec("item", "float32", ("N_t", 1), "target")


def view(transform: str, events: tuple[int | str, ...] = (1, 50, 3, 1), length: int = 50) -> View:
    """Scores that are a target's number times a mean of what the transform makes of events."""
    inputs = (TensorSpec("events", "float32", events, "user"), ITEM)
    body = f"""{transform} flat = Constant <value_ints: ints = [-1]> () long = Reshape (y, flat)
        square = Mul (long, long) mean = ReduceMean <keepdims: int = 1> (square) scores = Mul (item, mean)"""
    return view_of(body, inputs, {"length": np.array(length), "axis": np.array(1), "last": np.array(-2)})


KINDS = {
    "real": ("y = DFT <onesided: int = 1> (events, length, axis)", (1, 50, 3, 1), 50),
    "real, odd": ("y = DFT <onesided: int = 1> (events, length, axis)", (1, 49, 3, 1), 49),
    "real, padded": ("y = DFT <onesided: int = 1> (events, length, axis)", (1, 30, 3, 1), 50),
    "real, both sides": ("y = DFT (events, , axis)", (1, 50, 3, 1), 50),
    "complex": ("y = DFT (events, , axis)", (1, 50, 3, 2), 50),
    "last axis": ("y = DFT (events, , last)", (1, 3, 50, 2), 50),
    "default axis": ("y = DFT (events)", (1, 3, 50, 2), 50),
    "inverse": ("y = DFT <inverse: int = 1> (events, , axis)", (1, 50, 3, 2), 50),
    "inverse of a half": ("y = DFT <inverse: int = 1, onesided: int = 1> (events, length, axis)", (1, 26, 3, 2), 50),
    "inverse of a half, odd": (
        "y = DFT <inverse: int = 1, onesided: int = 1> (events, length, axis)",
        (1, 25, 3, 2),
        49,
    ),
    "real, cut off": ("y = DFT <onesided: int = 1> (events, length, axis)", (1, 60, 3, 1), 50),
    "inverse, cut off": ("y = DFT <inverse: int = 1> (events, length, axis)", (1, 60, 3, 2), 50),
    "inverse of a half, cut off": (
        "y = DFT <inverse: int = 1, onesided: int = 1> (events, length, axis)",
        (1, 60, 3, 2),
        50,
    ),
    "of any length": ("y = DFT <onesided: int = 1> (events, , axis)", (1, "L", 3, 1), 0),
    "of any length, complex": ("y = DFT (events, , axis)", (1, "L", 3, 2), 0),
    "a half of any odd length": (
        """sizes = Shape (events) own = Gather (sizes, axis) twice = Add (own, own) odd = Sub (twice, length)
        y = DFT <inverse: int = 1, onesided: int = 1> (events, odd, axis)""",
        (1, "L", 3, 2),
        1,
    ),
    "a half of any length": ("y = DFT <inverse: int = 1, onesided: int = 1> (events, , axis)", (1, "L", 3, 2), 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_its_numbers(kind: str) -> None:
    before = view(*KINDS[kind])
    after = freed(before, (TensorSpec("events", "float32", KINDS[kind][1], "user"), ITEM), SpectrumAsProduct())
    assert [v.why for v in after.verdicts] == [None]  # the proof compares what the transform made, to 1e-9
    assert "DFT" not in [n.op_type for n in after.model.graph.node]


def test_it_loses_less_than_the_engines_own_transform() -> None:
    """Of a length that has no small factors, as 199."""
    before = view("y = DFT <onesided: int = 1> (events, length, axis)", (1, 199, 8, 1), 199)
    inputs = (TensorSpec("events", "float32", (1, 199, 8, 1), "user"), ITEM)
    after = freed(before, inputs, SpectrumAsProduct()).model
    x = np.random.default_rng(0).standard_normal((1, 199, 8, 1)).astype(np.float32)
    exact = np.fft.rfft(x[..., 0].astype(np.float64), axis=1)

    def loss(model: onnx.ModelProto) -> float:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        copy.graph.output.append(onnx.ValueInfoProto(name="y"))
        session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
        y = session.run(["y"], {"events": x, "item": np.ones((1, 1), np.float32)})[0]
        return float(np.abs(y[..., 0] + 1j * y[..., 1] - exact).max())

    assert loss(after) < loss(before.model) / 4


@pytest.mark.parametrize(
    ("transform", "events", "why"),
    [
        ("y = DFT <onesided: int = 1> (events, , axis)", (1, 2049, 3, 1), "its length is 2049, more than 2048"),
        ("y = DFT <onesided: int = 1> (events, , axis)", (1, "N_h", 3, 1), "its length is 10000, more than 2048"),
        (
            "y = DFT <inverse: int = 1, onesided: int = 1> (events, , axis)",
            (1, "L", 3, 2),
            "its length is 3000, more than 2048",
        ),
        (
            "half = Cast <to: int = 10> (events) h = DFT (half, , axis) y = Cast <to: int = 1> (h)",
            (1, 50, 3, 2),
            "its numbers are neither float32 nor float64",
        ),
    ],
)
def test_what_stays_says_why(transform: str, events: tuple[int | str, ...], why: str) -> None:
    before = view(transform, events)
    before = View(before.model, before.inputs, {**before.workload, "N_h": 10_000, "L": 1501})
    rule = SpectrumAsProduct()
    (node,) = [n for n in before.model.graph.node if n.op_type == "DFT"]
    assert why in (rule.check(before, rule.pattern(before, node)) or "")


CUT_OFF = {
    "constant": "y = DFT <onesided: int = 1> (events, length, axis)",
    "computed": """sizes = Shape (events) own = Gather (sizes, axis) least = Min (own, length)
        y = DFT <onesided: int = 1> (events, least, axis)""",
    "inverse of a half": "y = DFT <inverse: int = 1, onesided: int = 1> (events, length, axis)",
}


@pytest.mark.parametrize("kind", CUT_OFF)
@pytest.mark.parametrize("events", [1, 20, 200])
def test_histories_beyond_the_length_lose_their_ends(kind: str, events: int) -> None:
    """Longer than any that the proof looks at, which has a history without events too."""
    shape = (1, "N_h", 3, 2 if kind == "inverse of a half" else 1)
    before = view(CUT_OFF[kind], shape, 64)
    after = freed(before, (TensorSpec("events", "float32", shape, "user"), ITEM), SpectrumAsProduct())
    assert [v.why for v in after.verdicts] == [None]
    same(before.model, after.model, {"events": (1, events, *shape[2:]), "item": (3, 1)})  # type: ignore[dict-item]


@pytest.mark.parametrize(("of", "wrong"), [("Neg", "Identity"), ("Cos", "Sin"), ("Mod", "Mul"), ("Div", "Mul")])
@pytest.mark.parametrize("kind", ["complex", "inverse of a half"])
def test_a_wrong_matrix_does_not_pass_the_proof(kind: str, of: str, wrong: str) -> None:
    class Mutant(SpectrumAsProduct):
        def rewrite(self, view: View, match: Match) -> Rewrite:
            made = super().rewrite(view, match)
            nodes = [helper.make_node(wrong, n.input, n.output, n.name) if n.op_type == of else n for n in made.nodes]
            return Rewrite(nodes, made.weights)

    before = view(*KINDS[kind])
    found = freed(before, (TensorSpec("events", "float32", KINDS[kind][1], "user"), ITEM), Mutant())
    assert found.model is before.model
    assert "it does not keep the scores" in (found.verdicts[0].why or "")
