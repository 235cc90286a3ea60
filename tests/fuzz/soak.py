"""`python tests/fuzz/soak.py`: threads that score, append, forget and swap, while a process replaces the bundle.

Users' histories grow; each score must be that of the user's history, of the version that was asked, under the weights
of one of the bundles that are put there in turn. An error must be one that the caller can expect: a needed history
where none was sent, or a bundle replaced faster than it can be read. Memory is looked at each second, and compared
after a warm-up. Exit codes: 0 nothing was wrong, unexplained or growing, 1 something was, 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mutations
import numpy as np

from stca import probe
from stca.arrays import Array
from stca.errors import BundleError, HistoryNeededError
from stca.manifest import WEIGHTS
from stca.runtime import Request, RequestBatch, Session

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bundle-v1"
USERS, SHORTEST, LONGEST, TARGETS = 24, 3, 22, 4  # the bundle's longest history is 16: the rest falls off
BUDGET = 24_000  # of some two thirds of the users
# Resident memory may be so much larger at the end than after the warm-up: one part in twenty, and pages of noise.
GROWTH, NOISE = 0.05, 8 << 20
WRITER = """
import itertools, shutil, sys, time
from pathlib import Path
from stca.bundle import Bundle, writing
place, pause, sources = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
for source in itertools.cycle(sources):
    with writing(place) as (work, commit):
        manifest = Bundle.load(source).manifest
        for name in manifest.files:
            shutil.copyfile(Path(source, name), work / name)
        commit(manifest)
    time.sleep(pause)
"""


class Truth:
    """What each user's history is, and its scores under each bundle's weights."""

    def __init__(self, sources: Sequence[Path]) -> None:
        sessions = [Session.load(source, threads=1, cache_bytes=0, truncate=True) for source in sources]
        self.specs = sessions[0].manifest.graphs["request"].inputs
        self.events = [s.name for s in self.specs if s.scope == "user" and s.shape[:1] == ("N_h",)]
        self.users = [probe.single(self.specs, LONGEST, TARGETS, np.random.default_rng(u)) for u in range(USERS)]
        asked = ((u, v) for u in range(USERS) for v in range(SHORTEST, LONGEST + 1))
        self._scores = {a: [s.score(Request(self.inputs(*a))) for s in sessions] for a in asked}

    def inputs(self, user: int, version: int) -> dict[str, Array]:
        """A request of a user whose history has `version` events."""
        return {n: x[:version] if n in self.events else x for n, x in self.users[user].items()}

    def targets(self, user: int) -> dict[str, Array]:
        """The same without the history."""
        return {n: x for n, x in self.users[user].items() if n not in self.events}

    def event(self, user: int, number: int) -> Mapping[str, Array]:
        """One event of a user's history."""
        return {n: self.users[user][n][number : number + 1] for n in self.events}

    def right(self, user: int, version: int, scores: Array, off: float = 1e-4) -> bool:
        """Whether scores are those of one of the bundles, or `off` by so much of them at most."""
        true = self._scores[user, version]
        return any(scores.shape == t.shape and np.allclose(scores, t, rtol=off, atol=off / 10) for t in true)


