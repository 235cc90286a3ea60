"""`python tests/fuzz/states.py`: schedules of the state store, each score held against a fresh encoding.

Random calls in random order: scores with a history and without, appends, amendments, states made ahead, forgotten
users, swaps, time that passes, sessions that end or are cut off, records that are damaged, and calls side by side.
Memory holds part of the users, the folder of files most of them. Every score must be that of the user's history, of
the version that was asked, under the weights that are served; a state that is too old, forgotten or of other weights is
no hit.
Exit codes: 0 nothing was wrong, 1 something was, 2 bad usage.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import soak

from stca.arrays import Array
from stca.errors import HistoryNeededError
from stca.runtime import Request, Session
from stca.runtime.store import FILE, MEMORY

USERS, TTL = 8, 300.0


class Schedule:
    """One session after the other on one folder of states, and what was wrong with them.

    Args:
        sources: bundles of the same model with different weights.
        truths: what each one scores.
        folder: of the states' files.
        rng: what happens next.
    """

    def __init__(self, sources: Sequence[Path], truths: Sequence[soak.Truth], folder: Path, rng: random.Random) -> None:
        self.sources, self.truths, self.folder, self.rng = sources, truths, folder, rng
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._served, self._passed = 0, 0.0
        self._names = itertools.count(-1, -1)  # of histories that are no user's: each its own, files remember them
        self._made: dict[tuple[int, int], float] = {}  # when the state of a user and version was last made
        self._limits = {"max_users": rng.choice([1, 3, 6]), "state_folder_bytes": rng.choice([2_000, 4_000, 1 << 20])}
        self._load()

    def _load(self) -> None:
        source = self.sources[self._served]
        options = {"threads": 1, "truncate": True, "ttl_seconds": TTL, "state_folder": self.folder, **self._limits}
        self.session = Session.load(source, **options)
        store = self.session._store
        assert store.file is not None
        store.memory._clock = lambda: time.monotonic() + self._passed
        store.file._clock = lambda: time.time() + self._passed

    def run(self, steps: int) -> None:
        """So many steps, and the session's end."""
        ways = (
            *(self._score,) * 5,
            *(self._hit,) * 8,
            *(self._append,) * 5,
            *(self._amend,) * 2,
            *(self._warm,) * 2,
            self._forget,
            self._swap,
            self._pass,
            self._settle,
            self._damage,
            self._restart,
            self._together,
        )
        try:
            for _ in range(steps):
                self.counts[self.rng.choice(ways)()] += 1
        finally:
            self._end()

    def _end(self) -> None:
        """The session's end, and what its store did."""
        stats = self.session.stats()
        assert stats.file is not None
        self.counts += Counter(
            {
                "store: hits from memory": stats.hits_from.get(MEMORY, 0),
                "store: hits from a file": stats.hits_from.get(FILE, 0),
                "store: evictions from memory": stats.evictions,
                "store: evictions from files": stats.file.evictions,
                "store: expired": stats.expired + stats.file.expired,
                "store: records discarded": stats.file.discarded,
            }
        )
        self.session.close()

    def _any(self) -> tuple[int, int]:
        """A user and a version; mostly one that was made."""
        if self._made and self.rng.random() < 0.7:
            return self.rng.choice([*self._made])
        return self.rng.randrange(USERS), self.rng.randint(soak.SHORTEST, soak.LONGEST)

    def _hold(self, how: str, user: int, version: int, scores: Array) -> str:
        if not self.truths[self._served].right(user, version, scores):
            self.wrong.append(f"{how} of user {user}, version {version}")
        return how

    def _make(self, user: int, version: int) -> None:
        self._made[user, version] = self._passed

    def _may_be_kept(self, user: int, version: int) -> bool:
        made = self._made.get((user, version))
        return made is not None and self._passed - made < TTL

    def _score(self) -> str:
        user, version = self._any()
        answer = self.session.answer(Request(self.truths[0].inputs(user, version), user, version))
        if not answer.hits[0]:
            self._make(user, version)
        elif not self._may_be_kept(user, version):
            self.wrong.append(f"a hit of user {user}, version {version}, that cannot be kept")
        return self._hold("score", user, version, answer.scores)

    def _hit(self) -> str:
        user, version = self._any()
        try:
            scores = self.session.score(Request(self.truths[0].targets(user), user, version))
        except HistoryNeededError:
            return "history needed"
        if not self._may_be_kept(user, version):
            self.wrong.append(f"a hit of user {user}, version {version}, that cannot be kept")
        return self._hold("hit", user, version, scores)

    def _append(self) -> str:
        user, version = self._any()
        if version >= soak.LONGEST:
            return "nothing to append"
        if not self.session.append(user, self.truths[0].event(user, version), version + 1, after=version):
            return "append to nothing"
        self._make(user, version + 1)  # at the latest: it may have been there
        try:
            scores = self.session.score(Request(self.truths[0].targets(user), user, version + 1))
        except HistoryNeededError:
            self.wrong.append(f"user {user}, version {version + 1}: appended and not kept")
            return "append"
        return self._hold("append", user, version + 1, scores)

    def _amend(self) -> str:
        """A wrong event in the place of one, and the right one back."""
        user, version = self._any()
        at, wrong = -self.rng.randint(1, min(version, self.session.manifest.max_history or version)), next(self._names)
        true, false = (self.truths[0].event(u, version + at) for u in (user, (user + 1) % USERS))
        if not self.session.amend(user, false, wrong, at=at, after=version):
            return "amend nothing"
        targets = Request(self.truths[0].targets(user), user, wrong)
        # Some events change a score by little more than rounding does.
        if self.truths[self._served].right(user, version, self.session.score(targets), 1e-6):
            self.wrong.append(f"user {user}, version {version}: scored as if nothing was amended")
        if not self.session.amend(user, true, version, at=at, after=wrong):
            self.wrong.append(f"user {user}, version {version}: what was amended is not kept")
            return "amend"
        self._make(user, version)
        scores = self.session.score(Request(self.truths[0].targets(user), user, version))
        return self._hold("amend", user, version, scores)

    def _warm(self) -> str:
        user, version = self._any()
        warmed = self.session.stats().warmed
        self.session.warm(user, self.truths[0].inputs(user, version), version)
        if self.session.stats().warmed > warmed:
            self._make(user, version)
        return "warm"

    def _forget(self) -> str:
        user = self.rng.randrange(USERS)
        self.session.forget(user)
        self._made = {key: made for key, made in self._made.items() if key[0] != user}
        return "forget"

    def _swap(self) -> str:
        self._served = 1 - self._served
        self.session.swap(self.sources[self._served])
        self._made.clear()
        return "swap"

    def _pass(self) -> str:
        self._passed += self.rng.uniform(0, 1.5 * TTL)
        return "time passes"

    def _settle(self) -> str:
        """Let what waits be written: otherwise little outlives memory."""
        assert self.session._store.file is not None
        self.session._store.file.wait(60)
        return "written"

    def _damage(self) -> str:
        records = sorted(self.folder.glob("*.state"))
        if not records:
            return "nothing to damage"
        path = self.rng.choice(records)
        try:
            data = bytearray(path.read_bytes())
        except FileNotFoundError:  # evicted meanwhile, on the thread that writes
            return "nothing to damage"
        if self.rng.random() < 0.5:
            del data[self.rng.randrange(len(data)) :]
        else:
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(data)
        return "damage"

    def _restart(self) -> str:
        """A clean end, or one that leaves half a record; the next one serves what is left."""
        if clean := self.rng.random() < 0.5:
            self._end()
        else:
            file = self.session._store.file
            assert file is not None
            with file._changed:
                file._waiting.clear()
            self._end()
            (self.folder / ("0" * 40 + ".state.new")).write_bytes(b"half a record")
            (self.folder / ("f" * 40 + ".state")).write_bytes(b"stca user state 1\nhalf a record")
        if self.rng.random() < 0.3:
            self._served = 1 - self._served
            self._made.clear()
        self._load()
        return "restart" if clean else "crash"

    def _together(self) -> str:
        """Three calls at once of two users: appends, scores and states made ahead."""
        user, other = self.rng.sample(range(USERS), 2)
        version = self.rng.randint(soak.SHORTEST, soak.LONGEST - 1)
        truth, session = self.truths[0], self.session
        session.score(Request(truth.inputs(user, version), user, version))
        got: list[tuple[int, int, Array]] = []

        def score(who: int, at: int) -> None:
            got.append((who, at, session.score(Request(truth.inputs(who, at), who, at))))

        calls = (
            lambda: score(user, version),
            lambda: session.append(user, truth.event(user, version), version + 1, after=version),
            lambda: score(user, version + 1),
            lambda: session.warm(other, truth.inputs(other, version), version),
            lambda: score(other, version),
        )
        threads = [threading.Thread(target=call) for call in calls]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for who, at in ((user, version), (user, version + 1), (other, version)):
            self._make(who, at)
        if len(got) < 3:
            self.wrong.append("a call at the same time failed")
        for one in got:
            self._hold("together", *one)
        return "together"


