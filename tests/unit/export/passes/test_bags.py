"""Bags as torch's newer exporter writes them: without the loop, where what takes its place is the same."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from stca.export.accept import drop_unused, load_onnx
from stca.export.passes.bags import without_loops_of_bags


class Bags(nn.Module):
    def __init__(self, mode: str, pad: int | None) -> None:
        super().__init__()
        self.bag, self.item = nn.EmbeddingBag(9, 3, mode=mode, padding_idx=pad), nn.Embedding(9, 3)

    def forward(self, item, tags):
        return (self.bag(tags) * self.item(item)).sum(-1)


def exported(module, file, shape=(6,)):
    free = {"item": {0: "batch"}, "tags": {0: "batch"}}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.arange(3), torch.ones(3, *shape, dtype=torch.int64)), file, input_names=list(free),
            dynamo=True, dynamic_shapes=free, verbose=False, external_data=False,
        )  # fmt: skip
    return load_onnx(file)


@pytest.mark.parametrize(("mode", "pad"), [("mean", 0), ("max", None), ("sum", -1)])
def test_a_loop_of_bags_becomes_a_look_up(mode, pad, tmp_path):
    torch.manual_seed(0)
    module = Bags(mode, pad).eval()
    model = exported(module, tmp_path / "m.onnx")
    without_loops_of_bags(model)
    drop_unused(model)
    assert not any(n.op_type in ("Loop", "ConcatFromSequence") for n in model.graph.node)
    tags = np.random.default_rng(0).integers(0, 9, (5, 6))
    tags[1], tags[2] = 0, 8  # all of them padding
    (found,) = ReferenceEvaluator(model).run(None, {"tags": tags, "item": np.arange(5)})
    with torch.no_grad():
        wanted = module(torch.arange(5), torch.from_numpy(tags))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_a_loop_that_does_something_else_stays(tmp_path):
    model = exported(Bags("mean", None).eval(), tmp_path / "m.onnx")
    nodes = [n for part in bodies(model.graph) for n in part.node]
    slices = [n for n in nodes if n.op_type == "Slice" and len(n.output) == 1]
    slices[0].input[1], slices[0].input[2] = slices[0].input[2], slices[0].input[1]  # an empty one: no bag
    before = model.SerializeToString(deterministic=True)
    without_loops_of_bags(model)
    assert model.SerializeToString(deterministic=True) == before


class Parted(Bags):
    """Two bags, or one, of each row of tags."""

    def __init__(self) -> None:
        super().__init__("sum", None)

    def forward(self, item, tags):
        return self.bag(tags.reshape(-1, 3)).sum(-1).view(item.shape[0], -1).sum(-1) * self.item(item).sum(-1)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 3)])
def test_bags_that_are_no_rows_of_the_ids_mean_the_same(shape, tmp_path):
    torch.manual_seed(0)
    module = Parted().eval()
    model = exported(module, tmp_path / "m.onnx", shape)
    without_loops_of_bags(model)
    tags = np.random.default_rng(0).integers(0, 9, (5, *shape))
    (found,) = ReferenceEvaluator(model).run(None, {"tags": tags, "item": np.arange(5)})
    with torch.no_grad():
        wanted = module(torch.arange(5), torch.from_numpy(tags))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-5)


def bodies(graph: onnx.GraphProto):
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
                yield from bodies(attribute.g)
