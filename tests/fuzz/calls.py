"""`python tests/fuzz/calls.py`: random calls of a session, right ones, wrong ones and hostile ones.

A right request must get the scores that its one user and targets get alone; any other an error of ours on one line, and
the session must be what it was. Each round depends on the seed and its own number alone; with `--out`, the same command
goes on where it stopped. Exit codes: 0 nothing went wrong, 1 something did, 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stca import probe
from stca.errors import HistoryNeededError, StcaError
from stca.runtime import Deadline, Request, RequestBatch, Session
from stca.specs import TARGETS, TOKENS, Padding

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bundle-v1"
DTYPES = [np.dtype(t) for t in ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")]
LONGEST = 16  # events of a history that has no limit


class Raising:
    """A client's object whose every special method raises, with several lines."""

    def _raise(self, *_: object) -> Any:
        raise RuntimeError("of the\nclient's own")

    __array__ = __hash__ = __eq__ = __len__ = __iter__ = __repr__ = __str__ = __bool__ = _raise  # type: ignore[assignment]


def hostile() -> Sequence[Any]:
    """Values that no input, user, version or mapping can be."""
    return [
        None,
        True,
        "ab",
        "x\ny" * 300_000,
        b"\xff",
        10**5000,
        float("nan"),
        float("inf"),
        1e308,
        -1,
        2**63,
        2**64 - 1,
        1 << 70,
        [[1], [2, 3]],
        {"a": 1},
        {1, 2},
        object(),
        Raising(),
        [Raising()],
        lambda: 0,
        np.broadcast_to(np.int64(0), (10**13,)),
        np.broadcast_to(np.float64(0), (3, 10**12)),
        np.zeros(3, "datetime64[s]"),
        np.zeros(2, [("x" * 100_000, "i4")]),
        np.array(["a" * 1000]),
        np.ma.masked_array([1, 2], [0, 1]),
        np.zeros((1,) * 32),
        np.array(np.nan),
        np.zeros((0, 7)),
        *tensors(),
    ]


def tensors() -> list[Any]:
    """Tensors of PyTorch's that have no NumPy array, where it is installed."""
    try:
        import torch
    except ImportError:
        return []
    ones = torch.ones(3)
    return [
        ones.clone().requires_grad_(),
        ones.bfloat16(),
        torch.empty(3, device="meta"),
        ones.to_sparse(),
        torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8),
    ]


