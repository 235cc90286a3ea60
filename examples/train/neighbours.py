"""`python -m stca.examples.train.neighbours`: what the histories of similar users add to a user's own, in AUC.

SUIN's idea (arXiv 2604.23810) on a generated log in which six users each are of one kind. A target attends to the
user's recent events and to those of the most similar users in one attention, whose logits gain β · similarity. Similar
are users whose events have alike shares of topics (a cosine): nobody says who is of one kind. One model is trained on
users' own events alone, the other with their neighbours'. Left out, for it is not public: the position encoding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stca.examples.train.evaluate import EVALUATION_SEED, AucRow, ScoreFn, auc_rows
from stca.examples.train.log import Inputs, Log, LoggedRequest
from stca.examples.train.tiny import SEED, Reader, attend, exported, fit, parser, score_with, target_inputs, tell
from stca.examples.train.world import GeneratedLog, World, WorldConfig, generate
from stca.export.reference.module import segment_of
from stca.runtime import Request, Session
from stca.specs import OFFSETS, TOKENS, TensorSpec

# How many users of the generated log are of one kind, and how many neighbours a user has: some are of another.
ALIKE, NEIGHBOURS = 6, 8
# Events of a request.
PAGE = WorldConfig().page


class Suin(nn.Module):
    """Scores targets over the histories of several users, one after the other.

    Args:
        log: whose vocabularies it takes.
        width: of embeddings.
    """

    def __init__(self, log: Log, width: int = 32) -> None:
        super().__init__()
        sizes = log.sizes
        self.topic, self.action = nn.Embedding(sizes["category"], width), nn.Embedding(sizes["action"], width)
        self.item, self.segment = nn.Embedding(log.items, width), nn.Embedding(sizes["segment"], width)
        self.device, self.reader = nn.Embedding(sizes["device"], width), Reader(width)
        self.beta = nn.Parameter(torch.ones(()))
        self.top = nn.Sequential(nn.Linear(4 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, len(log.tasks)))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        targets, history = inputs["target_offsets"], inputs["history_offsets"]
        topics = nn.functional.normalize(self.topic(inputs["history_category"]), dim=-1)
        keys, values = self.reader.encode(torch.cat([topics, self.action(inputs["history_action"])], dim=-1))
        query, items = self.topic(inputs["target_category"]), self.item(inputs["target_item"])
        bias = self.beta * inputs["similarity"]
        read = attend(self.reader.query(query), keys, values, targets, history, bias)
        user = self.segment(inputs["user_segment"]) + self.device(inputs["request_device"])
        user = user.index_select(0, segment_of(items.shape[0], targets))
        scores: Tensor = self.top(torch.cat([read, user, items, query], dim=-1))
        return scores


def inputs_of(log: Log) -> tuple[TensorSpec, ...]:
    """What `Suin` takes. How similar users are is no part of their states: it is each request's own."""
    return (
        TensorSpec("history_category", "int64", (TOKENS,), "user", log.sizes["category"]),
        TensorSpec("history_action", "int64", (TOKENS,), "user", log.sizes["action"]),
        TensorSpec("history_offsets", "int32", (OFFSETS,), "user"),
        TensorSpec("similarity", "float32", (TOKENS,), "request"),
        *target_inputs(log.items, log.sizes),
    )


