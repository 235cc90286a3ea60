"""`python tests/fuzz/bundles.py`: bundles that were changed and sealed again, loaded and asked.

Each is refused in one line, or gives the scores that its two graphs give when ONNX Runtime runs them one after the
other: on a miss and a hit, and where the graphs themselves are whole, in a batch and after an append. Cases run in a
process beside this one; where it dies or hangs, that is counted, apart from graphs that ONNX Runtime dies of without a
session, too (`engine`). A case depends on its number alone. What was found goes to `--out` line by line; the same
command again goes on where it stopped. Exit codes: 0 nothing went wrong, 1 something did, 2 bad usage.
"""

from __future__ import annotations

import contextlib
import copy
import random
import resource
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import onnxruntime
import outcomes
from outcomes import Outcome

from stca import probe, typed_json
from stca.arrays import Array
from stca.errors import StcaError
from stca.runtime import Request, RequestBatch, Session
from stca.runtime.engine import scores_of
from stca.runtime.request import TARGET_OFFSETS
from stca.specs import HALVES, TOKENS, TensorSpec

TESTS = Path(__file__).resolve().parents[1]
BASES = (
    TESTS / "golden" / "bundle-v1",
    *(TESTS / "unit" / "runtime_cpp" / "golden" / n for n in ("log", "plain", "rows", "exact", "padded_left")),
)
SECONDS = 30.0
# A graph may ask for any amount of memory, and this process has no more.
MEMORY = 8 << 30
TARGETS_ASKED = 3


class Wrong(Exception):
    """What a session did and must not do."""


def look(case: str) -> Outcome:
    """What becomes of the case `BASE/NUMBER`, in this process."""
    with _made(case) as (folder, specs, rng):
        seen = _asked(case, folder, specs, rng)
        return replace(seen, said=seen.said.replace(str(folder), "BUNDLE"))


def alone(case: str) -> Outcome:
    """Run the case's graphs in ONNX Runtime without a session: whether it lives through that."""
    with _made(case) as (folder, specs, rng):
        inputs = probe.single(specs, 4, TARGETS_ASKED, np.random.default_rng(rng.randrange(1 << 30)))
        for spec in specs:
            if spec.is_offsets:
                inputs[spec.name] = np.array([0, 4 if spec.scope == "user" else TARGETS_ASKED], spec.dtype)
        for files in (("user_encoder.onnx", "target_scorer.onnx"), [f"{half}.built.onnx" for half in HALVES]):
            feeds = dict(inputs)
            with contextlib.suppress(Exception):  # whatever ONNX Runtime says to it
                for file in files:
                    feeds |= _run(folder / file, feeds)
        return Outcome(case, "served")


@contextlib.contextmanager
def _made(case: str) -> Iterator[tuple[Path, Sequence[TensorSpec], random.Random]]:
    """The case's bundle, what its requests were before it was changed, and what goes on being random."""
    base, number = case.split("/")
    rng = random.Random(case)
    manifest, files = copy.deepcopy(_base(base))
    specs = [typed_json.as_type(TensorSpec, s, "input") for s in manifest["graphs"]["request"]["inputs"]]
    if rng.random() < 0.3:
        mutations.add_engines(manifest, files)
    for _ in range(rng.randint(1, 2) if int(number) % 25 else 0):  # each 25th is whole
        with contextlib.suppress(KeyError, TypeError, AttributeError, IndexError):  # what an earlier change took away
            mutations.change(rng, manifest, files)
    with tempfile.TemporaryDirectory() as folder:
        mutations.write(Path(folder), manifest, files)
        yield Path(folder), specs, rng


def _run(file: Path, feeds: Mapping[str, Any]) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    graph = onnxruntime.InferenceSession(file, options)
    names = [o.name for o in graph.get_outputs()]
    return dict(zip(names, graph.run(names, {i.name: feeds[i.name] for i in graph.get_inputs()}), strict=True))


def _asked(case: str, folder: Path, specs: Sequence[TensorSpec], rng: random.Random) -> Outcome:
    options: dict[str, Any] = {
        "threads": 1,
        "engine": rng.choice((None, "graphs", *(["onnxruntime"] if any(folder.glob("*.built.onnx")) else []))),
        "truncate": rng.random() < 0.3,
        "cache_bytes": rng.choice((3000, 1 << 20)),
    }
    try:
        session = Session.load(folder, **options)
    except StcaError as e:
        return outcomes.refused(case, e)
    except Exception as e:
        return outcomes.unexpected(case, e)
    graphs = {n: content for n, content in _base(case.split("/")[0])[1].items() if n.endswith(".onnx")}
    whole = all((folder / n).read_bytes() == content for n, content in graphs.items())
    served = []
    for inputs in (specs, session.manifest.graphs["request"].inputs):
        try:
            caller = _Caller(session, folder, inputs, rng.randrange(1 << 30), whole)
        except (ValueError, MemoryError):  # no request can be made of what the manifest says now
            continue
        for call in (caller.alone, caller.batch, caller.append):
            try:
                served.append(call())
            except StcaError as e:
                if (found := outcomes.refused(case, e)).kind != "refused":
                    return found
            except Wrong as e:
                return Outcome(case, "wrong", f"{call.__name__}: {e}")
            except Exception as e:
                return outcomes.unexpected(case, e)
    if session.stats().bytes > session.stats().budget:
        return Outcome(case, "wrong", "more kept than the budget")
    return Outcome(case, "served" if any(served) else "refused", "(every request)")