class Fuzzer:
    """A session with the names that clients give, and of each bundle that it may serve a session that keeps nothing.

    Args:
        seed: what is called, with each round's number.
        session: the one that is called; its manifest says what requests to its bundle are.
        alone: tells what a request scores by itself, by the bundle's path: the first is of the one being served, and
            the session is swapped to the others too; None is of a bundle that must not be swapped in.
        users: whose requests these are.
        bad: what no input, user, version or mapping can be.
    """

    def __init__(
        self,
        seed: int,
        session: Session,
        alone: Mapping[Path, Session | None],
        users: Sequence[Any] = ("u", 1, 2, b"u", ("u", 1), "é\n"),
        bad: Sequence[Any] = (),
    ) -> None:
        self.seed, self.session, self._bundles, self._users = seed, session, alone, users
        self.hostile = bad or hostile()
        self.names = ["x\ny" * 300_000, "nobody's", "", "history_offsets", "target_offsets", "\x1b[2J"]
        self._serve(next(iter(alone)))

    def _serve(self, path: Path) -> None:
        alone = self._bundles[path]
        assert alone is not None
        self.alone = alone
        manifest = alone.manifest
        self._specs = [s for s in manifest.graphs["request"].inputs if not s.is_offsets]
        self._offsets = {s.scope: s.name for s in manifest.graphs["request"].inputs if s.is_offsets}
        self._of = {s.name: s.scope for s in self._specs}
        of_user = [s for s in self._specs if s.scope == "user"]
        self._events = [s.name for s in of_user if s.shape[:1] == (TOKENS,)] or [s.name for s in of_user]
        self._packable = bool(self._offsets) or all(s.shape[:1] in ((1,), (TARGETS,)) for s in self._specs)

    def round(self, number: int) -> str:
        """Do one call; what kind it was.

        Raises:
            AssertionError: when a score is wrong.
            Exception: whatever the session raises and should not.
        """
        rng = random.Random(f"{self.seed}/{number}")
        return self._kinds(rng)(rng)

    def _kinds(self, rng: random.Random) -> Callable[[random.Random], str]:
        kinds = [self._right, self._right, self._by_version, self._batch, self._append, self._amend, self._late]
        kinds.append(self._forget)
        if len(self._bundles) > 1:
            kinds.append(self._swap)
        return rng.choice(kinds) if rng.random() < 0.5 else rng.choice(self._spoilt())

    def _spoilt(self) -> list[Callable[[random.Random], str]]:
        return [self._wrong, self._wrong, self._wrong_batch, self._wrong_append, self._key]

    def _inputs(self, rng: random.Random) -> dict[str, Any]:
        manifest = self.alone.manifest
        tokens, targets = rng.randint(manifest.min_history or 0, manifest.max_history or LONGEST), rng.randint(0, 6)
        made: dict[str, Any] = probe.single(self._specs, tokens, targets, np.random.default_rng(rng.getrandbits(32)))
        for name, x in made.items():
            if x.dtype.kind == "f":  # so that sums of several are exact
                made[name] = np.round(x * 4) / 4
        for padding in manifest.padding or ():
            self._unpad(rng, padding, made)
        return {n: x.tolist() if x.dtype.kind == "i" and rng.random() < 0.2 else x for n, x in made.items()}

    def _unpad(self, rng: random.Random, padding: Padding, made: dict[str, Any]) -> None:
        """The events alone, of a history that the session pads; what it fills in is often left out."""
        spec = next(s for s in self._specs if s.name == padding.inputs[0].name)
        size = spec.shape[padding.inputs[0].axis]
        full = size if isinstance(size, int) else LONGEST
        events = full if padding.side is None else rng.randint(0, full)
        for event in padding.inputs:
            made[event.name] = made[event.name].take(range(events), event.axis)
            if event.event is not None and rng.random() < 0.7:
                del made[event.name]
        if padding.lengths:
            made[padding.lengths][...] = events
            if events < full and rng.random() < 0.7:
                del made[padding.lengths]

    def _user(self, rng: random.Random) -> Any:
        return rng.choice(self._users)

    def _expect(self, inputs: dict[str, Any], scores: Any) -> None:
        true = self.alone.score(Request(inputs))
        assert scores.shape == true.shape, f"{scores.shape} scores, alone {true.shape}"
        assert np.allclose(scores, true, rtol=1e-5, atol=1e-6), f"scores {np.abs(scores - true).max()} apart"

    def _right(self, rng: random.Random) -> str:
        inputs = self._inputs(rng)
        user = rng.choice((None, self._user(rng)))
        self._expect(inputs, self.session.score(Request(inputs, user)))
        self._expect(inputs, self.session.score(Request(inputs, user)))
        return "right requests"

    def _by_version(self, rng: random.Random) -> str:
        """A history that is sent once, and named from then on; made ahead now and then."""
        inputs, user, version = self._inputs(rng), self._user(rng), f"v{rng.randrange(10**9)}"
        if rng.random() < 0.3:
            self.session.warm(user, {n: x for n, x in inputs.items() if self._of[n] == "user"}, version)
        self._expect(inputs, self.session.score(Request(inputs, user, version)))
        rest = {n: x for n, x in inputs.items() if self._of[n] != "user"}
        try:
            scores = self.session.score(Request(rest, user, version))
        except HistoryNeededError:
            return "states that were not kept"
        self._expect(inputs, scores)
        return "right requests by version"

    def _forget(self, rng: random.Random) -> str:
        return f"forget: {self.session.forget(self._user(rng))}"

    def _swap(self, rng: random.Random) -> str:
        path = rng.choice(list(self._bundles))
        if self._bundles[path] is None:
            return self._refused("swaps", lambda: self.session.swap(path))
        self.session.swap(path)
        self._serve(path)
        return "swaps"

    def _batch(self, rng: random.Random) -> str:
        batch, requests = self._packed(rng)
        if not self._packable:
            return self._refused("batches", lambda: self.session.score(batch))
        scores, at = self.session.score(batch), 0
        for inputs in requests:
            n = len(inputs[self._target])
            self._expect(inputs, scores[at : at + n])
            at += n
        assert at == len(scores)
        return "right batches"

    @property
    def _target(self) -> str:
        return next(s.name for s in self._specs if s.scope == "target")

    def _packed(self, rng: random.Random) -> tuple[RequestBatch, list[dict[str, Any]]]:
        """Requests as one batch; where histories have no offsets they are stacked, so as many events in each."""
        requests = [self._inputs(rng) for _ in range(rng.randint(1, 4))]
        if not self._offsets:
            users = {n: x for n, x in requests[0].items() if self._of[n] != "target"}
            requests = [{**{n: x for n, x in r.items() if self._of[n] == "target"}, **users} for r in requests]
        dtypes = {s.name: s.dtype for s in self._specs}
        packed = {
            n: np.concatenate([np.atleast_1d(np.asarray(r[n], dtypes[n])) for r in requests]) for n in requests[0]
        }
        counted = {"user": self._events, "target": [self._target]}
        for scope, name in (self._offsets or {"target": "target_offsets"}).items():
            packed[name] = np.cumsum([0, *(len(r[counted[scope or ""][0]]) for r in requests)])
        users = [self._user(rng) for _ in requests] if rng.random() < 0.5 else []
        return RequestBatch(packed, users=users), requests

    def _append(self, rng: random.Random) -> str:
        inputs, cut = self._inputs(rng), rng.randint(0, LONGEST)
        user = self._user(rng)
        first = {n: x[:cut] if n in self._events else x for n, x in inputs.items()}
        rest = {n: inputs[n][cut:] for n in self._events if n in inputs}
        if not self.alone.manifest.appendable:
            return self._refused("appends", lambda: self.session.append(user, rest, "after"))
        self._expect(first, self.session.score(Request(first, user, "before")))
        kept = self.session.append(user, rest, "after", after="before")
        targets = {n: x for n, x in inputs.items() if n not in self._events}
        self._expect(inputs, self.session.score(Request(targets if kept else inputs, user, "after")))
        self.session.forget(user)
        return "appends"

    def _amend(self, rng: random.Random) -> str:
        """Other events in the place of some; at a place where they are not all within the history, now and then."""
        inputs, others, user = self._inputs(rng), self._inputs(rng), self._user(rng)
        before, after = (f"{n}{rng.randrange(10**9)}" for n in ("before", "after"))
        if not self.alone.manifest.appendable:
            return self._refused("amendments", lambda: self.session.amend(user, {}, after, at=0))
        count = len(inputs[self._events[0]])
        rows = rng.randint(0, min(count, len(others[self._events[0]])))
        begin = rng.randint(0, count - rows)
        late = {n: others[n][:rows] for n in self._events}
        scores = self.session.score(Request(inputs, user, before))
        self._expect(inputs, scores)
        if rng.random() < 0.2:
            at = rng.choice((count - rows + 1, -count - 1, 1 << 40))
            return self._refused("amendments", lambda: self.session.amend(user, late, after, at=at, after=before))
        at = begin - count if begin < count and rng.random() < 0.5 else begin
        # Without targets nobody was encoded: an earlier history of the user may be kept.
        follows = rng.choice((None, before)) if len(scores) else before
        kept = self.session.amend(user, late, after, at=at, after=follows)
        dtypes = {s.name: s.dtype for s in self._specs}
        for n in self._events:
            parts = inputs[n][:begin], late[n], inputs[n][begin + rows :]
            inputs[n] = np.concatenate([np.asarray(x, dtypes[n]) for x in parts])
        targets = {n: x for n, x in inputs.items() if n not in self._events}
        self._expect(inputs, self.session.score(Request(targets if kept else inputs, user, after)))
        return "amendments"

    def _late(self, rng: random.Random) -> str:
        """Scores that are not wanted any more, or for long enough."""
        inputs, user, version = self._inputs(rng), self._user(rng), f"v{rng.randrange(10**9)}"
        deadline = Deadline(seconds := rng.choice((0, -1.5, 1e9, None)))
        if cancelled := rng.random() < 0.3:
            deadline.cancel()
        of_user = {n: x for n, x in inputs.items() if self._of[n] == "user"}
        warm = rng.random() < 0.3
        if cancelled or seconds in (0, -1.5):
            if warm:
                return self._refused("late", lambda: self.session.warm(user, of_user, version, deadline=deadline))
            return self._refused("late", lambda: self.session.score(Request(inputs, user, version), deadline=deadline))
        if warm:
            self.session.warm(user, of_user, version, deadline=deadline)
        self._expect(inputs, self.session.score(Request(inputs, user, version), deadline=deadline))
        return "in time"

    def _spoil(self, rng: random.Random, inputs: dict[str, Any]) -> Any:
        """Inputs with something hostile, and perhaps still right by chance."""
        bad = rng.choice(self.hostile)
        how = rng.randrange(5)
        if how == 0:
            return bad
        if how == 1:
            return inputs | {rng.choice((*self.names, 1, None)): bad}
        if how == 2:
            inputs.pop(rng.choice(list(inputs)))
            return inputs
        name = rng.choice(list(inputs))
        if how == 3:
            return inputs | {name: bad}
        x = np.array(inputs[name])
        change: Callable[[], Any] = rng.choice(
            (
                lambda: x.astype(rng.choice(DTYPES)),
                lambda: x.astype(rng.choice(DTYPES)),
                lambda: x[:-1] if x.ndim else x,
                lambda: np.concatenate([x, x, x, x + x.dtype.type(7)]) if x.ndim else x,
                lambda: x - x.dtype.type(10**9 if x.itemsize > 2 else 9),
                lambda: x[..., None],
                lambda: x[:1] if x.ndim else x,
                lambda: x.ravel(),
                lambda: x.astype(object),
                lambda: x.astype(">i8"),
                lambda: np.repeat(x, 2, -1)[..., ::2] if x.ndim else x,
            )
        )
        return inputs | {name: change()}

    def _refused(self, what: str, call: Callable[[], Any]) -> str:
        try:
            call()
        except StcaError as e:
            said = str(e)
            assert len(said.splitlines()) == 1, f"not one line: {said!r:.200}"
            assert len(said) < 1000, f"{len(said)} characters"
            assert "unexpected" not in said
            assert "\x1b" not in said
            return f"{what}: {type(e).__name__}"
        return f"{what}: taken"

    def _wrong(self, rng: random.Random) -> str:
        inputs = self._spoil(rng, self._inputs(rng))
        return self._refused("spoilt requests", lambda: self.session.score(Request(inputs, rng.choice((None, "u")))))

    def _wrong_batch(self, rng: random.Random) -> str:
        batch, _ = self._packed(rng)
        bad, place = rng.choice(self.hostile), rng.randrange(4)
        if place < 2:
            batch = RequestBatch(self._spoil(rng, dict(batch.inputs)), batch.users)
        else:
            labels = (
                bad
                if rng.random() < 0.5
                else [bad] * (len(batch.inputs[self._offsets.get("target", "target_offsets")]) - 1)
            )
            batch = RequestBatch(batch.inputs, **{("users", "versions")[place - 2]: labels})
        return self._refused("spoilt batches", lambda: self.session.score(batch))

    def _wrong_append(self, rng: random.Random) -> str:
        events = self._spoil(rng, {n: x for n, x in self._inputs(rng).items() if n in self._events})
        version = rng.choice(("v", rng.choice(self.hostile)))
        return self._refused("spoilt appends", lambda: self.session.append("u", events, version))

    def _key(self, rng: random.Random) -> str:
        inputs, bad = self._inputs(rng), rng.choice(self.hostile)
        call: Callable[[], Any] = rng.choice(
            (
                lambda: self.session.score(Request(inputs, bad)),
                lambda: self.session.score(Request(inputs, "u", bad)),
                lambda: self.session.score(Request({}, bad, bad)),
                lambda: self.session.score(bad),
                lambda: self.session.forget(bad),
                lambda: self.session.append(bad, {n: x for n, x in inputs.items() if n in self._events}, 1),
            )
        )
        return self._refused("spoilt keys", call)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rounds that were asked and not run yet; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=100_000, help="calls, some with a second one (%(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first round (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="what was found so far; read first, if there")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {"seed": args.seed, "next": args.first, "counts": {}, "wrong": []}
    if args.out and args.out.exists():
        found = json.loads(args.out.read_text(encoding="utf-8"))
        if found["seed"] != args.seed:
            parser.error(f"{args.out} is of seed {found['seed']}; give another --out")
    run(found, args.first + args.rounds, args.out)
    for name, count in sorted(found["counts"].items()):
        print(f"{count:8} {name}")
    print(f"{found['next'] - args.first} rounds, {len(found['wrong'])} wrong")
    return 1 if found["wrong"] else 0


def run(found: dict[str, Any], end: int, out: Path | None = None) -> None:
    """Rounds from `found["next"]` to `end`, what became of them into `found` and, every thousand, into `out`."""
    session, alone = (Session.load(GOLDEN, threads=1, cache_bytes=n) for n in (20_000, 0))
    fuzzer = Fuzzer(found["seed"], session, {GOLDEN: alone})
    counts = Counter(found["counts"])
    for number in range(found["next"], end):
        try:
            counts[fuzzer.round(number)] += 1
        except Exception as e:
            found["wrong"].append({"round": number, "what": f"{type(e).__name__}: {e}"[:300]})
            print(f"round {number}: {found['wrong'][-1]['what']}", file=sys.stderr, flush=True)
        found |= {"next": number + 1, "counts": dict(counts)}
        if out and (number + 1 == end or number % 1000 == 999):
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
