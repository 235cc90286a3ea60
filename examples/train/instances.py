"""`python -m stca.examples.train.instances`: what compressed instances of the past add to recent behaviour, in AUC.

IAT's idea (arXiv 2604.08933) on the generated log. An *instance* is an event with all that was logged of it: item,
topic, device, segment, and how often the user had been shown and had finished the topic until then. A compressor,
trained beforehand, makes 64 numbers of it, `σ(W₁h + b₁)`, which stay as they are. One model reads the recent events
alone, the other an instance of each topic besides, the last one before the request. Assumed, for it is not public:
which 256 instances of a user are read, and that the compressor learns to give back what it was given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stca.examples.train.evaluate import EVALUATION_SEED, AucRow, ScoreFn, auc_rows
from stca.examples.train.log import Inputs, Log, LoggedRequest
from stca.examples.train.tiny import (
    SEED,
    Batch,
    Reader,
    attend,
    exported,
    fit,
    parser,
    score_with,
    served,
    target_inputs,
    tell,
)
from stca.examples.train.world import SKIP, GeneratedLog, World, generate
from stca.export.reference.module import segment_of
from stca.specs import OFFSETS, TOKENS, USERS, TensorSpec

# Numbers that an instance is compressed to, and what its label is called before it has come.
COMPRESSED, UNKNOWN = 64, 3
# A bias that leaves an instance out.
_HIDDEN = -1e4


class Compressor(nn.Module):
    """Instances `(n,)` to `(n, 64)`; the heads say what can be read off these."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        columns = {"topic": log.sizes["category"], "item": log.items} | {
            name: log.sizes[name] for name in ("segment", "device")
        }
        self.columns = nn.ModuleDict({name: nn.Embedding(size, COMPRESSED) for name, size in columns.items()})
        self.counts = nn.Linear(2, COMPRESSED)
        self.topic, self.rates = nn.Linear(COMPRESSED, columns["topic"]), nn.Linear(COMPRESSED, 2)

    def forward(self, ids: dict[str, Tensor], counts: Tensor) -> Tensor:
        parts = [table(ids[name]) for name, table in self.columns.items()]
        return torch.stack([*parts, self.counts(counts)]).sum(dim=0).sigmoid()


class Instances:
    """A log's instances, whose ids are the log's rows."""

    def __init__(self, log: Log) -> None:
        self.log, topics = log, log.sizes["category"]
        self.user = np.repeat(np.arange(log.users), np.diff(log.user_offsets))
        self.topic = log.event_fields["category"]
        of = self.user * topics + self.topic
        order = np.argsort(of, kind="stable")
        first = np.searchsorted(of[order], of[order])  # where the topic's events of that user begin
        finished = np.concatenate([[0], np.cumsum(log.action[order] != SKIP)])
        shown, finishes = np.empty((2, len(of)), np.float32)
        shown[order], finishes[order] = np.arange(len(of)) - first, finished[:-1] - finished[first]
        # How many there were, and what share was finished, beside one of each.
        self.counts = np.stack([np.log1p(shown) / 3, (finishes + 1) / (shown + 2)], axis=1)

    def of(self, rows: NDArray[np.int64]) -> tuple[dict[str, Tensor], Tensor]:
        """What a compressor takes of these."""
        log = self.log
        segment, device = log.user_fields["segment"][self.user[rows]], log.request_fields["device"][rows]
        ids = {"topic": self.topic[rows], "item": log.item[rows], "segment": segment, "device": device}
        return {n: torch.from_numpy(x.astype(np.int64)) for n, x in ids.items()}, torch.from_numpy(self.counts[rows])

    def before(self, request: LoggedRequest) -> NDArray[np.int64]:
        """The last instance of each topic before a request, oldest first."""
        begin = int(self.log.user_offsets[request.user])
        _, back = np.unique(self.topic[begin : request.cut][::-1], return_index=True)
        found: NDArray[np.int64] = np.sort(request.cut - 1 - back)
        return found


