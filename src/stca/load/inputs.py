"""The values of a trace's requests: random, valid for the model, and the same each time they are asked for."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict

import numpy as np

from stca import probe
from stca.arrays import Array
from stca.load.workloads import ranks
from stca.manifest import Manifest
from stca.specs import SUM, TOKENS, TensorSpec

# Drawn histories are kept for so many users; others are drawn again when they return.
_USERS_KEPT = 512
# Spreads items over all ids: a prime, near 2^31 divided by the golden ratio.
_SPREAD = 1327217909


class Inputs:
    """Inputs of a model's users and targets. Safe to share between threads.

    Args:
        manifest: of the bundle.
        most: events of the longest history that is asked for.
        seed: of the values.
    """

    def __init__(self, manifest: Manifest, most: int, seed: int) -> None:
        specs = [s for s in manifest.graphs["request"].inputs if not s.is_offsets]
        self._user = [s for s in specs if s.scope == "user"]
        self._rest = [s for s in specs if s.scope != "user"]
        self._growing = {s.name: s.shape.index(TOKENS) for s in self._user if TOKENS in s.shape}
        self._whole = any(s.append == SUM for s in manifest.state)  # then an append brings the other inputs too
        self._window, self._least = manifest.max_history, manifest.min_history or 0
        self._most = max(most, self._least)
        self._seed = seed
        self._kept: OrderedDict[tuple[int, int], dict[str, Array]] = OrderedDict()
        self._lock = threading.Lock()
        self.appendable = manifest.appendable
        self._fixed = probe.history_of(manifest.graphs["request"].inputs, 0)
        self.has_history = probe.history_of(manifest.graphs["request"].inputs, 1) > 0
        # Of a fixed length: those that a session pads, and may be shorter.
        self._padded = [] if self._growing else [p for p in manifest.padding or () if p.side is not None]
        if self._padded:
            self._window, self._fixed = min(self._window or self._fixed, self._fixed), 0

    def user(self, user: int, tokens: int) -> dict[str, Array]:
        """A user's inputs, with the most recent events that the model takes of a history of so many."""
        if not self._growing:  # of a fixed length: another one with each event
            return self._drawn(user, tokens)
        tokens = min(max(tokens, self._least), self._most)
        begin = 0 if self._window is None else max(0, tokens - self._window)
        whole = self._drawn(user, 0)
        return {n: self._part(n, x, begin, tokens) if n in self._growing else x for n, x in whole.items()}

    def events(self, user: int, tokens: int, events: int) -> dict[str, Array]:
        """The last `events` of a user's history of `tokens`, as `append` takes them."""
        whole = self._drawn(user, 0)
        recent = {n: self._part(n, whole[n], max(0, tokens - events), tokens) for n in self._growing}
        return {**whole, **recent} if self._whole else recent

    def _part(self, name: str, values: Array, begin: int, end: int) -> Array:
        return values[(slice(None),) * self._growing[name] + (slice(begin, end),)]

    def targets(self, targets: int, number: int, items: int = 0, zipf: float = 0.0) -> dict[str, Array]:
        """A request's targets, and what it has of its own; ids of targets are those of so many items, the frequent ones
        anywhere among all.
        """
        rng = np.random.default_rng((self._seed, 1, number))
        made = probe.single(self._rest, 1, targets, rng)
        for spec in self._rest:
            if items and spec.scope == "target" and spec.limit is not None:
                least, drawn = int(spec.low or 0), made[spec.name]
                there = spec.limit - least
                ids = least + ranks(min(items, there), zipf, rng.random(drawn.shape)) * _SPREAD % there
                made[spec.name] = np.where(ids == spec.blank, drawn, ids).astype(drawn.dtype)
        return made

    def unmet(self, items: int, histories: tuple[int, int] | None = None) -> list[str]:
        """What of a wish for so many items, and for histories of so many events, the inputs do not meet, in lines."""
        whole = [s for s in self._rest if items and s.scope == "target" and np.dtype(s.dtype).kind in "iu"]
        told = [
            f"{s.name}: the bundle does not tell its ids, so that items change nothing" for s in whole if not s.limit
        ]
        most = max((s.limit - int(s.low or 0) for s in whole if s.limit), default=items)
        told += self._cut(*histories) if histories and self.has_history else []
        return told + ([f"the targets have {most} ids at most, fewer than {items} items"] if most < items else [])

    def _cut(self, fewest: int, most: int) -> list[str]:
        """What becomes of histories of so many events."""
        if self._fixed:
            asked = (fewest, most) != (self._fixed, self._fixed)
            return [f"the model's histories have {self._fixed} events, and every request brings so many"] * asked
        window = f"the model takes {self._window} events at most: of longer histories the most recent are sent"
        least = f"the model takes {self._least} events at least: shorter histories are sent with so many"
        return [window] * (self._window is not None and most > self._window) + [least] * (fewest < self._least)

    def _drawn(self, user: int, version: int) -> dict[str, Array]:
        with self._lock:
            if (found := self._kept.get((user, version))) is not None:
                self._kept.move_to_end((user, version))
                return found
        rng = np.random.default_rng((self._seed, 0, user, version))
        made = probe.single(self._of_user(version), self._most, 1, rng)
        with self._lock:
            self._kept[user, version] = made
            while len(self._kept) > _USERS_KEPT:
                self._kept.popitem(last=False)
        return made

    def _of_user(self, tokens: int) -> list[TensorSpec]:
        """The user's inputs with so many events in each padded history, or as many as it has places."""
        specs = {s.name: s for s in self._user}
        for history in self._padded:
            least = int(specs[history.lengths].low or 0) if history.lengths else 0
            count = min(max(tokens, self._least, least), self._window or tokens)
            for e in history.inputs:
                shape = list(specs[e.name].shape)
                shape[e.axis] = count = min(count, int(shape[e.axis]))
                specs[e.name] = dataclasses.replace(specs[e.name], shape=tuple(shape))
            if history.lengths:
                specs[history.lengths] = dataclasses.replace(specs[history.lengths], low=count, limit=count + 1)
        return list(specs.values())
