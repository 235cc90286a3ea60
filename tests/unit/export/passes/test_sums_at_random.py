"""Random layers over random concatenations: whatever is parted keeps every value, at any price and in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from stca.export.analysis.rows import Rows
from stca.export.freeing import RULES, freed_and_proven
from stca.export.passes.rules import Rule, View
from stca.export.split import split
from stca.specs import TensorSpec

WIDTH = 3
INPUTS = (
    TensorSpec("history", "float32", (1, "L", WIDTH), "user"),
    TensorSpec("places", "float32", (1, "L", WIDTH), "user"),
    TensorSpec("profile", "float32", (1, 1, WIDTH), "user"),
    TensorSpec("item", "float32", ("N_t", 1, WIDTH), "target"),
    TensorSpec("price", "float32", ("N_t", 1, WIDTH), "target"),
)
SIZES = {"L": 2000, "N_t": 300}  # nominal: what is run is small


class AtAnyPrice:
    """A rule that does not count operations."""

    def __init__(self, rule: Rule) -> None:
        self.name, self.pattern, self.rewrite, self._check = rule.name, rule.pattern, rule.rewrite, rule.check

    def check(self, view: View, match: Any) -> str | None:
        why = self._check(view, match)
        return None if why and "takes as much as" in why else why


class _Grower:
    """Nodes over values `[N_t, L, width]`, some of them repeated from fewer rows."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.full: dict[str, int] = {}  # width by value of whole rows
        sizes = [self.node("Shape", [name], start=axis, end=axis + 1) for name, axis in (("item", 0), ("history", 1))]
        self.shape = self.node("Concat", [*sizes, self.ints(1)], axis=0)
        self.repeats = {"item": ["one", sizes[1], "one"], "history": [sizes[0], "one", "one"]}
        self.weights.append(numpy_helper.from_array(np.array([1], np.int64), "one"))

    def model(self) -> onnx.ModelProto:
        for _ in range(int(self.rng.integers(2, 5))):
            self.add_piece()
        for _ in range(int(self.rng.integers(1, 4))):
            self.add_layer()
        last = list(self.full)[-1]
        self.nodes.append(helper.make_node("ReduceMean", [last, self.ints(1)], ["scores"], keepdims=0))
        inputs = [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in INPUTS]
        output = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ("N_t", self.full[last]))
        graph = helper.make_graph(self.nodes, "random", inputs, [output], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def ints(self, *values: int) -> str:
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), f"w{len(self.weights)}"))
        return self.weights[-1].name

    def weight(self, *shape: int) -> str:
        array = self.rng.standard_normal(shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def any(self, names: Sequence[str]) -> str:
        return str(names[self.rng.integers(len(names))])

    def user(self) -> str:
        return self.any(["history", "history", "places", "profile"])

    def target(self) -> str:
        return self.any(["item", "item", "price"])

    def repeated(self, name: str) -> str:
        if name in self.repeats and self.rng.random() < 0.3:
            repeats = self.node("Concat", self.repeats[name], axis=0)
            return self.node("Tile", [name, repeats])
        if name == "profile" and self.rng.random() < 0.3:  # two steps
            name = self.node("Add", [name, self.node("Sub", ["history", "history"])])
        return self.node("Expand", [name, self.shape])

    def add_piece(self) -> str:
        """A value of whole rows."""
        kind = self.rng.integers(7)
        if kind < 2:
            made = self.repeated(self.user() if kind else self.target())
        elif kind < 5:
            two = [self.repeated(self.target()), self.any(["history", "places"])]
            two = [two[i] for i in self.rng.permutation(2)]
            made = self.node(self.any(["Sub", "Add", "Mul", "Mul"]), two)
        else:
            made = self.node(self.any(["Neg", "Identity", "Tanh"]), [self.repeated(self.any(["item", "places"]))])
        self.full[made] = WIDTH
        return made

    def add_layer(self) -> None:
        """A linear layer over some pieces, in one concatenation or in one within another, with a bias or without."""
        normalized = self.rng.random() < 0.4
        if normalized:  # two values beside their difference, as the rule for normalized ones takes them
            key, query = self.any(["history", "places"]), self.repeated(self.target())
            pieces = [self.repeated(key), query, self.node("Sub", [query, key]), self.node("Mul", [query, key])]
        else:
            pieces = [self.any(list(self.full)) for _ in range(3)] + [self.repeated(self.user())]
        self.full |= dict.fromkeys(set(pieces) - self.full.keys(), WIDTH)
        inner = self.node("Concat", pieces[:2], axis=-1)
        x = self.node("Concat", [*pieces[2:], inner], axis=2)
        if not normalized and self.rng.random() < 0.3:
            x = self.node("Unsqueeze", [x, self.ints(0)])
        width, out = sum(self.full[p] for p in pieces), int(self.rng.integers(1, 6))
        if normalized:
            x = self.node("LayerNormalization", [x, self.weight(width), self.weight(width)])
        if self.rng.random() < 0.3:
            made = self.node("Einsum", [x, self.weight(out, width)], equation="...c,nc->...n")
        else:
            made = self.node("MatMul", [x, self.weight(width, out)])
        if self.rng.random() < 0.6:
            made = self.node("Add", [self.weight(out), made] if self.rng.random() < 0.5 else [made, self.weight(out)])
        events = self.node("Shape", ["history"], start=1, end=2)
        rows = self.node("Concat", [self.ints(-1), events, self.ints(out)], axis=0)
        made = self.node("Reshape", [made, rows])
        gated = self.rng.random() < 0.4
        made = self.gated(made, out) if gated else self.node(self.any(["Tanh", "Relu"]), [made])
        self.full[made] = out

    def gated(self, h: str, width: int) -> str:
        """Dice of a value in one of its spellings."""
        moved = self.node("Add", [self.node("Mul", [h, self.weight(width)]), self.weight(width)])
        gate, slope = self.node("Sigmoid", [moved]), self.weight(width)
        one = self.node("Constant", [], value_float=1.0)
        off = self.node("Sub", [one, gate])
        if self.rng.random() < 0.5:
            left = self.node("Mul", [self.node("Mul", [slope, off]), h])
            return self.node("Add", [left, self.node("Mul", [gate, h])])
        return self.node("Mul", [h, self.node("Add", [gate, self.node("Mul", [off, slope])])])


def least_cost(model: onnx.ModelProto) -> float:
    """What a request costs at the best cut, in operations: the state's bytes at their price, and all work of a hit."""
    scopes = {s.name: str(s.scope) for s in INPUTS}
    report = split(model, scopes, workload=SIZES, measured=Rows(model, INPUTS, "N_t").dims, history_dim="L").report
    return report.state_bytes * report.flops_per_byte + report.recomputed_work + report.target_work


@pytest.mark.parametrize("seed", range(17))
def test_parts_of_random_layers_keep_every_value(seed: int) -> None:
    model = _Grower(seed).model()
    view = View(model, {s.name: str(s.scope) for s in INPUTS}, SIZES, Rows(model, INPUTS, "N_t").dims)
    costs = [least_cost(freed_and_proven(view, INPUTS, lambda _: None, order).model) for order in (RULES, RULES[::-1])]
    assert costs[0] == costs[1] <= least_cost(model)
    rules = [AtAnyPrice(rule) for rule in RULES]
    for order in (rules, rules[::-1]):
        found = freed_and_proven(view, INPUTS, lambda _: None, order)
        onnx.checker.check_model(found.model, full_check=True)
        wrong = [v for v in found.verdicts if v.why and "does not keep" in v.why]
        assert not wrong, wrong
        assert any(v.why is None for v in found.verdicts)
