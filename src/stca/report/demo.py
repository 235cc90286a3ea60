"""All of the toolkit on the checkpoint that ships with it: export, verify, quality, latency, and a report."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stca.arrays import Progress
from stca.bundle import Bundle
from stca.checks.bench import LatencyReport
from stca.errors import CheckpointError, RequestError, said
from stca.runtime import RequestBatch, Session

AUC_HISTORIES = (512, 1024, 2048, 4096, 10_000)
# Users and targets each of the AUC: enough for a standard error of about 0.002, and half a minute on two cores.
AUC_USERS, AUC_TARGETS = 64, 512


@dataclass(frozen=True)
class DemoResult:
    """Where the demo put things, and what it measured."""

    bundle: Path
    report: Path
    parity: dict[str, Any]
    auc: list[dict[str, Any]]
    latency: LatencyReport

    @property
    def summary(self) -> str:
        """A few lines for a terminal."""
        last = self.latency.ratios[-1]
        longest = [r for r in self.auc if r["history"] == self.auc[-1]["history"]]
        shortest = [r for r in self.auc if r["history"] == self.auc[0]["history"]]
        return "\n".join(
            [
                f"parity: passed, {len(self.parity['stages'])} stages against {self.parity['reference']}",
                *(
                    f"AUC {a['task']}: {a['auc']:.4f} at {a['history']} events, {b['auc']:.4f} at {b['history']}"
                    for a, b in zip(shortest, longest, strict=True)
                ),
                f"{last.history} events, {last.targets} targets: pointwise takes "
                f"{last.pointwise_over_miss or 0:.0f} times a miss, a miss {last.miss_over_hit:.1f} times a hit",
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {
            "bundle": str(self.bundle),
            "report": str(self.report),
            "parity": self.parity,
            "auc": self.auc,
            "bench": self.latency.as_dict(),
        }


def shipped_checkpoint() -> Path:
    """The trained checkpoint that ships with the project.

    Raises:
        CheckpointError: when this installation does not have it.
    """
    import stca.examples

    file = Path(next(iter(stca.examples.__path__))) / "checkpoints" / "stca_demo.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{file}: the shipped checkpoint is missing; pass --checkpoint, or train one")
    return file


def demo(
    out: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = lambda _: None,
) -> DemoResult:
    """Run everything and write `out/bundle` and `out/report.html`.

    Args:
        out: directory, made when it is not there.
        checkpoint: trained on the generated log of `stca.examples.train`; None takes the shipped one.
        progress: told each step as it starts.

    Raises:
        StcaError: from whichever step failed.
    """
    from stca.checks.verify import prove
    from stca.export.pipeline import export_checkpoint
    from stca.export.reference.checkpoint import load_checkpoint
    from stca.report.measured import report_of

    folder = Path(out)
    file = Path(checkpoint) if checkpoint is not None else shipped_checkpoint()
    loaded = load_checkpoint(file)
    bundle = export_checkpoint(
        loaded, folder / "bundle", prove=functools.partial(prove, progress=progress), progress=progress
    )
    auc, why = _quality(bundle, progress)
    target, latency = report_of(
        bundle,
        folder / "report.html",
        title="STCA demo",
        auc=auc,
        trained_history=_trained_history(loaded.metadata),
        commands=(f"stca demo --out {folder}",),
        absent={"auc": why} if why else {},
        progress=progress,
    )
    return DemoResult(bundle.path, target, dict(bundle.manifest.parity), auc, latency)


def _quality(bundle: Bundle, progress: Progress) -> tuple[list[dict[str, Any]], str]:
    """AUC on the generated log; for a model of another log none, and why."""
    from stca.examples.train.evaluate import auc_table

    session, most = Session.load(bundle.path), bundle.manifest.max_history or AUC_HISTORIES[-1]
    try:
        rows = auc_table(
            lambda inputs: session.score(RequestBatch(inputs)),
            [n for n in AUC_HISTORIES if n <= most] or [most],
            users=AUC_USERS,
            targets=AUC_TARGETS,
            progress=progress,
        )
    except (RequestError, IndexError) as e:
        why = f"No accuracy was measured: the checkpoint is not of the generated log ({said(e)})."
        progress(why)
        return [], why
    return [row.as_dict() for row in rows], ""


def _trained_history(metadata: Any) -> int | None:
    """Longest history the checkpoint says it was trained at."""
    try:
        return int(json.loads(metadata["stca.training"])["max_history"])
    except (KeyError, TypeError, ValueError):
        return None
