"""Attention in every spelling becomes the operator with the same scores, or says why not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime import InferenceSession
from torch import Tensor

from stca.checks.verify import prove
from stca.export.accept import drop_unused
from stca.export.analysis.cost import NominalSizes, any_sizes
from stca.export.analysis.rows import Rows
from stca.export.freeing import Freed, freed_and_proven
from stca.export.passes.by_hand import drop_idle_guards
from stca.export.passes.fuse import FuseAttention
from stca.export.passes.lift import lift
from stca.export.passes.lower import for_one_request
from stca.export.passes.rules import Rewrite, Rule, View
from stca.export.passes.whole_slices import drop_whole_slices
from stca.export.pipeline import export_module
from stca.export.split import inlined
from stca.export.to_onnx import RequestModel
from stca.plugins.spec import OP_NAME
from stca.runtime import Request, Session
from stca.specs import TARGETS, TensorSpec
from tests.support.rules import view_of
from tests.support.spellings import (
    FIXED,
    HEADS,
    INPUTS,
    LAYOUTS,
    MASKS,
    SCALES,
    WIDTH,
    Exporter,
    Facts,
    Library,
    Spelled,
    to_onnx,
)


def fused(model: onnx.ModelProto, inputs: Sequence[TensorSpec] = INPUTS, rule: Rule | None = None) -> Freed:
    drop_whole_slices(model)
    drop_idle_guards(model)
    drop_unused(model)
    lifted = lift(inlined(model), inputs)
    assert lifted is not None
    scopes = {s.name: str(s.scope) for s in lifted.inputs}
    view = View(lifted.model, scopes, {"seq": 6, TARGETS: 3}, Rows(lifted.model, lifted.inputs, TARGETS).dims)
    return freed_and_proven(view, lifted.inputs, lambda _: None, [rule or FuseAttention()])


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


MATRIX = list(itertools.product(LAYOUTS, MASKS))


@pytest.mark.parametrize("i", range(len(MATRIX)), ids=[f"{a}-{b}" for a, b in MATRIX])
def test_every_spelling_is_fused_and_proven(i: int) -> None:
    layout, mask = MATRIX[i]
    scale = SCALES[i % len(SCALES)]
    freed = fused(to_onnx(Spelled(layout, mask, scale), "legacy"))
    assert [v.why for v in freed.verdicts] == [None], scale
    assert OP_NAME in operators(freed.model)
    assert "Softmax" not in operators(freed.model)


BY_HAND = [("legacy", of) for of in ("exponentials", "guarded", "guarded_apart", "clamped", "log_softmax")]
BY_HAND += [("dynamo", "guarded_apart"), ("dynamo", "clamped")]


@pytest.mark.parametrize(("exporter", "layout"), BY_HAND)
def test_a_softmax_that_is_spelled_is_fused(exporter: Exporter, layout: str) -> None:
    freed = fused(to_onnx(Spelled(layout, "none", "none"), exporter))
    assert [v.why for v in freed.verdicts] == [None]
    assert OP_NAME in operators(freed.model)


BY_TORCH = [("legacy", kind, masked) for kind in ("mha", "mha, sequence first", "sdpa", "decoder") for masked in (0, 1)]
BY_TORCH += [("dynamo", "mha", 1), ("dynamo", "sdpa", 1), ("dynamo", "decoder", 0)]  # which takes seconds each


@pytest.mark.parametrize(("exporter", "kind", "masked"), BY_TORCH)
def test_attention_of_torch_itself_is_fused(exporter: Exporter, kind: str, masked: bool) -> None:
    inputs = FIXED if exporter == "legacy" else INPUTS  # which fixes the length in these modules
    freed = fused(to_onnx(Library(kind, masked), exporter, inputs), inputs)
    assert None in [v.why for v in freed.verdicts], freed.verdicts
    assert operators(freed.model).count(OP_NAME) == 1


@pytest.mark.parametrize("layout", ["heads_by_view", "einsum", "keys_first"])
@pytest.mark.parametrize("mask", ["none", "where -1e9"])
def test_a_softmax_in_another_precision_is_fused(layout: str, mask: str) -> None:
    freed = fused(to_onnx(Spelled(layout, mask, "over", softmax32=True), "legacy"))
    assert [v.why for v in freed.verdicts] == [None]


@pytest.mark.parametrize("layout", ["einsum", "multiply_and_sum", "indexed"])
def test_what_the_newer_exporter_makes_is_fused(layout: str) -> None:
    freed = fused(to_onnx(Spelled(layout, "bias and -inf", "over"), "dynamo"))
    assert [v.why for v in freed.verdicts] == [None]


class Other(Spelled):
    """A spelling that is not what the operator computes, or not where it computes it."""

    def __init__(self, layout: str) -> None:
        super().__init__(layout, "none", "over")

    def its_own_mask(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        logits = torch.bmm(q.unsqueeze(1), k.transpose(1, 2))
        near = (k - q.unsqueeze(1)).square().sum(-1) < 4
        return torch.bmm(torch.softmax(logits.masked_fill(~near.unsqueeze(1), -1e9), -1), v).squeeze(1)

    def target_in_the_history(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        return self.one_head(q, torch.cat([k, q.unsqueeze(1)], 1), torch.cat([v, q.unsqueeze(1)], 1), facts)

    def history_reads_itself(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        return q * (torch.softmax(k @ k.transpose(1, 2), -1) @ v).mean(1)

    def scored_by_layers(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        scores = self.top(torch.relu(k + q.unsqueeze(1))).squeeze(-1)
        return torch.bmm(torch.softmax(scores, -1).unsqueeze(1), v).squeeze(1)

    def weights_changed(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        near = (k - q.unsqueeze(1)).square().sum(-1) < 4
        weights = torch.softmax((q.unsqueeze(1) * k).sum(-1), -1) * near
        return torch.bmm(weights.unsqueeze(1), v).squeeze(1)

    def weights_cut_off(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        weights = torch.softmax((q.unsqueeze(1) * k).sum(-1), -1)
        return torch.bmm(weights.masked_fill(weights < 1e-7, 0.0).unsqueeze(1), v).squeeze(1)

    def weights_read_twice(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        weights = torch.softmax((q.unsqueeze(1) * k).sum(-1), -1).unsqueeze(1)
        return torch.bmm(weights, v).squeeze(1) + weights.max(-1).values

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor, e: float = 0.0, less: str = "", keep: Tensor | None = None):
        logits = torch.bmm(q.unsqueeze(1), k.transpose(1, 2))
        logits = logits - {"": 0.0, "all": logits.max(), "each": logits.amax(-1, keepdim=True)}[less]
        raised = torch.exp(logits) if keep is None else torch.exp(logits) * keep.unsqueeze(1)
        return torch.bmm(raised / (raised.sum(-1, keepdim=True) + e), v).squeeze(1)

    def guarded_without_the_largest(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        return self.by_hand(q, k, v, 1e-9)

    def guarded_below_the_largest_of_all(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        return self.by_hand(q, k, v, 1e-9, "all")

    def guarded_by_much(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        return self.by_hand(q, k, v, 1e-6, "each")

    def masked_after_the_exponentials(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        return self.by_hand(q, k, v, 1e-9, "each", facts.kept)

    def divided_after_the_mix(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        raised = torch.exp(torch.bmm(q.unsqueeze(1), k.transpose(1, 2)))
        return (torch.bmm(raised, v) / raised.sum(-1, keepdim=True)).squeeze(1)

    def divided_by_all(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        raised = torch.exp(torch.bmm(q.unsqueeze(1), k.transpose(1, 2)))
        return torch.bmm(raised / raised.sum((1, 2), keepdim=True), v).squeeze(1)


_ADVICE = "write torch.softmax, with -inf as the logits of what is masked"
_WHERE = "which changes scores where the sum is small"
_GUARDED = rf"its sum of exponentials is guarded by '.*' \(Add\), {_WHERE}; {_ADVICE}"
_CHANGED = rf"its exponentials are changed before they are summed, by '.*' \(Mul\); {_ADVICE}"
REASONS = {
    "guarded_without_the_largest": _GUARDED,
    "guarded_below_the_largest_of_all": _GUARDED,
    "guarded_by_much": _GUARDED,
    "masked_after_the_exponentials": _CHANGED,
    "divided_after_the_mix": "its exponentials '.*' meet the values before their sum divides them",
    "divided_by_all": f"its exponentials are divided by a sum over more, or other, than one axis; {_ADVICE}",
    "its_own_mask": r"its mask '.*' depends on the target",
    "target_in_the_history": r"its value '.*' depends on target input 'target'|its key '.*' depends on target input",
    "history_reads_itself": "its query is the user's own: it is computed once for all targets, in the user encoder",
    "scored_by_layers": r"its logits are a layer's, with weights '.*', and no product of targets and history",
    "weights_changed": "its weights are changed between the softmax and the values",
    "weights_cut_off": "its weights are changed between the softmax and the values",
    "weights_read_twice": "its weights '.*' are read elsewhere too, by '.*ReduceMax.*'",
}


class Weighed(Spelled):
    """Weights that are guarded or multiplied between the softmax and the values."""

    def __init__(self, by: str, layout: str) -> None:
        super().__init__(layout, "where -inf", "over")
        self.by = by

    def weights(self, logits: Tensor, facts: Facts, dim: int = -1) -> Tensor:
        weights = super().weights(logits, facts, dim).transpose(dim, -1)
        kept = facts.kept.reshape(-1, *[1] * (weights.ndim - 2), facts.kept.shape[1])
        changed = {
            "nan_to_num": lambda: torch.nan_to_num(weights),
            "where isnan": lambda: torch.where(weights.isnan(), torch.zeros_like(weights), weights),
            "masked again": lambda: weights.masked_fill(~kept.expand_as(weights), 0.0),
            "masked with none": lambda: weights.masked_fill(~kept.any(-1, keepdim=True), 0.0),
            "times the mask": lambda: weights.nan_to_num() * kept,
            "decayed": lambda: weights.nan_to_num() * torch.exp(-facts.bias.abs()).reshape(kept.shape),
        }[self.by]()
        return changed.transpose(dim, -1)


WEIGHED = ("nan_to_num", "where isnan", "masked again", "masked with none", "times the mask", "decayed")


@pytest.mark.parametrize("exporter", ["legacy", "dynamo"])
@pytest.mark.parametrize("by", WEIGHED)
def test_what_the_user_does_to_the_weights_is_done_to_the_values(by: str, exporter: Exporter) -> None:
    layout = ("heads_by_view", "keys_first", "einsum")[WEIGHED.index(by) % 3]
    freed = fused(to_onnx(Weighed(by, layout), exporter))
    assert [v.why for v in freed.verdicts] == [None]  # proven without any events, too
    assert "Softmax" not in operators(freed.model)


class MaskOfHeads(Spelled):
    """Each head has a mask of its own, and one of them may be left without any events."""

    def weights(self, logits: Tensor, facts: Facts, dim: int = -1) -> Tensor:
        first = torch.stack([facts.kept, facts.bias > 0], 1).unsqueeze(2)
        return torch.nan_to_num(torch.softmax(logits.masked_fill(~first, float("-inf")), -1))


def test_a_head_without_events_is_zero_though_others_have_some() -> None:
    model = to_onnx(MaskOfHeads("heads_by_view", "none", "none"), "legacy")
    freed = fused(model)
    assert [v.why for v in freed.verdicts] == [None]
    rng = np.random.default_rng(0)
    feeds = {
        "history": rng.standard_normal((1, 4, WIDTH), np.float32),
        "kept": np.ones((1, 4), bool),
        "bias": -np.ones((1, 4), np.float32),
        "lengths": np.array([4]),
        "target": rng.standard_normal((1, WIDTH), np.float32),
    }
    (wanted,) = InferenceSession(model.SerializeToString()).run(None, feeds)
    (found,) = InferenceSession(freed.model.SerializeToString()).run(None, feeds)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("layout", REASONS)
def test_what_is_left_says_why(layout: str) -> None:
    freed = fused(to_onnx(Other(layout), "legacy"))
    (verdict,) = freed.verdicts
    assert re.match(REASONS[layout], verdict.why or ""), verdict.why
    assert OP_NAME not in operators(freed.model)


@pytest.mark.parametrize("mixed", ["MatMul (x60, W)", "MatMul (p, W)"])
def test_a_sum_of_sums_is_seen_to_be_no_attention(mixed: str) -> None:
    inputs = (TensorSpec("h", "float32", (1, "L", 4), "user"), TensorSpec("t", "float32", ("N_t", 4), "target"))
    twice = " ".join(f"x{i + 1} = Add (x{i}, x{i})" for i in range(60))
    body = "one = Constant <value_ints: ints = [1]> () u = ReduceMean <keepdims: int = 0> (h, one) x0 = Add (t, u) "
    view = view_of(f"{body} {twice} p = Softmax (x60) scores = {mixed}", inputs, {"W": (4, 2)})
    found = freed_and_proven(view, inputs, lambda _: None, [FuseAttention()])
    assert found.model is view.model


class Mutant(FuseAttention):
    """The rule, with one thing done wrong to the operator's inputs."""

    def __init__(self, change: Callable[[onnx.NodeProto, list[onnx.NodeProto]], None]) -> None:
        self.change = change

    def rewrite(self, view: View, match: Any) -> Rewrite:
        made = super().rewrite(view, match)
        nodes = list(made.nodes)
        self.change(next(n for n in nodes if n.op_type == OP_NAME), nodes)
        return Rewrite(nodes, made.weights)