def run(schedules: int, steps: int, seed: int) -> tuple[Counter[str], list[str]]:
    """What happened, and what was wrong.

    Args:
        schedules: each with a store of its own.
        steps: of each.
        seed: of the first; the next has the next one. The first that went wrong is the last.
    """
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        sources = [soak.GOLDEN, soak.other_weights(Path(folder, "other"))]
        truths = [soak.Truth([source]) for source in sources]
        for number in range(seed, seed + schedules):
            schedule = Schedule(sources, truths, Path(folder, f"states {number}"), random.Random(number))
            schedule.run(steps)
            counts += schedule.counts
            if schedule.wrong:
                return counts, [f"seed {number}: {what}" for what in schedule.wrong]
    return counts, []


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    p = argparse.ArgumentParser(prog="python tests/fuzz/states.py", description=__doc__, allow_abbrev=False)
    p.add_argument("--schedules", type=int, default=200, help="(%(default)s)")
    p.add_argument("--steps", type=int, default=100, help="of each (%(default)s)")
    p.add_argument("--seed", type=int, default=1, help="of the first; the next has the next one (%(default)s)")
    args = p.parse_args(argv)
    counts, wrong = run(args.schedules, args.steps, args.seed)
    for what, times in sorted(counts.items()):
        print(f"{times:7} {what}")
    for what in wrong:
        print(what)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
