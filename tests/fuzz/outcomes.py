"""What became of each case of a fuzzer, and the loop that asks them: resumable, in a child that may die or hang."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from workers import Lost, answers

GOOD = ("served", "refused")
# A graph that the engine cannot live through by itself: no session can tell before.
ENGINE = "engine"
BAD = ("unexpected", "wrong", "died", "slow")


@dataclass(frozen=True)
class Outcome:
    """What became of a case: one of `GOOD` or of `BAD`, or `ENGINE`, and the words or numbers to it."""

    case: str
    kind: str
    said: str = ""


Look = Callable[[str], Outcome]


def refused(case: str, error: Exception) -> Outcome:
    """What it means that a case ended in an error of ours: refused, if it says so in one line of bounded length."""
    said = str(error)
    wrong = "\n" in said.strip() or len(said) > 1000 or "report it" in said
    return Outcome(case, "unexpected" if wrong else "refused", said)


def unexpected(case: str, error: Exception) -> Outcome:
    """An error that is not ours."""
    return Outcome(case, "unexpected", f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])


def outcomes(asked: Iterable[str], look: Look, seconds: float) -> Iterator[Outcome]:
    """What became of each case, in order."""
    for name, answer in answers(asked, look, seconds):
        if isinstance(answer, Lost):
            yield Outcome(name, "slow" if "more than" in str(answer) else "died", str(answer))
        else:
            yield answer


def run(
    asked: Sequence[str], found: Callable[[Iterable[str]], Iterator[Outcome]], out: Path | None, *, loud: bool = False
) -> int:
    """Ask what has not been asked yet, print what became of all, and return the exit code.

    Args:
        asked: names of cases.
        found: what becomes of them, in order.
        out: a JSON object a line; read first, if there.
        loud: say what became of good ones too.
    """
    done = _read(out)
    all_ = [done[n] for n in asked if n in done]
    start = time.monotonic()
    with open(out, "a", encoding="utf-8") if out else tempfile.TemporaryFile("w") as file:
        for outcome in found(n for n in asked if n not in done):
            print(json.dumps(vars(outcome)), file=file, flush=True)
            all_.append(outcome)
            if outcome.kind in BAD or loud:
                print(f"{outcome.case}: {outcome.kind}: {outcome.said}", file=sys.stderr, flush=True)
    print(summary(all_, time.monotonic() - start))
    return 1 if any(o.kind in BAD for o in all_) else 0


def command(
    file: str,
    found: Callable[[Iterable[str]], Iterator[Outcome]],
    argv: Sequence[str] | None,
    *,
    about: str | None,
    rounds: int,
    of: str,
    name: Callable[[int], str] = str,
) -> int:
    """The command of a fuzzer whose cases have numbers: run what was asked and has not been run yet.

    Args:
        file, about: the fuzzer's, for its help.
        found: see `run`.
        argv: its arguments; None for those of the process.
        rounds: how many cases there are by default.
        of: what a case is.
        name: a case's, by its number.
    """
    p = argparse.ArgumentParser(prog=f"python tests/fuzz/{Path(file).name}", description=about, allow_abbrev=False)
    p.add_argument(
        "names", nargs="*", metavar="NAME", help=f"run these alone ({name(0)}, …), and say what became of each"
    )
    p.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"{of}; default {rounds}")
    p.add_argument("--first", type=int, default=0, metavar="N", help="number of the first of them; default 0")
    p.add_argument(
        "--out", type=Path, metavar="FILE", help="what was found, a JSON object a line; read first, if there"
    )
    args = p.parse_args(argv)
    asked = args.names or [name(i) for i in range(args.first, args.first + args.rounds)]
    return run(asked, found, args.out, loud=bool(args.names))


def summary(found: Sequence[Outcome], seconds: float) -> str:
    """How many of each kind, and the refusals by their wording, the most frequent ones."""
    kinds = Counter(o.kind for o in found)
    said = Counter(_pattern(o.said) for o in found if o.kind == "refused")
    counts = ", ".join(f"{kinds[k]} {k}" for k in (*GOOD, ENGINE, *BAD))
    return "\n".join(
        [f"{len(found)} cases in {seconds:.0f} s: {counts}", *(f"{n:6} {s}" for s, n in said.most_common(40))]
    )


def _pattern(said: str) -> str:
    """A refusal without its names and numbers."""
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", re.sub(r"'[^']*'", "'…'", said))[:160]


def _read(file: Path | None) -> dict[str, Outcome]:
    if file is None or not file.exists():
        return {}
    lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return {line["case"]: Outcome(**line) for line in lines}
