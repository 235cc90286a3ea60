"""What the small comparisons of this folder share: a training loop, an attention, and scores from a bundle."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import stca.plugins.torch_op  # noqa: F401  registers torch.ops.stca.target_history_attention
from stca.bundle import Bundle
from stca.examples.train.evaluate import AucRow, ScoreFn, as_text
from stca.examples.train.log import Inputs, LoggedRequest
from stca.examples.train.train import tensors
from stca.specs import OFFSETS, TARGETS, USERS, TensorSpec

# A training log of users whom no evaluation sees.
SEED = 1
# How sharply an untrained model tells topics apart: then it attends to events by topic.
SHARP = 16.0
# One request of a log: its inputs and its targets' labels.
Batch = Callable[[LoggedRequest], tuple[Inputs, NDArray[np.float32]]]
Model = TypeVar("Model", bound=nn.Module)


class Reader(nn.Module):
    """One query over tokens `(n, 2 width)`: keys are their first half, values their second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        for layer in (self.q, self.k):
            nn.init.eye_(layer.weight)

    def query(self, x: Tensor) -> Tensor:
        """Of targets, `(m, width)`; its product with a key is the logit."""
        return SHARP * nn.functional.normalize(self.q(x), dim=-1)

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(n, width)`."""
        keys, values = tokens.chunk(2, dim=-1)
        return nn.functional.normalize(self.k(keys), dim=-1), self.v(values)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        keys, values = self.encode(tokens)
        read: Tensor = (self.query(query) @ keys.T).softmax(dim=-1) @ values
        return read


def attend(query: Tensor, key: Tensor, value: Tensor, targets: Tensor, history: Tensor, bias: Tensor) -> Tensor:
    """Each target over the tokens of its own request, `softmax(query · key + bias) value`, in one head.

    Args:
        query: `(N_t, d)`.
        key, value: `(N_h, d)` and `(N_h, d_v)`.
        targets, history: offsets `(B + 1,)` int32.
        bias: `(N_h,)`, of tokens; it is one more column of the key.
    """
    query = torch.cat([query, torch.ones_like(query[:, :1])], dim=1)
    key = torch.cat([key, bias[:, None]], dim=1)
    operator, lengths = torch.ops.stca.target_history_attention, history[1:] - history[:-1]
    read: Tensor = operator(query[:, None], key[:, None], value[:, None], targets, history, lengths, 1.0)
    return read[:, 0]


def target_inputs(log_items: int, sizes: Mapping[str, int]) -> tuple[TensorSpec, ...]:
    """What requests of the generated log bring for their targets, and once for all of these."""
    return (
        TensorSpec("user_segment", "int64", (USERS,), "user", sizes["segment"]),
        TensorSpec("request_device", "int64", (USERS,), "request", sizes["device"]),
        TensorSpec("target_item", "int64", (TARGETS,), "target", log_items),
        TensorSpec("target_category", "int64", (TARGETS,), "target", sizes["category"]),
        TensorSpec("target_offsets", "int32", (OFFSETS,), "target"),
    )


def fit(model: Model, requests: Sequence[LoggedRequest], batch: Batch, args: argparse.Namespace) -> Model:
    """The model after `args.steps` steps of one request each, ready to be evaluated."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    began = time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - step / args.steps)
        inputs, labels = batch(requests[int(rng.integers(len(requests)))])
        loss = nn.functional.binary_cross_entropy_with_logits(model(tensors(inputs)), torch.from_numpy(labels))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    print(f"trained in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return model.eval()


def score_with(model: nn.Module) -> ScoreFn:
    """Scores of the torch model."""

    def score(inputs: Inputs) -> NDArray[Any]:
        with torch.no_grad():
            scores: NDArray[Any] = model(tensors(inputs)).numpy()
        return scores

    return score


def exported(model: nn.Module, inputs: Sequence[TensorSpec], folder: str | Path) -> Bundle:
    """The bundle of a trained model, proven as `stca export` does it."""
    from stca.checks.verify import prove
    from stca.export.pipeline import export_module
    from stca.export.to_onnx import RequestModel

    source = {"kind": "callable", "name": type(model).__name__}
    bundle = export_module(RequestModel(model, tuple(inputs)), folder, prove=prove, source=source)
    print(f"{bundle.path}: {bundle.manifest.cached:.0%} of a request's work is kept", file=sys.stderr)
    return bundle


def served(bundle: Bundle) -> ScoreFn:
    """Scores of a session of the bundle, from one thread."""
    from stca.runtime import Request, Session

    session = Session.load(bundle.path, threads=1)
    taken = {s.name for s in bundle.manifest.graphs["request"].inputs if not s.is_offsets}

    def score(inputs: Inputs) -> NDArray[Any]:
        return session.score(Request({n: x for n, x in inputs.items() if n in taken}))

    return score


def tell(found: Mapping[str, Sequence[AucRow]], args: argparse.Namespace) -> None:
    """Print what was found, by model."""
    if args.json:
        print(json.dumps({name: [row.as_dict() for row in rows] for name, rows in found.items()}))
        return
    for name, rows in found.items():
        print(f"{name}\n{as_text(rows)}")


def parser(
    module: str, doc: str | None, *, history: int, recent: int, users: int, steps: int = 600
) -> argparse.ArgumentParser:
    """The options that all comparisons have, with defaults for those that differ."""
    p = argparse.ArgumentParser(prog=f"python -m {module}", description=doc, allow_abbrev=False)
    p.add_argument("--steps", type=int, default=steps)
    p.add_argument("--history", type=int, default=history, help="events of the whole history")
    p.add_argument("--recent", type=int, default=recent, help="events that are read one by one")
    p.add_argument("--users", type=int, default=users, help="to train on")
    p.add_argument("--eval-users", type=int, default=100)
    p.add_argument("--learning-rate", type=float, default=3e-3)
    p.add_argument("--bundle", metavar="FOLDER", help="export the second model there, and score with its session, too")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return p