def _mask_dropped(attend: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> None:
    (column,) = (n for n in nodes if n.op_type == "Expand")
    at = nodes.index(column)
    nodes.insert(at, helper.make_node("Sub", [column.input[0]] * 2, ["no_mask"]))
    column.input[0] = "no_mask"


def _scaled_twice(attend: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> None:
    (scale,) = (a for a in attend.attribute if a.name == "scale")
    scale.f *= 0.5


def _heads_swapped(attend: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> None:
    heads = helper.make_tensor("order", onnx.TensorProto.INT64, [HEADS], list(range(HEADS))[::-1])
    at = nodes.index(attend)
    nodes.insert(at, helper.make_node("Constant", [], ["order"], value=heads))
    nodes.insert(at + 1, helper.make_node("Gather", [attend.input[2], "order"], ["swapped"], axis=1))
    attend.input[2] = "swapped"


def _key_for_value(attend: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> None:
    attend.input[1] = attend.input[2]


@pytest.mark.parametrize("change", [_mask_dropped, _scaled_twice, _heads_swapped, _key_for_value])
def test_a_wrong_fusion_is_not_kept(change: Callable[[onnx.NodeProto, list[onnx.NodeProto]], None]) -> None:
    mask = "where -1e9" if change is _mask_dropped else "none"
    model = to_onnx(Spelled("heads_by_view", mask, "over"), "legacy")
    freed = fused(model, rule=Mutant(change))
    assert [(v.why or "").partition(":")[0] for v in freed.verdicts] == ["it does not keep the scores"]
    assert "Softmax" in operators(freed.model)


@pytest.mark.parametrize("mask", ["none", "bias and -inf"])
def test_a_fused_attention_lowers_to_a_head_size_that_kernels_have(mask: str) -> None:
    model = fused(to_onnx(Spelled("heads_by_view", mask, "over"), "legacy")).model
    lowered = for_one_request(model, "fused")
    sizes = NominalSizes(lowered, any_sizes(lowered.graph))
    (node,) = (n for n in lowered.graph.node if n.op_type == "Attention")
    assert [(sizes.dims(name) or (None,))[-1] for name in node.input[:3]] == [16, 16, 16]
    assert len(node.input) == 3  # no mask over a history that is used whole
    rng = np.random.default_rng(0)
    shapes = {
        s.name: [1 if n == "batch" and s.scope == "user" else 4 if n == "batch" else n for n in s.shape] for s in INPUTS
    }
    feeds = {n: rng.standard_normal([5 if i == "seq" else i for i in s]).astype(np.float32) for n, s in shapes.items()}
    feeds |= {"kept": feeds["bias"] > -0.5, "lengths": np.array([3])}
    own, other = (
        InferenceSession(m.SerializeToString()).run(None, {i.name: feeds[i.name] for i in m.graph.input})[0]
        for m in (model, lowered)
    )
    np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flat", [False, True], ids=["by head", "flat"])
@pytest.mark.parametrize("mask", ["", "kept", "bias"])
def test_an_attention_node_is_fused(flat: bool, mask: str) -> None:
    """Pointwise: q [batch, 2, 1, 4] or [batch, 1, 8]; the mask is [batch, 1, 1, seq]."""
    shape = [0, 1, WIDTH] if flat else [0, 1, HEADS, WIDTH // HEADS]
    keys = [0, 0, WIDTH] if flat else [0, 0, HEADS, WIDTH // HEADS]
    by_head = [] if flat else [0, 2, 1, 3]
    nodes, ends = [], []
    for name in ("target", "history"):
        nodes.append(helper.make_node("Reshape", [name, f"{name}_shape"], [f"{name}_parted"]))
        ends.append(f"{name}_parted")
        if by_head:
            nodes.append(helper.make_node("Transpose", [ends[-1]], [f"{name}_by_head"], perm=by_head))
            ends[-1] = f"{name}_by_head"
    if mask:
        nodes.append(helper.make_node("Unsqueeze", [mask, "axes"], ["mask"]))
    heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS} if flat else {}
    nodes.append(helper.make_node("Attention", [ends[0], ends[1], ends[1], *["mask"] * bool(mask)], ["mixed"], **heads))
    nodes.append(helper.make_node("ReduceSum", ["mixed", "all"], ["scores"], keepdims=0))
    used = [s for s in INPUTS if s.name in ("target", "history", mask)]
    kinds = {"float32": onnx.TensorProto.FLOAT, "bool": onnx.TensorProto.BOOL}
    integers = {"target_shape": shape, "history_shape": keys, "axes": [1, 2], "all": [1, 2] if flat else [1, 2, 3]}
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(s.name, kinds[s.dtype], s.shape) for s in used],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["batch"])],
        [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in integers.items() if n != "axes" or mask],
    )
    freed = fused(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), used)
    assert [v.why for v in freed.verdicts] == [None]
    assert "Attention" not in operators(freed.model)
    assert OP_NAME in operators(freed.model)


