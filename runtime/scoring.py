"""Requests that passed the door, one or several together: their users' states, then their scores."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stca.arrays import Array
from stca.manifest import Manifest
from stca.runtime.client_values import mapping_of
from stca.runtime.deadline import Deadline
from stca.runtime.model import Model
from stca.runtime.recording import Recorder
from stca.runtime.request import Request
from stca.runtime.turns import Turns
from stca.runtime.user_states import Found, UserStates


class Answer(NamedTuple):
    """Scores, and how they came about.

    Attributes:
        scores: `(targets, tasks)`, as `Session.score` gives them.
        hits: for each request whether its user's state was kept, or being made for another request already.
        seconds: of the stages `check`, `encode` and `score`, those that ran.
    """

    scores: Array
    hits: tuple[bool, ...]
    seconds: Mapping[str, float]


class Asked(NamedTuple):
    """A request that passed the door: its model, its state or history, its request and target inputs."""

    model: Model
    found: Found
    row: Mapping[str, Array]

    @property
    def ready(self) -> bool:
        """Whether its state or history is at hand; otherwise it waits for the state that another call makes."""
        return self.found.state is not None or self.found.history is not None

    @property
    def cost(self) -> int:
        """Tokens and targets."""
        found, targets = self.found, self.model.targets(self.row) or 0
        if found.state is not None:
            return found.state.tokens + targets
        return max((len(x) for x in (found.history or {}).values() if x.ndim), default=0) + targets


class Scoring:
    """Computes answers.

    Args:
        states: where users' states come from.
        turns: who computes when.
    """

    def __init__(self, states: UserStates, turns: Turns) -> None:
        self._states, self._turns = states, turns

    def at_once(self, model: Model, request: Request, began: float) -> Answer | None:
        """The answer to what most requests are: their inputs are arrays that graphs take as they are, and the state is
        in memory. None for any other, which is for `asked` and `answer`; they would give the same, some calls later.

        Raises:
            RequestError, EngineError: as `Session.score`.
        """
        if (row := model.door.plain(request.inputs)) is None:
            return None
        if (state := self._states.at_hand(model, request.user, request.version)) is None:
            return None
        checked = time.perf_counter()
        self._turns.enter()
        try:
            scores = model.score_one(state, row)
        finally:
            self._turns.leave()
            self._states.count_at_hand()
        seconds = {"check": checked - began, "encode": 0.0, "score": time.perf_counter() - checked}
        return Answer(scores, (True,), seconds)

    def asked(self, model: Model, requests: Sequence[Request], recorder: Recorder | None) -> list[Asked]:
        """Requests that passed the door, all of them before any state is looked for; none where nobody has targets.

        Raises:
            RequestError: as `Session.score`.
        """
        admitted, counts = [], []
        for request in requests:
            inputs = mapping_of("inputs", request.inputs)
            row = model.door.admit(inputs, "request", "target")
            counts.append(model.targets(row))
            admitted.append((request, inputs, row))
        if counts.count(0) == len(counts):
            return []
        if recorder is not None:
            for (request, inputs, row), targets in zip(admitted, counts, strict=True):
                if targets != 0:
                    recorder.offer(model.door, inputs, row, request.user)
        if len(requests) > 1:
            model.door.limits.check_targets(sum(n or 0 for n in counts), "targets of all requests")
        asked = []
        for request, inputs, row in admitted:
            asked.append(Asked(model, self._states.find(model, inputs, request.user, request.version), row))
        return asked

    def answer(self, asked: Sequence[Asked], wanted: Deadline) -> list[Answer]:
        """Of each, its scores, whether its state was there, and how long the stages took for all together."""
        model, began = asked[0].model, time.perf_counter()
        self._turns.enter()
        try:
            _, found, rows = zip(*asked, strict=True)
            states, hits = self._states.complete(model, found, wanted)
            encoded = time.perf_counter()
            scores = model.score(states, rows, wanted)
        finally:
            self._turns.leave()
        seconds = {"encode": encoded - began, "score": time.perf_counter() - encoded}
        return list(map(Answer, scores, zip(hits, strict=True), itertools.repeat(seconds)))

    def answer_several(self, asked: Sequence[Asked], wanted: Deadline) -> list[Answer]:
        """As `answer`, of callers who came together: before and after a swap, perhaps."""
        answers: dict[int, Answer] = {}
        for model in dict.fromkeys(id(one.model) for one in asked):
            places = [i for i, one in enumerate(asked) if id(one.model) == model]
            answers |= zip(places, self.answer([asked[i] for i in places], wanted), strict=True)
        return [answers[i] for i in range(len(asked))]


def column_names(manifest: Manifest) -> tuple[str, ...]:
    """What each column of a bundle's scores is; see `Session.tasks`."""
    names: list[str] = []
    for spec in manifest.graphs["request"].outputs:
        columns = math.prod(n if isinstance(n, int) else 1 for n in spec.shape[1:])
        names += [spec.name] if columns == 1 else [f"{spec.name}[{i}]" for i in range(columns)]
    return tuple(names)
