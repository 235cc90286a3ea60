"""Modules as people write them: what they take, what they give, what they are wrapped in, and what they raise."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from support.errors import one_line
from torch import Tensor, nn

from stca.checks.verify import run_torch
from stca.errors import ExportError
from stca.export import RequestModel, TensorSpec
from stca.export.modules import adapted, least_history, other_in_eval
from stca.export.to_onnx import example_inputs, to_request_graph
from stca.export.untraceable import plain_bags
from stca.specs import EventInput, Padding

INPUTS = (
    TensorSpec("hist", "int64", ("N_h",), "user", limit=9),
    TensorSpec("item", "int64", ("N_t",), "target", limit=9),
)


class Scores(NamedTuple):
    click: Tensor
    buy: Tensor


class Net(nn.Module):
    """Scores of each item; subclasses say how they are called and what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def click(self, hist: Tensor, item: Tensor) -> Tensor:
        return (self.table(item) * self.table(hist).sum(0)).sum(-1)


class OneDict(Net):
    def forward(self, batch):
        return self.click(batch["hist"], batch["item"])


class Positional(Net):
    def forward(self, hist, item):
        return self.click(hist, item)


class OtherOrder(Net):
    def forward(self, item, hist, dropout=0.0):
        return self.click(hist, item)


class KeywordOnly(Net):
    def forward(self, *, hist, item):
        return self.click(hist, item)


class Keywords(Net):
    def forward(self, **inputs):
        return self.click(inputs["hist"], inputs["item"])


class ADict(Net):
    def forward(self, hist, item):
        return {"click": self.click(hist, item), "buy": -self.click(hist, item), "loss": None}


class ANamedTuple(Net):
    def forward(self, batch):
        return Scores(self.click(batch["hist"], batch["item"]), -self.click(batch["hist"], batch["item"]))


class ATuple(Net):
    def forward(self, hist, item):
        return self.click(hist, item), -self.click(hist, item)


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        (OneDict, ["scores"]), (Positional, ["scores"]), (OtherOrder, ["scores"]), (KeywordOnly, ["scores"]),
        (Keywords, ["scores"]), (ADict, ["click", "buy"]), (ANamedTuple, ["click", "buy"]),
        (ATuple, ["scores_0", "scores_1"]),
    ],
)  # fmt: skip
def test_a_module_is_called_as_it_was_written(kind, outputs):
    module = kind()
    model = adapted(RequestModel(module, INPUTS))
    assert list(model.outputs) == outputs
    feeds = example_inputs(INPUTS)
    found = model.module(feeds)
    found = found if isinstance(found, tuple) else (found,)
    assert torch.equal(found[0], module.click(feeds["hist"], feeds["item"]))
    assert [o.name for o in to_request_graph(model).graph.output] == outputs


def test_wrappers_are_taken_off():
    for wrapped in (torch.compile(Positional()), nn.DataParallel(Positional())):
        model = adapted(RequestModel(wrapped, INPUTS))
        assert [o.name for o in to_request_graph(model).graph.output] == ["scores"]


def test_a_module_in_training_mode_is_traced_in_evaluation_mode_and_left_as_it_was():
    module = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    module.forward = lambda hist, item: nn.functional.dropout(item.float(), 0.5, module.training)  # type: ignore
    module[1].eval()  # frozen, as for fine-tuning
    model = adapted(RequestModel(module, (INPUTS[0], INPUTS[1])[:2]))
    assert [part.training for part in module.modules()] == [True, True, False]
    assert model.outputs == ("scores",)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Positional().half(), ("float16", ".float()", "--precision")),
        (lambda: Positional().bfloat16(), ("bfloat16", ".float()")),
    ],
)
def test_weights_of_lower_precision(make, words):
    with one_line(ExportError, *words):
        adapted(RequestModel(make(), INPUTS))


class Raises(Net):
    def forward(self, hist, item):
        return self.table(hist) @ self.table(item)


class WrongName(Net):
    def forward(self, history, item):
        return self.click(history, item)


class Nothing(Net):
    def forward(self, hist, item):
        return None


class Branches(Net):
    def forward(self, hist, item):
        if self.table(hist).sum() > 0:
            return self.click(hist, item)
        return -self.click(hist, item)


class Dropout(Net):
    def forward(self, hist, item):
        return nn.functional.dropout(self.click(hist, item), 0.5, training=True)


class BatchStatistics(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, hist, item):
        return self.norm(self.table(item)).sum(-1) + self.click(hist, item)


