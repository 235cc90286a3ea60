"""A trace: when which user asks for how many targets, and when new events of theirs arrive. Values come later."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stca import typed_json
from stca.errors import UsageError
from stca.load.workloads import STEADY, WORKLOADS, Crowd, crowds, ranks, which
from stca.manifest import Manifest
from stca.specs import TARGETS, TOKENS
from stca.trace import Trace

# Most entries of a trace: an hour at 1,000 requests a second.
_MOST: int = 1 << 22


@dataclass(frozen=True)
class Arrival:
    """What happens at one moment.

    Attributes:
        at: seconds since the trace began.
        user: whose number.
        targets: to score; 0 where new events of the user arrive instead.
        tokens: events of the user's history from now on.
        events: how many of them are new.
        items, items_zipf: of the request's crowd (`stca.load.workloads.Crowd`).
    """

    at: float
    user: int
    targets: int
    tokens: int
    events: int = 0
    items: int = 0
    items_zipf: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a trace is drawn from.

    Attributes:
        users: how many there are.
        zipf: how much more often the frequent ones return: the k-th user's share falls with k to this power; 0 is all
            alike.
        history: fewest and most events of a user at the beginning, drawn evenly over their logarithm.
        targets: fewest and most targets of a request, drawn evenly.
        events: mean number of new events of a user between two of their requests.
        items, items_zipf: how many items targets are, 0 for all that the model has, and how unevenly.
        workload: of `WORKLOADS`, how traffic moves between this crowd and the one `towards`.
        towards: the other crowd; None for a sixth of the users and five times the items, and in `steady` for none.
        spike: every how many seconds the rate rises, for how many seconds, and to how many times itself; None never.
        seed: of all that is drawn.

    Raises:
        UsageError: naming what is out of its range.
    """

    users: int = 1000
    zipf: float = 1.0
    history: tuple[int, int] = (100, 2000)
    targets: tuple[int, int] = (100, 300)
    events: float = 1.0
    items: int = 0
    items_zipf: float = 0.0
    workload: str = STEADY
    towards: Crowd | None = None
    spike: tuple[float, float, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("history", 0), ("targets", 1)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise UsageError(f"{name}: is {low},{high}, expected the fewest, from {least} on, and the most")
        if not 0 <= self.events <= 1e6:
            raise UsageError("events must be from 0 to a million")
        if self.workload not in WORKLOADS:
            raise UsageError(f"workload: is {self.workload!r}, expected one of {', '.join(WORKLOADS)}")
        self.crowds()

    def crowds(self) -> list[Crowd]:
        """Those between whom traffic moves."""
        first = Crowd(self.users, self.zipf, self.items, self.items_zipf)
        if self.workload == STEADY and self.towards is None:
            return [first]
        fewer = dataclasses.replace(first, users=max(1, self.users // 6), items=5 * self.items)
        return crowds(self.workload, first, self.towards or fewer)

    def trace(self, rate: float, seconds: float) -> list[Arrival]:
        """Requests as a Poisson process, and events between them, in the order in which they come.

        Args:
            rate: requests a second, but for spikes.
            seconds: how long.

        Raises:
            UsageError: when that are too many.
        """
        if rate * seconds > _MOST:
            raise UsageError(f"{rate:g} requests a second for {seconds:g} s are more than {_MOST}; ask for fewer")
        rng = np.random.default_rng(self.seed)
        of = self.crowds()
        most = max(crowd.users for crowd in of)
        shift = int(self.history[0] == 0)  # which has no logarithm
        low, high = np.log(np.add(self.history, shift))
        tokens = np.exp(rng.uniform(low, high, most)).round().astype(int) - shift
        last = np.full(most, -1.0)
        made: list[Arrival] = []
        times = list(self._times(rate, seconds, rng))
        at_share = np.array(times) / seconds
        number = which(self.workload, at_share, rng) if len(of) > 1 else np.zeros(len(times), int)
        users, draws = np.zeros(len(times), int), rng.random(len(times))
        for n, crowd in enumerate(of):
            users[number == n] = ranks(crowd.users, crowd.zipf, draws[number == n])
        for at, user, n in zip(times, users.tolist(), number.tolist(), strict=True):
            if last[user] >= 0 and (new := int(rng.poisson(self.events))):
                tokens[user] += new
                made.append(Arrival(rng.uniform(last[user], at), user, 0, int(tokens[user]), new))
            targets = int(rng.integers(self.targets[0], self.targets[1] + 1))
            made.append(Arrival(at, user, targets, int(tokens[user]), 0, of[n].items, of[n].items_zipf))
            last[user] = at
        return sorted(made, key=lambda a: a.at)

    def _times(self, rate: float, seconds: float, rng: np.random.Generator) -> Iterator[float]:
        """Arrivals at the highest rate, of which as many are left out as the rate is lower."""
        every, long, factor = self.spike or (seconds, 0.0, 1.0)
        most = rate * max(1.0, factor)
        at = rng.exponential(1 / most)
        while at < seconds:
            now = rate * (factor if at % every < long else 1.0)
            if rng.uniform() * most < now:
                yield at
            at += rng.exponential(1 / most)


def write_trace(file: str, trace: Sequence[Arrival]) -> None:
    """Keep a trace as JSON, an arrival a line."""
    lines = [json.dumps(dataclasses.asdict(arrival)) for arrival in trace]
    Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_trace(file: str) -> list[Arrival]:
    """A trace that was kept, or recorded elsewhere.

    Raises:
        UsageError: when it cannot be read, or naming the line that is no arrival.
    """
    made: list[Arrival] = []
    try:
        for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                made.append(typed_json.as_type(_Line, typed_json.parse(line), f"line {number}").arrival())
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UsageError(f"{file}: {getattr(e, 'strerror', None) or e}; each line is one arrival as JSON") from e
    if not made:
        raise UsageError(f"{file}: has no arrivals")
    return sorted(made, key=lambda a: a.at)


def until(file: str, trace: Sequence[Arrival], seconds: float) -> list[Arrival]:
    """The arrivals of a trace's first seconds.

    Raises:
        UsageError: when there are none.
    """
    if not (made := [a for a in trace if a.at < seconds]):
        raise UsageError(f"{file}: has no arrivals in its first {seconds:g} s; raise --seconds, or leave it out")
    return made


def recorded(trace: Trace, manifest: Manifest) -> list[Arrival]:
    """The arrivals of recorded requests: their times, users and sizes; events in between are not known.

    Args:
        trace: of requests with their times.
        manifest: of the model that they were for.

    Raises:
        UsageError: when a request has no time, or none of the model's inputs.
    """
    inputs = manifest.graphs["request"].inputs
    tokens, targets = (
        [(s.name, s.shape.index(dim)) for s in inputs if s.scope == scope and dim in s.shape]
        for scope, dim in (("user", TOKENS), ("target", TARGETS))
    )
    users: dict[int, int] = {}
    made: list[Arrival] = []
    for number, one in enumerate(trace):
        sizes = [next((one.inputs[n].shape[a] for n, a in of if n in one.inputs), 0) for of in (tokens, targets)]
        if one.at is None or not sizes[1]:
            what = "no time" if one.at is None else "no targets of this model"
            raise UsageError(f"{trace.folder}: request {number} has {what}; record it with a session")
        whose = -1 - number if one.user is None else one.user
        made.append(Arrival(one.at, users.setdefault(whose, len(users)), sizes[1], sizes[0]))
    made.sort(key=lambda a: a.at)
    return [dataclasses.replace(a, at=a.at - made[0].at) for a in made]


@dataclass(frozen=True)
class _Line:
    """An arrival in a file; new events and the crowd's items may be left out."""

    at: float
    user: int
    targets: int
    tokens: int
    events: int | None = None
    items: int | None = None
    items_zipf: float | None = None

    def arrival(self) -> Arrival:
        crowd = self.items or 0, self.items_zipf or 0.0
        return Arrival(self.at, self.user, self.targets, self.tokens, self.events or 0, *crowd)