class Soak:
    """One session, its callers' counts, and what was wrong."""

    def __init__(self, place: Path, truth: Truth, seed: int) -> None:
        self.place, self.truth, self.seed = place, truth, seed
        self.session = Session.load(place, threads=1, cache_bytes=BUDGET, truncate=True)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.unexplained: list[str] = []
        self._lock, self._ended = threading.Lock(), threading.Event()

    def run(self, threads: int, seconds: float) -> list[int]:
        """Call from so many threads for so long; resident bytes of this process, once a second."""
        callers = [threading.Thread(target=self._call, args=(i,)) for i in range(threads)]
        for caller in callers:
            caller.start()
        resident, ends = [], time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(min(1.0, seconds / 20))
            resident.append(resident_bytes())
        self._ended.set()
        for caller in callers:
            caller.join()
        return resident

    def _call(self, number: int) -> None:
        rng, counts = random.Random(f"{self.seed}/{number}"), Counter[str]()
        ways: Sequence[Callable[[random.Random], str]] = (
            *(self._score,) * 6,
            *(self._hit,) * 6,
            *(self._append,) * 4,
            *(self._batch,) * 2,
            self._forget,
        )
        while not self._ended.is_set():
            way = self._swap if rng.random() < 0.01 else rng.choice(ways)
            try:
                counts[way(rng)] += 1
            except BundleError as e:
                counts["replaced too fast" if "faster than" in str(e) else "unexplained"] += 1
                if "faster than" not in str(e):
                    self.unexplained.append(f"{type(e).__name__}: {e}"[:300])
            except Exception as e:
                counts["unexplained"] += 1
                self.unexplained.append(f"{type(e).__name__}: {e}"[:300])
        with self._lock:
            self.counts += counts

    def _any(self, rng: random.Random) -> tuple[int, int]:
        return rng.randrange(USERS), rng.randint(SHORTEST, LONGEST)

    def _hold(self, how: str, user: int, version: int, scores: Array) -> str:
        if not self.truth.right(user, version, scores):
            self.wrong.append(f"{how} of user {user}, version {version}")
        return how

    def _score(self, rng: random.Random) -> str:
        user, version = self._any(rng)
        request = Request(self.truth.inputs(user, version), user, version)
        return self._hold("score", user, version, self.session.score(request))

    def _hit(self, rng: random.Random) -> str:
        user, version = self._any(rng)
        if (held := self.session._store.find(user)) is not None:
            version = held[0].version  # type: ignore[assignment]
        try:
            scores = self.session.score(Request(self.truth.targets(user), user, version))
        except HistoryNeededError:
            return "history needed"
        return self._hold("hit", user, version, scores)

    def _append(self, rng: random.Random) -> str:
        user, version = self._any(rng)
        if (held := self.session._store.find(user)) is not None:
            version = held[0].version  # type: ignore[assignment]
        if version >= LONGEST:
            self.session.forget(user)
            return "forget"
        if not self.session.append(user, self.truth.event(user, version), version + 1, after=version):
            return "append to nothing"
        try:
            scores = self.session.score(Request(self.truth.targets(user), user, version + 1))
        except HistoryNeededError:
            return "append, gone since"
        return self._hold("append", user, version + 1, scores)

    def _batch(self, rng: random.Random) -> str:
        asked = [self._any(rng) for _ in range(3)]
        packed = probe.pack(self.truth.specs, [self.truth.inputs(*a) for a in asked])
        users, versions = zip(*asked, strict=True)
        scores = self.session.score(RequestBatch(packed, users, versions))
        for (user, version), part in zip(asked, np.split(scores, 3), strict=True):
            self._hold("batch", user, version, part)
        return "batch"

    def _forget(self, rng: random.Random) -> str:
        self.session.forget(rng.randrange(USERS))
        return "forget"

    def _swap(self, rng: random.Random) -> str:
        self.session.swap(self.place)
        return "swap"


def resident_bytes() -> int:
    """Memory of this process that is not paged out."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(resident: Sequence[int]) -> dict[str, Any]:
    """Memory after the warm-up, a fifth of the time, and at the end, each the median over a fifth."""
    part = max(1, len(resident) // 5)
    after, end = (int(statistics.median(x)) for x in (resident[part : 2 * part] or resident, resident[-part:]))
    curve = [round(statistics.median(resident[i : i + part]) / 2**20, 1) for i in range(0, len(resident), part)[:5]]
    flat = end <= after * (1 + GROWTH) + NOISE
    return {"after_warm_up": after, "at_end": end, "mib_by_fifth": curve, "flat": flat}


def other_weights(folder: Path) -> Path:
    """The golden bundle with every weight a little different."""
    manifest, files = mutations.read(GOLDEN)
    content = files[WEIGHTS]
    begin = 8 + int.from_bytes(content[:8], "little")
    files[WEIGHTS] = content[:begin] + (np.frombuffer(content[begin:], np.float32) * np.float32(1.5)).tobytes()
    folder.mkdir()
    mutations.write(folder, mutations.with_weights(manifest, files), files)
    return folder


def soak(seconds: float, threads: int, pause: float, seed: int) -> dict[str, Any]:
    """Run it, and what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        sources = [GOLDEN, other_weights(Path(folder, "other"))]
        truth, place = Truth(sources), Path(folder, "B")
        command = [sys.executable, "-c", WRITER, str(place), str(pause), *map(str, sources)]
        with subprocess.Popen(command) as writer:
            try:
                while not place.exists():
                    time.sleep(0.05)
                work = Soak(place, truth, seed)
                resident = work.run(threads, seconds)
                alive = writer.poll() is None
            finally:
                writer.kill()
    stats = work.session.stats()
    return {
        "seconds": seconds,
        "threads": threads,
        "counts": dict(sorted(work.counts.items())),
        "hits": stats.hits,
        "encodings": stats.misses,
        "evictions": stats.evictions,
        "wrong": work.wrong[:20],
        "unexplained": work.unexplained[:20] + ([] if alive else ["the writer ended"]),
        "within_budget": stats.bytes <= stats.budget,
        "memory": growth(resident),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    p = argparse.ArgumentParser(prog="python tests/fuzz/soak.py", description=__doc__, allow_abbrev=False)
    p.add_argument("--minutes", type=float, default=20.0, help="(%(default)s)")
    p.add_argument("--threads", type=int, default=16, help="(%(default)s)")
    p.add_argument("--pause", type=float, default=0.02, help="seconds between two bundles of the writer (%(default)s)")
    p.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    p.add_argument("--out", type=Path, metavar="FILE", help="where the result goes, as JSON, besides being printed")
    args = p.parse_args(argv)
    result = soak(args.minutes * 60, args.threads, args.pause, args.seed)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    good = not result["wrong"] and not result["unexplained"] and result["within_budget"] and result["memory"]["flat"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
