"""Requests that passed the door, one or several together: their users' states, then their scores."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from stca.arrays import Array
from stca.errors import HistoryNeededError, RequestError
from stca.manifest import Manifest
from stca.runtime.client_values import mapping_of, quoted
from stca.runtime.deadline import NEVER, Deadline
from stca.runtime.model import Model
from stca.runtime.recording import Recorder
from stca.runtime.request import Request
from stca.runtime.state import StateArray, UserState, along, join
from stca.runtime.turns import Turns
from stca.runtime.user_states import Found, UserStates
from stca.specs import TOKENS


class Answer(NamedTuple):
    """Scores, and how they came about.

    Attributes:
        scores: `(targets, tasks)`, as `Session.score` gives them.
        hits: for each request whether its user's state was kept, or being made for another request already.
        seconds: of the stages `check`, `encode` and `score`, those that ran.
        neighbours: for each request, what became of its neighbours: `hit`, `miss` or `left_out`.
        copied: bytes of states that were copied behind each other, where neighbours were read by a graph that takes
            each tensor as one piece of memory.
    """

    scores: Array
    hits: tuple[bool, ...]
    seconds: dict[str, float]
    neighbours: tuple[tuple[str, ...], ...] = ()
    copied: int = 0


class Asked(NamedTuple):
    """A request that passed the door: its model, its state or history, its request and target inputs; and of each
    neighbour, state or history and inputs, or None where it is left out.
    """

    model: Model
    found: Found
    row: Mapping[str, Array]
    neighbours: tuple[tuple[Found, Mapping[str, Array]] | None, ...] = ()

    @property
    def read(self) -> tuple[Found, ...]:
        """All whose histories are read, the user first."""
        if not self.neighbours:
            return (self.found,)
        return self.found, *(one[0] for one in self.neighbours if one is not None)

    @property
    def ready(self) -> bool:
        """Whether its state or history is at hand; otherwise it waits for the state that another call makes."""
        return all(one.state is not None or one.history is not None for one in self.read)

    @property
    def cost(self) -> int:
        """Tokens and targets."""
        return sum(map(_tokens, self.read)) + (self.model.targets(self.row) or 0)


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
        if type(request.neighbours) is not tuple or request.neighbours or type(request.leave_out) is not bool:
            return None
        if model.door.of_tokens or (row := model.door.plain(request.inputs)) is None:
            return None
        if (state := self._states.at_hand(model, request.user, request.version)) is None:
            return None
        checked = time.perf_counter()
        self._turns.enter()
        encoded = checked
        try:
            if state.waiting is not None:
                state = self._states.finished(model, model.key(request.user, request.version), state)
                encoded = time.perf_counter()
            scores = model.score_one(state, row)
        finally:
            self._turns.leave()
            self._states.count_at_hand()
        seconds = {"check": checked - began, "encode": encoded - checked, "score": time.perf_counter() - encoded}
        return Answer(scores, (True,), seconds)

    def asked(self, model: Model, requests: Sequence[Request], recorder: Recorder | None) -> list[Asked]:
        """Requests that passed the door, all of them before any state is looked for; none where nobody has targets.

        Raises:
            RequestError: as `Session.score`.
        """
        admitted, counts, asked = [], [], []
        for request in requests:
            if type(request.neighbours) is not tuple or type(request.leave_out) is not bool:
                _check_neighbours(request)
            inputs = mapping_of("inputs", request.inputs)
            row = model.door.admit(inputs, "request", "target")
            counts.append(model.targets(row))
            admitted.append((request, inputs, row))
        if counts.count(0) == len(counts):
            return []
        if recorder is not None:
            for (request, inputs, row), targets in zip(admitted, counts, strict=True):
                if targets != 0 and not request.neighbours:  # which a trace does not know
                    recorder.offer(model.door, inputs, row, request.user)
        if len(requests) > 1:
            model.door.limits.check_targets(sum(n or 0 for n in counts), "targets of all requests")
        for request, inputs, row in admitted:
            found = self._states.find(model, inputs, request.user, request.version)
            asked.append(Asked(model, found, row, self._neighbours(model, request) if request.neighbours else ()))
        return asked

    def _neighbours(self, model: Model, request: Request) -> tuple[tuple[Found, Mapping[str, Array]] | None, ...]:
        if not model.manifest.appendable or model.sums:
            raise RequestError(
                "neighbours: this bundle's states are not read one behind the other, for they are not rows of events "
                "that are each encoded by itself; send requests without neighbours"
            )
        found: list[tuple[Found, Mapping[str, Array]] | None] = []
        for one in request.neighbours:
            if isinstance(one, Request):
                _check_neighbours(one)
            if not isinstance(one, Request) or one.neighbours:
                raise RequestError("neighbours: each is a Request that names no neighbours itself")
            inputs = mapping_of("neighbours", one.inputs)
            row = model.door.admit_neighbour(inputs)
            try:
                found.append((self._states.find(model, inputs, one.user, one.version), row))
            except HistoryNeededError:
                if not request.leave_out:
                    raise
                found.append(None)
        return tuple(found)

    def answer(self, asked: Asked, wanted: Deadline) -> Answer:
        """Its scores, whether its state was there, and how long the stages took."""
        model, found, row, neighbours = asked
        if neighbours or model.door.of_tokens:
            return self._together((asked,), wanted)[0]
        began = time.perf_counter()
        self._turns.enter()
        try:
            state, hit = self._states.one(model, found, wanted)
            encoded = time.perf_counter()
            if wanted is not NEVER:
                wanted.check()
            scores = model.score_one(state, row)
        finally:
            self._turns.leave()
        return Answer(scores, (hit,), {"check": 0.0, "encode": encoded - began, "score": time.perf_counter() - encoded})

    def _together(self, asked: Sequence[Asked], wanted: Deadline) -> list[Answer]:
        """As `answer`, with the time that the stages took for all together."""
        model, began = asked[0].model, time.perf_counter()
        self._turns.enter()
        try:
            states, hits = self._states.complete(model, [found for one in asked for found in one.read], wanted)
            encoded = time.perf_counter()
            read, rows = _read_together(asked, states)
            scores = model.score(read, rows, wanted)
        finally:
            self._turns.leave()
        seconds = {"check": 0.0, "encode": encoded - began, "score": time.perf_counter() - encoded}
        told = iter(hits)
        return [
            Answer(
                of_request,
                (next(told),),
                {**seconds},
                (tuple("left_out" if n is None else "hit" if next(told) else "miss" for n in one.neighbours),),
                state.row_bytes if len(one.read) > 1 and not state.in_pieces else 0,
            )
            for one, of_request, state in zip(asked, scores, read, strict=True)
        ]

    def warm(
        self, model: Model, user: Hashable, history: Mapping[str, ArrayLike], version: Hashable, wanted: Deadline
    ) -> bool:
        """As `Session.warm`."""
        if user is None:
            raise RequestError("user: is None; a state is made ahead for the requests of one user, say which")
        found = self._states.find(model, mapping_of("history", history), user, version)
        if found.state is not None and found.state.waiting is None:
            return True
        self._turns.enter_when_free(wanted)
        try:
            return self._states.make_ahead(model, found, wanted)
        finally:
            self._turns.leave()

    def answers(self, asked: Sequence[Asked], wanted: Deadline) -> list[Answer]:
        """As `answer`, of several: of callers who came together, some before and some after a swap, perhaps."""
        if len(asked) == 1:
            return [self.answer(asked[0], wanted)]
        answers: dict[int, Answer] = {}
        for model in dict.fromkeys(id(one.model) for one in asked):
            places = [i for i, one in enumerate(asked) if id(one.model) == model]
            answers |= zip(places, self._together([asked[i] for i in places], wanted), strict=True)
        return [answers[i] for i in range(len(asked))]


def joined(answers: Sequence[Answer]) -> Answer:
    """The answers to the requests of one call as one."""
    if len(answers) == 1:
        return answers[0]
    scores, hits, seconds, neighbours, copied = zip(*answers, strict=True)
    return Answer(np.concatenate(scores), sum(hits, ()), seconds[0], sum(neighbours, ()), sum(copied))


def _check_neighbours(request: Request) -> None:
    near: object = request.neighbours
    if not isinstance(near, Sequence) or isinstance(near, str | bytes | bytearray):
        raise RequestError(f"neighbours: is {type(near).__name__:.40}, expected a list of Requests")
    leave_out: object = request.leave_out
    if not isinstance(leave_out, bool):
        raise RequestError(f"leave_out: is {quoted(leave_out)}, expected True or False")


def _tokens(found: Found) -> int:
    if found.state is not None:
        return found.state.tokens
    return max((len(x) for x in (found.history or {}).values() if x.ndim), default=0)


def _read_together(
    asked: Sequence[Asked], states: Sequence[UserState]
) -> tuple[list[UserState], list[Mapping[str, Array]]]:
    """Of each request, the state of all histories that it reads, and its row with an entry for each token of these.

    Raises:
        RequestError: when there are more tokens than the engines take, or entries than tokens.
    """
    model, came = asked[0].model, iter(states)
    if not model.door.of_tokens and len(states) == len(asked):
        return list(states), [one.row for one in asked]
    read: list[UserState] = []
    rows: list[Mapping[str, Array]] = []
    for one in asked:
        own, *others = (next(came) for _ in one.read)
        parts = [one.row, *(near[1] for near in one.neighbours if near is not None)]
        per_token = {
            name: [along(name, row[name], s) for row, s in zip(parts, (own, *others), strict=True)]
            for name in model.door.of_tokens
        }
        in_pieces = 0 < len(others) <= len(model.pieces)
        rows.append({**one.row, **_laid(model, per_token, in_pieces)})
        read.append(_several(model, own, others, in_pieces) if others else own)
    return read, rows


def _several(model: Model, own: UserState, others: Sequence[UserState], in_pieces: bool) -> UserState:
    """The state of several users' histories: what there is once per user is `own`'s, and rows are each user's own, as
    the graph for pieces takes them, or copied one behind the other.

    Raises:
        RequestError: when they are longer together than the bundle and its engines take.
    """
    states, tensors = (own, *others), dict(own.tensors)
    tokens = sum(s.tokens for s in states)
    if model.window is not None and tokens > model.window:
        raise RequestError(
            f"neighbours: the histories have {tokens} tokens together, the limit is {model.window}; name fewer"
        )
    rows: dict[str, list[StateArray]] = {}
    for spec in model.manifest.state:
        if model.is_offsets(spec):
            tensors[spec.name] = np.array([0, tokens], spec.dtype)
        elif spec.shape[:1] == (TOKENS,):
            rows[spec.name] = [one.tensors[spec.name] for one in states]
    return UserState({**tensors, **_laid(model, rows, in_pieces)}, tokens, in_pieces=in_pieces)


def _laid(model: Model, rows: Mapping[str, Sequence[Any]], in_pieces: bool) -> dict[str, Any]:
    """Rows of each user as a scorer takes them: joined, or apart, with none of users that there are not."""
    if not in_pieces:
        return {name: join(values) for name, values in rows.items()}
    feeds = {name: values[0] for name, values in rows.items()}
    for piece, inputs in enumerate(model.pieces, 1):
        for name, values in rows.items():
            feeds[inputs[name]] = values[piece] if piece < len(values) else values[0][:0]
    return feeds


def column_names(manifest: Manifest) -> tuple[str, ...]:
    """What each column of a bundle's scores is; see `Session.tasks`."""
    names: list[str] = []
    for spec in manifest.graphs["request"].outputs:
        columns = math.prod(n if isinstance(n, int) else 1 for n in spec.shape[1:])
        names += [spec.name] if columns == 1 else [f"{spec.name}[{i}]" for i in range(columns)]
    return tuple(names)
