"""A generated interaction log in which long history matters, by construction and by a known amount.

Users watch short videos. There are `topics` topics, and every item belongs to one (its `category`).

- A user `u` is shown topics with probabilities `w_u` of their own, heavy-tailed (log-normal weights), and finishes a
  video of topic `c` with probability `p[u, c] ~ Beta(κ μ_s, κ (1 - μ_s))`, drawn independently for every topic; `s` is
  the user's segment, which the model is told.
- Each event draws a topic from `w_u` and an item of it. The video is finished with probability `p[u, c]`; a finished
  one is liked with probability `quality[item] · ease[device]`. The action is skip, finish or like (a like implies a
  finish); the tasks are `finish` and `like`.
- Where `alike` is more than 1, so many users one after the other share segment, `w` and `p`: their events are drawn
  apart, and tell of one another's tastes.
- Events come in requests of `page` videos on one device; requests follow a Poisson process with a day's rhythm.

**Why long history matters.** What one topic's events say about the user's taste for another topic is nothing at all. A
target is best judged by the events of its own topic, and with hundreds of topics those are rare: one event or two in
512, dozens in 10 000.

**The best possible AUC.** Beta is conjugate to finish-or-skip, and topics, quality, device and time are independent of
`p`. So given the last `L` events, of which `n` were of the target's topic and `f` of those finished, exactly

    P(finish) = (κ μ_s + f) / (κ + n)          P(like) = P(finish) · quality[item] · ease[device]

No score orders positives above negatives better, in expectation, than the label's probability given all that is known
(Neyman-Pearson): its AUC on the very same targets is the best possible one at history `L`. With `n = f = 0` it is what
can be known without history; with `p` itself in place of the estimate, the limit of an endless history. Where users are
alike, all of this holds of what a user's own events tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stca.examples.train.log import Log, LoggedRequest

TASKS = ("finish", "like")
SKIP, FINISH, LIKE = 0, 1, 2
SEGMENT_MEANS = (0.35, 0.5, 0.65)
DEVICE_EASE = (1.0, 0.75, 0.5)
DEVICE_SHARES = (0.6, 0.25, 0.15)
# Share of a day's requests that fall in each UTC hour.
HOUR_SHARES = np.array([2, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4, 5, 6, 5, 4, 4, 4, 5, 7, 8, 9, 8, 5, 3]) / 100
DAY = 86_400
EPOCH = 1_767_225_600  # 2026-01-01 00:00 UTC


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Sizes of a generated world. `prior_strength` is κ; `exposure_spread` the σ of the log-normal topic weights;
    `alike` how many users are of one kind.
    """

    topics: int = 256
    items: int = 2048
    page: int = 64
    prior_strength: float = 2.0
    exposure_spread: float = 1.0
    alike: int = 1
    requests_per_day: float = 3.0
    seed: int = 1