def test_a_fused_model_is_served(tmp_path: Path) -> None:
    """From a module to a session: the operator is in the bundle, and its scores are the module's, user by user."""
    module = Spelled("heads_by_view", "where -inf", "over").eval()
    inputs = tuple(replace(s, limit=6) if s.name == "lengths" else s for s in INPUTS)
    model = RequestModel(module, inputs)
    bundle = export_module(model, tmp_path / "bundle", prove=prove, source={"kind": "callable"})
    assert [(r["rule"], r["why"]) for r in bundle.manifest.split["rules"]] == [("attention", None)]
    assert OP_NAME in operators(onnx.load(bundle.file("target_scorer"), load_external_data=False))
    session, rng = Session.load(bundle.path), np.random.default_rng(0)
    for length in (1, 7):
        user = {
            "history": rng.standard_normal((1, length, WIDTH), np.float32),
            "kept": np.arange(length)[None] != 1,
            "bias": rng.standard_normal((1, length), np.float32),
            "lengths": np.array([1]),
        }
        target = rng.standard_normal((3, WIDTH), np.float32)
        rows = {n: torch.from_numpy(x.repeat(3, 0)) for n, x in user.items()}
        with torch.no_grad():
            wanted = module(**rows, target=torch.from_numpy(target))
        scores = session.score(Request({**user, "target": target}, f"user {length}"))
        np.testing.assert_allclose(np.ravel(scores), wanted.numpy(), rtol=1e-5, atol=1e-5)
