"""A report of a bundle of one's own: the parity of its export, and latency measured here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stca import probe, report
from stca.account import check_account
from stca.arrays import Progress
from stca.bundle import Bundle
from stca.checks.bench import LatencyReport, bench
from stca.errors import StcaError
from stca.manifest import Manifest

_HISTORIES, _TARGETS = (512, 2048, 10_000), (32, 300)


def report_of(
    bundle: Bundle,
    out: str | os.PathLike[str],
    *,
    title: str | None = None,
    histories: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    seconds: float = 0.5,
    threads: int | None = None,
    on: Mapping[str, Any] | None = None,
    auc: Sequence[Mapping[str, Any]] = (),
    trained_history: int | None = None,
    commands: Sequence[str] = (),
    absent: Mapping[str, str] | None = None,
    progress: Progress = lambda _: None,
) -> tuple[Path, LatencyReport]:
    """Measure `bundle` and write the page about it.

    Args:
        bundle: a loaded bundle.
        out: the HTML file; an older one is replaced.
        title: the heading; None takes the bundle's name.
        histories, targets: sizes to measure; None takes those that `sizes` names.
        seconds, threads: as in `bench`.
        on: what else `bench` takes: engines and their settings. Charts are of the first engine.
        auc, trained_history, commands, absent: as in `ReportData`.
        progress: told each step as it starts.

    Returns:
        The page and the figures in it.

    Raises:
        StcaError: when a size cannot be served, or `out` cannot be written.
    """
    if Path(out).is_dir():  # said before the measurements, not after them
        raise StcaError(f"{out}: is a directory; name a file in it as --out")
    check_account(bundle.manifest)
    known = sizes(bundle.manifest)
    histories, targets = histories or known[0], targets or known[1]
    latency = bench(bundle, histories, targets, **(on or {}), seconds=seconds, threads=threads, progress=progress)
    progress("writing the report")
    page = report.write(
        out,
        report.ReportData(
            title=title or bundle.path.resolve().name,
            bundle=bundle,
            parity=dict(bundle.manifest.parity) if bundle.manifest.parity.get("stages") else None,
            bench=latency.as_dict(),
            auc=auc,
            trained_history=trained_history,
            commands=commands,
            absent=absent or {},
        ),
    )
    return page, latency


def sizes(manifest: Manifest) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Histories and targets worth measuring: within the bundle's limit, and one each where it cannot vary."""
    specs = manifest.graphs["request"].inputs
    rows = probe.row_sizes(specs, tokens=2, targets=3)
    varies = {scope: any(rows.get(str(n)) == k for s in specs if s.scope == scope for n in s.shape)
              for scope, k in (("user", 2), ("target", 3))}  # fmt: skip
    most = manifest.max_history
    if not varies["user"]:
        histories: tuple[int, ...] = (probe.history_of(specs, 1),)
    elif most is None or most >= _HISTORIES[-1]:
        histories = _HISTORIES
    else:
        histories = tuple(sorted({max(1, most // 16), max(1, most // 4), most}))
    return histories, _TARGETS if varies["target"] else (1,)