class Recurrent(Net):
    """Of a length that varies, which torch's newer exporter makes a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, hist, item):
        return self.table(item) @ self.gru(self.table(hist)[None])[0][0, -1]


class Bag(nn.Module):
    """Its graph has branches that hand on values from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.table = nn.EmbeddingBag(9, 4, mode="sum"), nn.Embedding(9, 4)

    def forward(self, hist, item):
        return self.table(item) @ self.bag(hist[None])[0]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Dropout, ("asked the same again", "dropout")),
        (BatchStatistics, ("norm (BatchNorm1d)", "track_running_stats=True")),
        (Raises, ("RuntimeError", "test_modules.py:", "RequestModel.inputs")),
        (WrongName, ("forward takes history, item", "hist is no parameter, and history is no input")),
        (Nothing, ("NoneType", "scores are one tensor")),
    ],
)
def test_mistakes_are_told_in_one_line(kind, words):
    with one_line(ExportError, *words):
        adapted(RequestModel(kind(), INPUTS))


@pytest.mark.parametrize("together", [lambda u, i: u * i, lambda u, i: torch.cat([u, i], 1)])
def test_one_size_under_two_names_is_told_with_both(together):
    class Pointwise(nn.Module):
        def forward(self, inputs):
            return together(inputs["hist"].float(), inputs["item"].float()[:, None]).sum(1)

    inputs = (TensorSpec("hist", "int64", ("batch", 4), "user", limit=9), INPUTS[1])
    with one_line(ExportError, "'batch' and 'N_t'", "call both by one name"):
        adapted(RequestModel(Pointwise(), inputs))


def test_what_cannot_be_traced_is_told_with_its_line_and_a_way_out(capfd):
    with one_line(ExportError, "test_modules.py:", "dynamo=False", "stca split"):
        to_request_graph(adapted(RequestModel(Branches(), INPUTS)))
    assert capfd.readouterr() == ("", ""), "torch prints the whole graph"


@pytest.mark.parametrize("kind", [Recurrent, Bag])
def test_layers_that_an_exporter_stumbles_over(kind):
    """The recurrent one comes from torch's older exporter, and says so."""
    told: list[str] = []
    model = RequestModel(kind(), INPUTS)
    graph = to_request_graph(adapted(model), told.append)
    assert bool(told) == (kind is Recurrent)
    onnx.checker.check_model(graph, full_check=True)
    assert [i.type.tensor_type.shape.dim[0].dim_param for i in graph.graph.input] == ["N_h", "N_t"]
    rng = np.random.default_rng(0)
    for n, m in ((1, 1), (9, 4)):
        feeds = {"hist": rng.integers(0, 9, n), "item": rng.integers(0, 9, m)}
        (found,) = ReferenceEvaluator(graph).run(None, feeds)
        with torch.no_grad():
            wanted = model.module(**{k: torch.from_numpy(v) for k, v in feeds.items()})
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (("hist", "item"), ("'hist'", "TensorSpec")),
        ((TensorSpec("hist", "int64", ("N_h",)), INPUTS[1]), ("'hist'", "scope", "user")),
        ((INPUTS[0], *INPUTS), ("two inputs", "'hist'")),
    ],
)
def test_inputs_that_say_too_little(inputs, words):
    with one_line(ExportError, *words):
        adapted(RequestModel(Positional(), inputs))


def test_code_that_fails_at_other_sizes_is_told_with_its_line():
    class Seven(Net):
        def forward(self, hist, item):
            return self.click(hist.reshape(7), item)

    model = adapted(RequestModel(Seven(), INPUTS))
    with one_line(ExportError, "test_modules.py:", "hist [3]"):
        run_torch(model.module, [{"hist": np.arange(3), "item": np.arange(2)}])


@pytest.mark.parametrize("pad", [None, 0, -1])
@pytest.mark.parametrize(("mode", "weighed"), [("sum", False), ("sum", True), ("mean", False), ("max", False)])
def test_bags_are_the_same_without_a_loop(mode, weighed, pad):
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(9, 4, mode=mode, padding_idx=pad)
    ids = torch.randint(0, 9, (6, 5))
    ids[1], ids[2] = 0, 8  # all of them padding
    weights = {"per_sample_weights": torch.rand(6, 5)} if weighed else {}
    expected, own = bag(ids, **weights), nn.functional.embedding_bag
    begins, ends = torch.tensor([0, 4, 4, 15]), torch.tensor([0, 4, 4, 15, 30])
    flat_weights = {n: w.flatten() for n, w in weights.items()}
    ragged = bag(ids.flatten(), begins, **flat_weights)
    last = nn.EmbeddingBag(9, 4, mode=mode, padding_idx=pad, include_last_offset=True, _weight=bag.weight)
    with plain_bags():
        torch.testing.assert_close(bag(ids, **weights), expected)
        flat = bag(ids.flatten(), torch.arange(0, 30, 5), **flat_weights)
        torch.testing.assert_close(bag(ids.flatten(), begins, **flat_weights), ragged)
        torch.testing.assert_close(last(ids.flatten(), ends, **flat_weights), ragged)
    torch.testing.assert_close(flat, expected)
    assert nn.functional.embedding_bag is own