class _Caller:
    """Requests for a session, and what the two graphs of its bundle say to them."""

    def __init__(self, session: Session, folder: Path, specs: Sequence[TensorSpec], seed: int, whole: bool) -> None:
        self.session, self.folder, self.specs, self.user = session, folder, specs, seed
        self.whole = whole  # else the graphs may see how many users there are
        manifest = session.manifest
        rng = np.random.default_rng(seed)
        longest = manifest.max_history
        self.tokens = 4 if longest is None else min(4, longest)
        self.requests = [probe.single(specs, self.tokens, TARGETS_ASKED, rng) for _ in range(2)]

    def truth(self, inputs: Mapping[str, Array]) -> Array | None:
        """Scores of the two graphs, one run after the other; None where they cannot be run on the request."""
        manifest, built = self.session.manifest, self.session._model.choice.entries
        feeds: dict[str, Any] = dict(inputs)
        for spec in self.specs:
            if spec.is_offsets:
                feeds[spec.name] = np.array([0, self.tokens if spec.scope == "user" else TARGETS_ASKED], spec.dtype)
        outputs: dict[str, Array] = {}
        for half in HALVES:
            file = self.folder / (built[half].file if half in built else manifest.graphs[half].file)
            try:
                outputs = _run(file, feeds)
            except Exception:  # whatever ONNX Runtime says to it
                return None
            feeds |= outputs
        return scores_of([outputs[o.name] for o in manifest.graphs["target_scorer"].outputs])

    def alone(self) -> bool:
        """A miss, then a hit without the user's inputs."""
        first = self.requests[0]
        self._hold(self.session.score(Request(first, self.user, 1)), [first])
        rest = {n: x for n, x in first.items() if n not in self.session._model.door.names("user")}
        kept = bool(self.session.stats().users)
        self._hold(self.session.score(Request(rest if kept else first, self.user, 1)), [first])
        return True

    def batch(self) -> bool:
        """Two users together, of a model whose inputs all have rows."""
        if any(not s.shape for s in self.specs):
            return False
        packed = probe.pack(self.specs, self.requests)
        if not any(s.is_offsets and s.scope == "target" for s in self.specs):
            packed[TARGET_OFFSETS] = np.array([0, TARGETS_ASKED, 2 * TARGETS_ASKED])
        scores = self.session.score(RequestBatch(packed))
        if self.whole:
            self._hold(scores, self.requests)
        return True

    def append(self) -> bool:
        """A history in two parts."""
        whole = self.requests[1]
        events = [s.name for s in self.specs if s.scope == "user" and s.shape[:1] == (TOKENS,)]
        if not events or not self.session.manifest.appendable:
            return False
        self.session.score(Request({n: x[:2] if n in events else x for n, x in whole.items()}, self.user, "old"))
        if self.session.append(self.user, {n: whole[n][2:] for n in events}, "new", after="old"):
            rest = {n: x for n, x in whole.items() if n not in self.session._model.door.names("user")}
            scores = self.session.score(Request(rest, self.user, "new"))
            if self.whole:
                self._hold(scores, [whole])
        return True

    def _hold(self, scores: Array, requests: Sequence[Mapping[str, Array]]) -> None:
        true = [self.truth(inputs) for inputs in requests]
        if any(t is None for t in true):
            raise Wrong(f"scores of shape {scores.shape} where ONNX Runtime refuses a half")
        expected = np.concatenate([t for t in true if t is not None])
        if scores.shape != expected.shape:
            raise Wrong(f"scores of shape {scores.shape}, the graphs give {expected.shape}")
        if not np.isfinite(scores).all():
            raise Wrong("a score is not finite")
        if not np.allclose(scores, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max(initial=1e-30))):
            raise Wrong(f"scores {float(np.abs(scores - expected).max()):.3g} apart from the graphs'")


_bases: dict[str, tuple[mutations.Manifest, mutations.Files]] = {}


def _base(name: str) -> tuple[mutations.Manifest, mutations.Files]:
    """A bundle as it is before it is changed."""
    if not _bases:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        _bases.update({folder.name: mutations.read(folder) for folder in BASES})
    return _bases[name]


def found(asked: Iterable[str]) -> Iterator[Outcome]:
    """What became of each case, in order."""
    for outcome in outcomes.outcomes(asked, look, SECONDS):
        if outcome.kind == "died":
            (again,) = outcomes.outcomes([outcome.case], alone, SECONDS)
            yield replace(outcome, kind=outcomes.ENGINE) if again.kind == "died" else outcome
        else:
            yield outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked and has not been run yet; returns the exit code."""
    return outcomes.command(
        __file__,
        found,
        argv,
        about=__doc__,
        rounds=5000,
        of="changed bundles",
        name=lambda i: f"{BASES[i % len(BASES)].name}/{i}",
    )


if __name__ == "__main__":
    sys.exit(main())
