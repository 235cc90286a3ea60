"""`python -m stca.examples.train.sketch`: what a sketch of the long history adds to a window of recent events, in AUC.

SequenceO1's idea (arXiv 2609.08443) on the generated log: one model reads the recent events alone, the other a sketch
of the whole history besides. Both have the same layers but for it, and the same training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from stca.examples.train.evaluate import as_text, auc_table
from stca.examples.train.log import Inputs, Log
from stca.examples.train.world import World, generate

# A training log of users whom no evaluation sees.
SEED = 1
# How sharply an untrained model tells topics apart: then it attends to events, and sketches them, by topic.
_SHARP = 16.0


class Reader(nn.Module):
    """One query over tokens `(n, 2 width)`: keys are their first half, values their second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        for layer in (self.q, self.k):
            nn.init.eye_(layer.weight)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        keys, values = tokens.chunk(2, dim=-1)
        keys = nn.functional.normalize(self.k(keys), dim=-1)
        shares = (_SHARP * nn.functional.normalize(self.q(query), dim=-1) @ keys.T).softmax(dim=-1)
        read: Tensor = shares @ self.v(values)
        return read


class Sketched(nn.Module):
    """Scores the targets of one request.

    Args:
        log: whose vocabularies it takes.
        recent: events that are read one by one.
        sketch: whether the whole history is sketched besides.
        width: of embeddings.
    """

    def __init__(self, log: Log, recent: int, sketch: bool, width: int = 32) -> None:
        super().__init__()
        sizes, self.recent, self.sketch = log.sizes, recent, sketch
        self.topic, self.action = nn.Embedding(sizes["category"], width), nn.Embedding(sizes["action"], width)
        self.prototypes = nn.Parameter(self.topic.weight.detach().clone())
        self.item, self.segment = nn.Embedding(log.items, width), nn.Embedding(sizes["segment"], width)
        self.device = nn.Embedding(sizes["device"], width)
        self.near, self.far = Reader(width), Reader(width)
        self.top = nn.Sequential(nn.Linear(5 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, len(log.tasks)))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        topics = nn.functional.normalize(self.topic(inputs["history_category"]), dim=-1)
        tokens = torch.cat([topics, self.action(inputs["history_action"])], dim=-1)
        query = self.topic(inputs["target_category"])
        near = self.near(query, tokens[-self.recent :])
        far = self.far(query, self.slots(topics, tokens)) if self.sketch else torch.zeros_like(near)
        user = (self.segment(inputs["user_segment"]) + self.device(inputs["request_device"])).expand_as(near)
        scores: Tensor = self.top(torch.cat([near, far, user, self.item(inputs["target_item"]), query], dim=-1))
        return scores

    def slots(self, topics: Tensor, tokens: Tensor) -> Tensor:
        """The sketch: each token shared out among the prototypes, and summed up; then, what share of a slot is what."""
        shares = (_SHARP * topics @ nn.functional.normalize(self.prototypes, dim=-1).T).softmax(dim=-1)
        return (shares.T @ tokens) / (shares.sum(dim=0)[:, None] + 1.0)


def trained(log: Log, *, sketch: bool, args: argparse.Namespace) -> Sketched:
    """A model after `args.steps` steps of one request each."""
    torch.manual_seed(0)
    model, rng = Sketched(log, args.recent, sketch), np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    requests = log.training_requests(64, args.history)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - step / args.steps)
        inputs, labels = log.batch([requests[rng.integers(len(requests))]], [args.history])
        loss = nn.functional.binary_cross_entropy_with_logits(model(_tensors(inputs)), torch.from_numpy(labels))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return model.eval()


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(x)) for name, x in inputs.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Train both, evaluate both; returns the exit code."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    log = generate(World(), users=args.users, history=args.history + 512, targets=0, seed=SEED).log
    found = {}
    for name, sketch in (("recent events alone", False), ("with a sketch", True)):
        began = time.monotonic()
        model = trained(log, sketch=sketch, args=args)
        print(f"{name}: trained in {time.monotonic() - began:.0f} s", file=sys.stderr)
        with torch.no_grad():
            rows = auc_table(
                lambda inputs, model=model: model(_tensors(inputs)).numpy(),  # type: ignore[misc]
                sorted({args.recent, args.history}),
                users=args.eval_users,
            )
        found[name] = [row.as_dict() for row in rows]
        if not args.json:
            print(f"{name}\n{as_text(rows)}")
    if args.json:
        print(json.dumps(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m stca.examples.train.sketch", description=__doc__, allow_abbrev=False)
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--history", type=int, default=10_000, help="events of the whole history")
    p.add_argument("--recent", type=int, default=512, help="events that are read one by one")
    p.add_argument("--users", type=int, default=200, help="to train on")
    p.add_argument("--eval-users", type=int, default=100)
    p.add_argument("--learning-rate", type=float, default=3e-3)
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return p


if __name__ == "__main__":
    sys.exit(main())