def compressor(instances: Instances, steps: int) -> Compressor:
    """One that learnt to give back topic and counts."""
    model, rng = Compressor(instances.log), np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        ids, counts = instances.of(rng.integers(0, len(instances.user), 1024))
        made = model(ids, counts)
        loss = nn.functional.cross_entropy(model.topic(made), ids["topic"])
        loss = loss + 10 * nn.functional.mse_loss(model.rates(made), counts)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return model.eval()


class Catalogue:
    """The compressed instances that some requests of a log need, in one table, and those requests' inputs."""

    def __init__(self, instances: Instances, requests: Sequence[LoggedRequest], made: Compressor) -> None:
        self.instances, self._rows = instances, {r: instances.before(r) for r in requests}
        self._known = np.unique(np.concatenate(list(self._rows.values())))
        with torch.no_grad():
            self.table = torch.cat([made(*instances.of(part)) for part in np.array_split(self._known, 64)])

    def batch(self, request: LoggedRequest, recent: int) -> tuple[Inputs, NDArray[np.float32]]:
        """One request's inputs and labels."""
        log, rows = self.instances.log, self._rows[request]
        inputs, labels = log.batch([request], [recent], request_time=True)
        return {
            "instance": np.searchsorted(self._known, rows),
            "instance_action": log.action[rows].astype(np.int64),
            "instance_time": log.time[rows],
            "history_offsets": np.array([0, len(rows)], np.int32),
            "recent_category": inputs["history_category"][None],
            "recent_action": inputs["history_action"][None],
            **{n: x for n, x in inputs.items() if not n.startswith("history")},
        }, labels


class Iat(nn.Module):
    """Scores targets; instances are the history, recent events belong to the user.

    Args:
        log: whose vocabularies it takes.
        made: the compressor of its instances.
        recent: events of the recent behaviour, no fewer.
        instances: whether these are read.
        width: of embeddings.
    """

    def __init__(self, log: Log, made: Compressor, recent: int, instances: bool, width: int = 32) -> None:
        super().__init__()
        sizes, self.recent, self.instances = log.sizes, recent, instances
        self.table = nn.Parameter(torch.zeros(1, COMPRESSED), requires_grad=False)
        self.adapter, self.side = nn.Linear(COMPRESSED, COMPRESSED), nn.Embedding(UNKNOWN + 1, COMPRESSED)
        self.key = nn.Linear(2 * COMPRESSED, COMPRESSED, bias=False)
        self.value = nn.Linear(2 * COMPRESSED, width, bias=False)
        self.topic, self.action = nn.Embedding(sizes["category"], width), nn.Embedding(sizes["action"], width)
        self.item, self.segment = nn.Embedding(log.items, width), nn.Embedding(sizes["segment"], width)
        self.device, self.near = nn.Embedding(sizes["device"], width), Reader(width)
        self.compress = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, COMPRESSED))
        self.asks = nn.Embedding(sizes["category"], COMPRESSED)
        self.top = nn.Sequential(nn.Linear(5 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, len(log.tasks)))
        with torch.no_grad():  # at first, an instance is asked for by what tells its topic, and tells its counts
            self.adapter.weight.copy_(4 * torch.eye(COMPRESSED))
            self.adapter.bias.fill_(-2)
            self.key.weight.copy_(torch.eye(COMPRESSED, 2 * COMPRESSED))
            self.asks.weight.copy_(made.topic.weight - made.topic.weight.mean(dim=0))
            self.value.weight[:2, :COMPRESSED] = 4 * made.rates.weight

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        targets, history = inputs["target_offsets"], inputs["history_offsets"]
        topics, items = self.topic(inputs["target_category"]), self.item(inputs["target_item"])
        whose = segment_of(topics.shape[0], targets)
        shared = self.segment(inputs["user_segment"]) + self.device(inputs["request_device"])
        shared = shared.index_select(0, whose)
        recent = nn.functional.normalize(self.topic(inputs["recent_category"]), dim=-1)
        recent = torch.cat([recent, self.action(inputs["recent_action"])], dim=-1)
        keys, values = self.near.encode(recent.flatten(0, 1))
        ends = ((torch.ones_like(history).cumsum(0) - 1) * self.recent).to(torch.int32)
        near = attend(self.near.query(topics), keys, values, targets, ends, torch.zeros_like(keys[:, 0]))
        far = self.far(inputs, torch.cat([items, topics, shared], dim=-1)) if self.instances else torch.zeros_like(near)
        scores: Tensor = self.top(torch.cat([near, far, shared, items, topics], dim=-1))
        return scores

    def far(self, inputs: dict[str, Tensor], features: Tensor) -> Tensor:
        """Of the instances: the query is made of all features; those after the request are hidden."""
        targets, history = inputs["target_offsets"], inputs["history_offsets"]
        instances = nn.functional.embedding(inputs["instance"], self.table)
        tokens = torch.cat([self.adapter(instances).sigmoid(), self.side(inputs["instance_action"])], dim=-1)
        asked = inputs["request_time"].index_select(0, segment_of(tokens.shape[0], history))
        hidden = (inputs["instance_time"] >= asked).to(tokens.dtype) * _HIDDEN
        query = self.asks(inputs["target_category"]) + self.compress(features)
        return attend(query, self.key(tokens), self.value(tokens), targets, history, hidden)

    def with_table(self, table: Tensor) -> Iat:
        """The model over other users' instances."""
        self.table = nn.Parameter(table, requires_grad=False)
        return self