class Neighbours:
    """Who is similar to whom in a log, by each user's first `events`; and requests that name them.

    Args:
        log: of the users.
        events: by which they are compared, and most that are read of each.
        count: neighbours of a user.
    """

    def __init__(self, log: Log, events: int, count: int) -> None:
        self.log, self._events = log, events
        topics = log.sizes["category"]
        seen = [log.event_fields["category"][begin : begin + events] for begin in log.user_offsets[:-1].tolist()]
        shares = np.stack([np.bincount(x, minlength=topics) for x in seen]).astype(np.float64)
        shares /= np.linalg.norm(shares, axis=1, keepdims=True)
        alike = shares @ shares.T
        np.fill_diagonal(alike, -1)
        self.users = np.argsort(-alike, axis=1, kind="stable")[:, :count]
        self.similarity = np.take_along_axis(alike, self.users, axis=1).astype(np.float32)

    def read(self, request: LoggedRequest) -> list[tuple[LoggedRequest, Inputs]]:
        """Whose histories are read for a request, cut before its time, and their events: the user's own, then those of
        the neighbours, the most similar first. To themselves a user has the similarity 1.
        """
        log, found = self.log, []
        others = zip(self.users[request.user].tolist(), self.similarity[request.user].tolist(), strict=True)
        for user, similar in [(request.user, 1.0), *others]:
            begin, end = int(log.user_offsets[user]), int(log.held_out[user])
            before = int(np.searchsorted(log.time[begin:end], log.time[request.cut]))
            cut = begin + before - before % PAGE  # states are made at requests
            one = request if user == request.user else LoggedRequest(user, cut, cut)
            rows = log.history(one, self._events)
            events: Inputs = {
                "history_category": log.event_fields["category"][rows].astype(np.int64),
                "history_action": log.action[rows].astype(np.int64),
                "similarity": np.full(len(rows), similar, np.float32),
            }
            found.append((one, events))
        return found

    def batch(self, request: LoggedRequest) -> tuple[Inputs, NDArray[np.float32]]:
        """One request's inputs and labels, all histories one after the other."""
        inputs, labels = self.log.batch([request], [self._events])
        _, events = zip(*self.read(request), strict=True)
        joined = {n: np.concatenate([one[n] for one in events]) for n in events[0]}
        offsets = np.array([0, len(joined["similarity"])], np.int32)
        return {**inputs, **joined, "history_offsets": offsets}, labels

    def asked(self, request: LoggedRequest) -> tuple[Request, NDArray[np.float32]]:
        """The same for a session: a request that names its neighbours, each with a state of their own."""
        inputs, labels = self.log.batch([request], [self._events])
        (_, own), *others = self.read(request)
        segments = self.log.user_fields["segment"]
        neighbours = [Request({**e, "user_segment": segments[[one.user]]}, one.user, one.cut) for one, e in others]
        wanted = {n: inputs[n] for n in ("user_segment", "request_device", "target_item", "target_category")}
        return Request({**wanted, **own}, request.user, request.cut, neighbours), labels


def evaluated(
    score: ScoreFn, held: GeneratedLog, batch: Callable[[LoggedRequest], Any], args: argparse.Namespace
) -> list[AucRow]:
    """AUC on users whom no training saw, beside the best possible from their own events, and from endless ones."""
    return auc_rows(
        score,
        held.log,
        [args.recent],
        lambda r, n: {"best_own": held.best_scores(r, n), "limit": held.limit_scores(r)},
        batch=lambda r, _: batch(r),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train both, evaluate both; returns the exit code."""
    args = parser("stca.examples.train.neighbours", __doc__, history=1024, recent=512, users=600).parse_args(argv)
    torch.set_num_threads(1)
    world = World(WorldConfig(alike=ALIKE))
    log = generate(world, users=args.users, history=args.history, targets=0, seed=SEED).log
    held = generate(world, users=args.eval_users, history=args.history, targets=512, seed=EVALUATION_SEED)
    requests = log.training_requests(64, args.recent)
    found = {}
    for name, count in (("own events alone", 0), ("with neighbours", NEIGHBOURS)):
        torch.manual_seed(0)
        model = fit(Suin(log), requests, Neighbours(log, args.recent, count).batch, args)
        near = Neighbours(held.log, args.recent, count)
        found[name] = evaluated(score_with(model), held, near.batch, args)
    if args.bundle:
        session = Session.load(exported(model, inputs_of(log), args.bundle).path, threads=1)
        found["with neighbours, served"] = evaluated(session.score, held, near.asked, args)
        print(f"states: {session.stats().hits} hits, {session.stats().misses} misses", file=sys.stderr)
    tell(found, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
