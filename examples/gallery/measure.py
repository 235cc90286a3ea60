"""One model through one exporter: a bundle, and its scores and times against the module's and the pointwise graph's."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from stca.arrays import Array
from stca.bundle import Bundle
from stca.checks.timing import measure
from stca.checks.tolerance import Tolerance
from stca.checks.verify import prove
from stca.errors import StcaError, told
from stca.examples.gallery import load, onnx_files
from stca.examples.gallery.declared import GalleryModel
from stca.export.pipeline import export_module, split_onnx
from stca.runtime import OnnxRuntimeEngine, Request, Session

Exporter = Literal["dynamo", "legacy", "model"]
EXPORTERS: tuple[Exporter, ...] = get_args(Exporter)

# Targets of a request-level model that are run one by one; its pointwise time is scaled up from them.
ALONE = 3
ROUNDS, SECONDS = 3, 0.1


@dataclass(frozen=True)
class Parity:
    """Served scores, from a miss and from a hit, against the module in float64 with its user copied to each target.

    The limit is the project's own: twice torch's float32 error, plus a rounding floor.
    """

    passed: bool
    max_abs: float
    limit: float


@dataclass(frozen=True)
class Row:
    """What became of a model; times in milliseconds, medians of one run on one thread.

    Attributes:
        lifted: whether a batch axis shared by user and targets was parted; None where there was none.
        state_bytes: of the kept state of one user.
        copied_bytes: of the user's inputs, copied to each target.
        cached: share of a request's work that the state saves, as the cut counts it.
        refused: why there is no bundle, or no score; nothing else is known then.
    """

    name: str
    exporter: Exporter
    style: str
    history: int
    targets: int
    parity: Parity | None = None
    lifted: bool | None = None
    state_bytes: int | None = None
    copied_bytes: int | None = None
    cached: float | None = None
    pointwise_ms: float | None = None
    miss_ms: float | None = None
    hit_ms: float | None = None
    refused: str | None = None

    @property
    def passed(self) -> bool:
        return self.parity is not None and self.parity.passed

    def as_dict(self) -> dict[str, Any]:
        """The row as plain JSON values; one that was refused has not passed."""
        return {
            **dataclasses.asdict(self),
            "parity": dataclasses.asdict(self.parity) if self.parity else {"passed": False},
        }


def row(name: str, exporter: Exporter, targets: int) -> Row:
    """Export, split, prove, serve and measure one model; a refusal is a row too."""
    model = load(name)
    empty = Row(name, exporter, model.style, model.history, targets)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return _served(model, empty, Path(folder))
        except StcaError as e:
            return dataclasses.replace(empty, refused=str(e))
        except Exception as e:
            return dataclasses.replace(empty, refused=f"unexpected {told(e)}")


def _served(model: GalleryModel, row: Row, folder: Path) -> Row:
    file = folder / "model.onnx"
    onnx_files.write(model, "legacy" if row.exporter == "legacy" else "dynamo", file)
    if row.exporter == "model":
        source = {"kind": "callable", "name": f"{type(model).__module__}:{row.name}"}
        bundle = export_module(model(), folder / "bundle", prove=prove, source=source)
    else:
        bundle = split_onnx(file, {n: i.scope for n, i in model.inputs.items()}, folder / "bundle", prove=prove)
    session = Session.load(bundle.path, threads=1)
    request = model.request(model.history, row.targets)
    parity = _parity(model, session, request, row.targets)
    pointwise, scale = _pointwise(model, OnnxRuntimeEngine(file, threads=1), request, row.targets)

    def miss() -> object:
        session.forget("measured")
        return session.score(Request(request, "measured", 0))

    times = _in_turn((pointwise, miss, lambda: session.score(Request(request, "measured", 0))))
    report = bundle.manifest.split
    work = report["user_work"] + report["request_work"] + report["target_work"]
    return dataclasses.replace(
        row,
        parity=parity,
        lifted=_lifted(model, bundle),
        state_bytes=session.stats().state_bytes // session.stats().users,
        copied_bytes=row.targets * sum(request[n].nbytes for n, i in model.inputs.items() if i.scope == "user"),
        cached=(report["user_work"] - report["recomputed_work"]) / max(1, work),
        pointwise_ms=times[0] * scale,
        miss_ms=times[1],
        hit_ms=times[2],
    )


def _parity(model: GalleryModel, session: Session, request: Mapping[str, Array], targets: int) -> Parity:
    module = model.build()
    copies = [model.rows(request, 0, targets)] if model.pointwise else [dict(request)]
    exact = np.concatenate([_torch_scores(copy.deepcopy(module).double(), c) for c in copies])
    own = np.concatenate([_torch_scores(module, c) for c in copies])
    limit = Tolerance.of(float(np.abs(own - exact).max()), [exact], float(np.finfo(np.float32).eps)).limit
    served = [_columns(session.score(Request(request, "compared", 0)), targets) for _ in ("miss", "hit")]
    if served[0].shape != exact.shape:
        return Parity(False, float("inf"), limit)
    error = max(float(np.abs(s - exact).max()) for s in served)
    return Parity(error <= limit, error, limit)


def _torch_scores(module: torch.nn.Module, feeds: Mapping[str, Array]) -> Array:
    double = next(module.parameters()).dtype == torch.float64
    tensors = {n: torch.from_numpy(x) for n, x in feeds.items()}
    with torch.no_grad():
        out = module(**{n: t.double() if double and t.is_floating_point() else t for n, t in tensors.items()})
    outputs = list(out.values()) if isinstance(out, dict) else [out]
    return np.concatenate([_columns(y.numpy(), len(y)) for y in outputs], axis=1)


def _columns(scores: Array, targets: int) -> Array:
    """Scores as `(targets, tasks)`."""
    return scores.reshape(targets, -1) if scores.size % targets == 0 else scores


def _pointwise(
    model: GalleryModel, engine: OnnxRuntimeEngine, request: Mapping[str, Array], targets: int
) -> tuple[Callable[[], object], float]:
    """What serves `targets` without this project, and what to multiply its time with.

    A pointwise graph takes one batch with the user copied to each target; a request-level one, one target at a time.
    """
    if model.pointwise:
        feeds = [model.rows(request, 0, targets)]
    else:
        feeds = [model.rows(request, i, 1) for i in range(min(ALONE, targets))]
    feeds = [{n: f[n] for n in engine.inputs} for f in feeds]
    return lambda: [engine.run(f) for f in feeds], 1.0 if model.pointwise else targets / len(feeds)


def _in_turn(stages: Sequence[Callable[[], object]]) -> list[float]:
    """Milliseconds of each stage: they take turns, so that a busy moment meets them alike."""
    times: list[list[float]] = [[] for _ in stages]
    for _ in range(ROUNDS):
        for found, run in zip(times, stages, strict=True):
            found.extend(measure(run, SECONDS, least=2))
    return [float(np.median(t)) * 1e3 for t in times]


def _lifted(model: GalleryModel, bundle: Bundle) -> bool | None:
    if not model.pointwise:
        return None
    inputs = bundle.manifest.graphs["request"].inputs
    first = {scope: {s.shape[:1] for s in inputs if s.scope == scope} for scope in ("user", "target")}
    return not first["user"] & first["target"]