def inputs_of(log: Log, instances: int, recent: int) -> tuple[TensorSpec, ...]:
    """What `Iat` takes."""
    return (
        TensorSpec("instance", "int64", (TOKENS,), "user", instances),
        TensorSpec("instance_action", "int64", (TOKENS,), "user", UNKNOWN + 1),
        TensorSpec("instance_time", "int64", (TOKENS,), "user"),
        TensorSpec("history_offsets", "int32", (OFFSETS,), "user"),
        TensorSpec("recent_category", "int64", (USERS, recent), "user", log.sizes["category"]),
        TensorSpec("recent_action", "int64", (USERS, recent), "user", log.sizes["action"]),
        TensorSpec("request_time", "int64", (USERS,), "request"),
        *target_inputs(log.items, log.sizes),
    )


def training(catalogue: Catalogue, recent: int) -> Batch:
    """Batches in which some labels have not come yet."""
    rng = np.random.default_rng(0)

    def batch(request: LoggedRequest) -> tuple[Inputs, NDArray[np.float32]]:
        inputs, labels = catalogue.batch(request, recent)
        late = rng.random(len(inputs["instance"])) < 0.1
        return {**inputs, "instance_action": np.where(late, UNKNOWN, inputs["instance_action"])}, labels

    return batch


def evaluated(score: ScoreFn, held: GeneratedLog, catalogue: Catalogue, args: argparse.Namespace) -> list[AucRow]:
    """AUC on users whom no training saw, beside the best possible with recent events, and with the whole history."""
    return auc_rows(
        score,
        held.log,
        [args.history],
        lambda r, n: {"best_recent": held.best_scores(r, args.recent), "best": held.best_scores(r, n)},
        batch=lambda r, _: catalogue.batch(r, args.recent),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train both, evaluate both; returns the exit code."""
    p = parser("stca.examples.train.instances", __doc__, history=10_000, recent=512, users=200, steps=1000)
    p.add_argument("--compressor-steps", type=int, default=1500, help="of training the compressor")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    log = generate(World(), users=args.users, history=args.history + 512, targets=0, seed=SEED).log
    held = generate(World(), users=args.eval_users, history=args.history, targets=512, seed=EVALUATION_SEED)
    torch.manual_seed(0)
    instances, requests = Instances(log), log.training_requests(64, args.history)
    made = compressor(instances, args.compressor_steps)
    known = Catalogue(instances, requests, made)
    unseen = Catalogue(Instances(held.log), held.log.held_out_requests(), made)
    found = {}
    for name, on in (("recent events alone", False), ("with instances", True)):
        torch.manual_seed(0)
        model = Iat(log, made, args.recent, on).with_table(known.table)
        fit(model, requests, training(known, args.recent), args).with_table(unseen.table)
        found[name] = evaluated(score_with(model), held, unseen, args)
    if args.bundle:
        bundle = exported(model, inputs_of(log, len(unseen.table), args.recent), args.bundle)
        found["with instances, served"] = evaluated(served(bundle), held, unseen, args)
    tell(found, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
