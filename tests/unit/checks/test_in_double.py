"""A module in float64, though its code asks for float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stca.checks.in_double import InDouble, copied
from stca.checks.verify import run_torch


class Narrow(nn.Module):
    """Asks for float32 in each way that models do."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.linear = way, nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4, 4), 1 / 3))
        self.derived = self.linear.weight * (1 / 3)  # neither a parameter nor a buffer, and not a leaf

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        x, ids = inputs["x"], inputs["ids"]
        third = {
            "float": lambda: (ids > 1).float() / 3 @ self.scale,
            "to": lambda: (ids > 1).to(torch.float32) / 3 @ self.scale,
            "zeros": lambda: (torch.zeros(len(x), 4) + 1 / 3) @ self.scale,
            "full": lambda: torch.full((len(x), 4), 1 / 3, dtype=torch.float32) @ self.scale,
            "tensor": lambda: torch.tensor([1 / 3], dtype=torch.float32).expand(len(x), 4) @ self.scale,
            "arange": lambda: torch.arange(4, dtype=torch.float32).expand(len(x), 4) / 3 @ self.scale,
            "one_hot": lambda: F.one_hot(ids.sum(1) % 4, 4).float() / 3 @ self.scale,
            "half": lambda: x.half().float() @ self.scale,
            "derived": lambda: x @ self.derived,
            "in place": lambda: torch.zeros(len(x), 4).add_(1 / 3) @ self.scale,
            "bernoulli mask": lambda: x.masked_fill(ids > 2, float("-inf")).softmax(-1) @ self.scale,
        }[self.way]()
        return (self.linear(x) + third).sum(-1)


WAYS = ["float", "to", "zeros", "full", "tensor", "arange", "one_hot", "half", "derived", "in place", "bernoulli mask"]


@pytest.mark.parametrize("way", WAYS)
def test_a_module_that_asks_for_float32(way):
    feeds = [{"x": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4), "ids": np.arange(12).reshape(3, 4) % 4}]
    module = Narrow(way)
    wide, narrow = run_torch(module, feeds, "float64")[0], run_torch(module, feeds)[0]
    assert wide.dtype == np.float64
    np.testing.assert_allclose(wide, narrow, rtol=1e-3 if way == "half" else 1e-5)
    assert (wide != narrow.astype(np.float64)).any(), "rounded to float32 on the way"
    assert torch.get_default_dtype() == torch.float32
    assert module.linear.weight.dtype == torch.float32


def test_an_error_inside_leaves_nothing_changed():
    with pytest.raises(RuntimeError), InDouble():
        raise RuntimeError
    assert torch.get_default_dtype() == torch.float32


def test_a_copy_of_a_module_with_computed_tensors():
    module = Narrow("derived").train()
    copy = copied(module)
    assert not copy.training
    assert module.training
    assert torch.equal(copy.derived, module.derived)
    assert copy.derived is not module.derived


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_of_equal_values_the_first_is_taken(dtype):
    """As ONNX says; torch leaves it open, and of forty zeros takes the last ones."""

    class Best(nn.Module):
        def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            x = inputs["x"]
            least = x.topk(3, largest=False)[1]
            return torch.cat([x.topk(3)[1], x.sort(descending=True)[1], least, x.argsort(-1)], -1)

    (places,) = run_torch(Best(), [{"x": np.zeros((2, 40), np.float32)}], dtype)
    np.testing.assert_array_equal(places, np.tile([*range(3), *range(40), *range(3), *range(40)], (2, 1)))


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_of_one_value_alone_topk_takes_it(dtype):
    class Alone(nn.Module):
        def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            value, place = inputs["x"].sum().topk(1)
            return inputs["x"].sum(1) + value + place

    (scores,) = run_torch(Alone(), [{"x": np.ones((2, 3), np.float32)}], dtype)
    np.testing.assert_array_equal(scores, [[9], [9]])