class World:
    """What all users share: which item is of which topic, and how likeable it is."""

    def __init__(self, config: WorldConfig | None = None) -> None:
        self.config = c = config or WorldConfig()
        rng = np.random.default_rng(c.seed)
        # Every topic has the same number of items, one or two more where it does not divide; ids tell nothing.
        self.category: NDArray[np.int64] = rng.permutation(np.arange(c.items, dtype=np.int64) % c.topics)
        self.quality: NDArray[np.float64] = rng.uniform(0.1, 0.9, c.items)
        self.ease: NDArray[np.float64] = np.array(DEVICE_EASE)
        # Items grouped by topic, so that "an item of topic c" is one lookup.
        self._by_topic = np.argsort(self.category, kind="stable")
        self._topic_begin = np.searchsorted(self.category[self._by_topic], np.arange(c.topics + 1))

    def draw_items(self, rng: np.random.Generator, topic: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """An item of each `topic [N]`, all of a topic's items being equally likely."""
        first, end = self._topic_begin[topic], self._topic_begin[topic + 1]
        items: NDArray[np.int64] = self._by_topic[first + rng.integers(0, end - first)]
        return items


@dataclass(frozen=True)
class GeneratedLog:
    """A log, the world it was drawn from, and what only the generator knows: `affinity [U, topics]`, the `p` above."""

    world: World
    log: Log
    affinity: NDArray[np.float64]

    def best_scores(self, request: LoggedRequest, length: int) -> NDArray[np.float64]:
        """`P(label | last `length` events and all else known)`, `[m, tasks]`: the best possible scores."""
        history = self.log.history(request, length)
        topics = self.world.config.topics
        category, finished = self.world.category[self.log.item[history]], self.log.action[history] != SKIP
        shown = np.bincount(category, minlength=topics)
        finishes = np.bincount(category, weights=finished, minlength=topics)
        strength = self.world.config.prior_strength
        mean = SEGMENT_MEANS[int(self.log.user_fields["segment"][request.user])]
        return self._scores(request, (strength * mean + finishes) / (strength + shown))

    def limit_scores(self, request: LoggedRequest) -> NDArray[np.float64]:
        """The same with the user's affinities themselves, as an endless history would tell them."""
        return self._scores(request, self.affinity[request.user])

    def _scores(self, request: LoggedRequest, finish: NDArray[np.float64]) -> NDArray[np.float64]:
        item = self.log.item[request.cut : request.end]
        p = finish[self.world.category[item]]
        ease = self.world.ease[int(self.log.request_fields["device"][request.cut])]
        return np.stack([p, p * self.world.quality[item] * ease], axis=1)


def generate(world: World, *, users: int, history: int, targets: int, seed: int) -> GeneratedLog:
    """Draw `users` new users of `world`, each with `history` events and then `targets` more, which are held out.

    The held-out events are one request: same device, same moment. `targets` may be 0 for a log to train on.
    """
    c = world.config
    rng = np.random.default_rng([c.seed, seed])
    events = history + targets
    kinds = -(-users // c.alike)
    segment = rng.integers(0, len(SEGMENT_MEANS), kinds)
    mean = np.array(SEGMENT_MEANS)[segment, None]
    affinity = rng.beta(c.prior_strength * mean, c.prior_strength * (1 - mean), (kinds, c.topics))
    exposure = np.cumsum(np.exp(c.exposure_spread * rng.standard_normal((kinds, c.topics))), axis=1)
    segment, affinity, exposure = (np.repeat(x, c.alike, axis=0)[:users] for x in (segment, affinity, exposure))
    # Requests of `page` events; the held-out events, if any, are one request more.
    request_of = np.arange(events) // c.page
    request_of[history:] = request_of[history - 1] + 1 if history else 0
    begins_request = np.diff(request_of, prepend=-1) > 0
    requests = int(request_of[-1]) + 1 if events else 0

    item = np.empty((users, events), np.int32)
    time = np.empty((users, events), np.int64)
    action = np.empty((users, events), np.uint8)
    device = np.empty((users, events), np.uint8)
    for u in range(users):
        topic = np.searchsorted(exposure[u], rng.random(events) * exposure[u, -1], side="right")
        item[u] = world.draw_items(rng, topic)
        device[u] = rng.choice(len(DEVICE_SHARES), requests, p=DEVICE_SHARES)[request_of]
        finished = rng.random(events) < affinity[u, topic]
        liked = finished & (rng.random(events) < world.quality[item[u]] * world.ease[device[u]])
        action[u] = SKIP + finished + liked
        time[u] = _times(rng, begins_request, c.requests_per_day)
    begin = np.arange(users + 1, dtype=np.int64) * events
    log = Log(
        user_offsets=begin,
        held_out=begin[:-1] + history,
        item=item.ravel(),
        time=time.ravel(),
        action=action.ravel(),
        labels=np.stack([action.ravel() >= FINISH, action.ravel() == LIKE], axis=1).astype(np.uint8),
        items=c.items,
        sizes={
            "action": 3,
            "category": c.topics,
            "segment": len(SEGMENT_MEANS),
            "device": len(DEVICE_SHARES),
        },
        tasks=TASKS,
        event_fields={"category": world.category[item.ravel()].astype(np.int32)},
        user_fields={"segment": segment},
        request_fields={"device": device.ravel()},
    )
    return GeneratedLog(world, log, affinity)


def _times(rng: np.random.Generator, begins_request: NDArray[np.bool_], requests_per_day: float) -> NDArray[np.int64]:
    """Increasing UTC seconds: requests as a Poisson process with a day's rhythm, some seconds between their events.

    A Poisson process of constant rate is drawn in "activity", of which a day holds one unit, and mapped to the clock
    by the inverse of the rhythm's cumulative share.
    """
    activity = np.cumsum(rng.exponential(1 / requests_per_day, int(begins_request.sum())))
    day, share = np.divmod(activity, 1.0)
    clock = np.interp(share, np.concatenate([[0.0], np.cumsum(HOUR_SHARES)]), np.arange(25) * 3600.0)
    start = (EPOCH + day * DAY + clock).astype(np.int64)
    watched = np.where(begins_request, 0, 1 + rng.exponential(15.0, len(begins_request)).astype(np.int64))
    within = np.cumsum(watched)
    request_of = np.cumsum(begins_request) - 1
    since_start = within - within[begins_request][request_of]
    # A request waits until the one before is over: push starts later where they overlap.
    length = np.bincount(request_of, weights=watched).astype(np.int64) + 1
    busy = np.concatenate([[0], np.cumsum(length)[:-1]])
    start = np.maximum.accumulate(start - busy) + busy
    times: NDArray[np.int64] = start[request_of] + since_start
    return times
