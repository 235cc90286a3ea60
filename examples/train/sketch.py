"""`python -m stca.examples.train.sketch`: what a sketch of the long history adds to a window of recent events, in AUC.

SequenceO1's idea (arXiv 2609.08443) on the generated log: one model reads the recent events alone, the other a sketch
of the whole history besides. Both have the same layers but for it, and the same training.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stca.examples.train.evaluate import AucRow, ScoreFn, auc_table
from stca.examples.train.log import Inputs, Log, LoggedRequest
from stca.examples.train.tiny import SEED, SHARP, Reader, exported, fit, parser, score_with, served, target_inputs, tell
from stca.examples.train.world import World, generate
from stca.specs import TOKENS, TensorSpec


class Sketched(nn.Module):
    """Scores the targets of one request.

    Args:
        log: whose vocabularies it takes.
        sketch: whether the whole history is sketched besides.
        width: of embeddings.
    """

    def __init__(self, log: Log, sketch: bool, width: int = 32) -> None:
        super().__init__()
        sizes, self.sketch = log.sizes, sketch
        self.topic, self.action = nn.Embedding(sizes["category"], width), nn.Embedding(sizes["action"], width)
        self.prototypes = nn.Parameter(self.topic.weight.detach().clone())
        self.item, self.segment = nn.Embedding(log.items, width), nn.Embedding(sizes["segment"], width)
        self.device = nn.Embedding(sizes["device"], width)
        self.near, self.far = Reader(width), Reader(width)
        self.top = nn.Sequential(nn.Linear(5 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, len(log.tasks)))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        query = self.topic(inputs["target_category"])
        near = self.near(query, self.tokens(inputs, "recent"))
        far = self.far(query, self.slots(self.tokens(inputs, "history"))) if self.sketch else torch.zeros_like(near)
        user = (self.segment(inputs["user_segment"]) + self.device(inputs["request_device"])).expand_as(near)
        scores: Tensor = self.top(torch.cat([near, far, user, self.item(inputs["target_item"]), query], dim=-1))
        return scores

    def tokens(self, inputs: dict[str, Tensor], which: str) -> Tensor:
        """Of the whole history, or of its recent events."""
        topics = nn.functional.normalize(self.topic(inputs[f"{which}_category"]), dim=-1)
        return torch.cat([topics, self.action(inputs[f"{which}_action"])], dim=-1)

    def slots(self, tokens: Tensor) -> Tensor:
        """The sketch: each token shared out among the prototypes, and summed up; then, what share of a slot is what."""
        topics, _ = tokens.chunk(2, dim=-1)
        shares = (SHARP * topics @ nn.functional.normalize(self.prototypes, dim=-1).T).softmax(dim=-1)
        return (shares.T @ tokens) / (shares.sum(dim=0)[:, None] + 1.0)


def with_recent(inputs: Inputs, recent: int) -> Inputs:
    """A request's inputs with its recent events by themselves: an append to the sketch brings all of these anew."""
    return {**inputs, **{f"recent_{of}": inputs[f"history_{of}"][-recent:] for of in ("category", "action")}}


def inputs_of(log: Log, recent: int) -> tuple[TensorSpec, ...]:
    """What `Sketched` takes of one request: no offsets, for sums are over one whole history."""
    size = {"user_segment": 1, "request_device": 1}
    return (
        *(
            TensorSpec(f"{which}_{of}", "int64", (events,), "user", log.sizes[of])
            for which, events in (("history", TOKENS), ("recent", recent))
            for of in ("category", "action")
        ),
        *(
            dataclasses.replace(s, shape=(size.get(s.name, s.shape[0]),))
            for s in target_inputs(log.items, log.sizes)
            if s.name != "target_offsets"
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train both, evaluate both; returns the exit code."""
    args = parser("stca.examples.train.sketch", __doc__, history=10_000, recent=512, users=200).parse_args(argv)
    torch.set_num_threads(1)
    log = generate(World(), users=args.users, history=args.history + 512, targets=0, seed=SEED).log
    requests = log.training_requests(64, args.history)
    found = {}

    def rows(score: ScoreFn) -> list[AucRow]:
        lengths = sorted({args.recent, args.history})
        return auc_table(lambda inputs: score(with_recent(inputs, args.recent)), lengths, users=args.eval_users)

    def batch(request: LoggedRequest) -> tuple[Inputs, NDArray[np.float32]]:
        inputs, labels = log.batch([request], [args.history])
        return with_recent(inputs, args.recent), labels

    for name, sketch in (("recent events alone", False), ("with a sketch", True)):
        torch.manual_seed(0)
        model = fit(Sketched(log, sketch), requests, batch, args)
        found[name] = rows(score_with(model))
    if args.bundle:
        found["with a sketch, served"] = rows(served(exported(model, inputs_of(log, args.recent), args.bundle)))
    tell(found, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