def test_offsets_of_bags_that_are_none_are_told_the_layout_that_works():
    class Flat(Net):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(9, 4)

        def forward(self, hist, begins, item):
            return self.bag(hist, begins).sum() + item

    inputs = (INPUTS[0], TensorSpec("begins", "int64", ("bags",), "user"), INPUTS[1])
    with one_line(ExportError, "[batch, ids] without offsets", "padding_idx"):
        adapted(RequestModel(Flat(), inputs))


@pytest.mark.parametrize(("pooled", "least"), [("sum", 0), ("amax", 1), ("third", 3), ("newest", 0), ("none", 0)])
def test_the_shortest_history_is_asked_of_the_module(pooled, least):
    """torch raises where it is to find the largest of nothing; of one that always fails nothing is said."""
    length = TensorSpec("length", "int64", (1,), "user")

    class Pools(Net):
        def forward(self, hist, item, length):
            events, rows = self.table(hist), self.table(item)
            if pooled == "none":
                raise ValueError
            if pooled == "newest":
                return (rows * torch.cat([events.new_zeros(1, 4), events]).narrow(0, int(length), 1)).sum(-1)
            return (rows * (events[2] if pooled == "third" else getattr(events, pooled)(0))).sum(-1)

    module = Pools()
    assert least_history(RequestModel(_OneDict(module), (*INPUTS, length))) == least


def test_a_few_lengths_to_trace_with_are_never_0():
    lengths = TensorSpec("length", "int64", ("batch",), "user", limit=4)
    made = example_inputs((TensorSpec("x", "float32", ("a", "b", "c"), "user"), lengths))["length"]
    assert len(made) > 4
    assert made.min() == 1
    assert made.max() == 3


PLACES = 8
OF_HISTORY = (
    TensorSpec("hist", "int64", ("batch", PLACES), "user", limit=9),
    TensorSpec("item", "int64", ("batch",), "target", limit=9),
)
LENGTH, MASK = (
    TensorSpec("length", "int64", ("batch",), "user"),
    TensorSpec("mask", "bool", ("batch", PLACES), "user"),
)


class Encoded(Net):
    """A history through torch's own encoder, with its padding masked there and, unless pooled, read afterwards."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.read = read
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, hist, item, length=None, mask=None):
        none = hist == 0 if mask is None else ~mask
        none = none if length is None else torch.arange(hist.shape[1]) >= length[:, None]
        x = self.encoder(self.table(hist), src_key_padding_mask=none)
        read = {
            "mean": lambda: x.mean(1),
            "last": lambda: x[:, -1],
            "flat": lambda: x.flatten(1)[:, :4] + x.flatten(1)[:, -4:],
            "pooled": lambda: (x * ~none[..., None]).sum(1) / (~none).sum(1, keepdim=True),
        }
        return (read[self.read]() * self.table(item)).sum(-1)


@pytest.mark.parametrize(
    ("read", "inputs", "side", "told"),
    [
        ("mean", (), None, True),
        ("mean", (LENGTH,), "right", True),
        ("mean", (MASK,), None, True),
        ("last", (), None, True),
        ("last", (), "left", False),  # where there is no nested tensor
        ("flat", (), "right", True),
        ("pooled", (), None, False),
    ],
)
def test_what_torchs_fast_path_scores_otherwise_is_told_and_scored_as_in_training(read, inputs, side, told):
    torch.manual_seed(0)
    model = adapted(RequestModel(Encoded(read).eval(), (*OF_HISTORY, *inputs)))
    histories = [Padding((EventInput("hist", 1),), side)]
    assert len(other_in_eval(model, histories)) == told

    short = {"hist": np.array([[1, 2, 3, 4, 5, 0, 0, 0]] * 2), "item": np.array([1, 2])}
    short |= {"length": np.array([5, 5]), "mask": short["hist"] != 0}
    short = {s.name: short[s.name] for s in model.inputs}
    tensors = {n: torch.from_numpy(x) for n, x in short.items()}
    plain = model.module(tensors)[0].detach()  # with gradients, as in training, torch takes no fast path
    with torch.no_grad():
        eager = model.module(tensors)[0]
    assert torch.allclose(plain, eager, atol=1e-4) == (read == "pooled")
    for dtype in (None, "float64"):
        np.testing.assert_allclose(run_torch(model.module, [short], dtype)[0].ravel(), plain, atol=1e-6)


class _OneDict(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs):
        return self.module(**inputs)
