"""Are the numbers still the model's numbers? Every stage of a bundle against a float64 reference.

float64 reference → torch → request graph → joined halves → session. PyTorch's own error in the bundle's precision is
the yardstick: a later stage may be off by twice that, plus a rounding floor. A bundle without a torch module (one split
from an ONNX file) takes the request graph in ONNX Runtime as its yardstick, and the same graph in float64 as its
reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stca import probe
from stca.bundle import WEIGHTS, Bundle
from stca.errors import BundleError, ParityError
from stca.runtime import OnnxRuntimeEngine, Request, RequestBatch, Session
from stca.runtime.engine import scores_of
from stca.runtime.request import Door
from stca.types import Array, Progress

if TYPE_CHECKING:
    from torch import nn

# Requests every stage is asked: (history tokens, targets); a list of several is one ragged batch.
PROBES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 16),),
    ((1, 16),),
    ((64, 1),),
    ((1000, 300),),
    ((5, 3), (0, 2), (40, 4)),
    ((300, 3), (700, 3)),
)
TOP_K = 10


@dataclass(frozen=True)
class Tolerance:
    """How far from the reference a stage may be: twice PyTorch's own error in the precision, plus a rounding floor."""

    yardstick: float
    floor: float

    @classmethod
    def of(cls, yardstick_error: float, reference: Sequence[Array], eps: float) -> Tolerance:
        """The floor is four roundings of the largest reference value."""
        largest = max((float(np.abs(r).max()) for r in reference if r.size), default=0.0)
        return cls(yardstick_error, 4 * eps * largest)

    @property
    def limit(self) -> float:
        """Largest absolute error allowed."""
        return 2 * self.yardstick + self.floor


@dataclass(frozen=True)
class StageParity:
    """One stage against another: over all probes, the worst error, the cosine, and what a user feels of it.

    `topk_overlap` is the share of the reference's ten best targets, per request and task, that are among the stage's
    ten best; a target whose reference score is within the limit of the tenth counts as one of them.
    """

    name: str
    against: str
    max_abs: float
    max_rel: float
    cosine: float
    topk_overlap: float
    limit: float | None
    passed: bool


@dataclass(frozen=True)
class ParityReport:
    """What `verify` found."""

    passed: bool
    weights: str
    precision: str
    reference: str
    stages: tuple[StageParity, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; an error that is not finite is null."""
        stages = [dataclasses.asdict(s).items() for s in self.stages]
        plain = [{k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in s} for s in stages]
        return {**dataclasses.asdict(self), "stages": plain}

    def require(self) -> ParityReport:
        """Itself when it passed.

        Raises:
            ParityError: naming the first stage that failed, its error and the limit.
        """
        for s in self.stages:
            if not s.passed:
                raise ParityError(
                    f"stage {s.name} differs from {s.against} by {s.max_abs:.3g} (limit {s.limit:.3g}), "
                    f"top-{TOP_K} overlap {s.topk_overlap:.3f}; see `stca verify --json`"
                )
        return self


def verify(
    bundle: Bundle,
    *,
    module: nn.Module | None = None,
    probes: Sequence[Sequence[tuple[int, int]]] = PROBES,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> ParityReport:
    """Compare every stage of `bundle` with a float64 reference on random requests.

    Args:
        bundle: a loaded bundle.
        module: the torch module it was exported from, called with a dict of tensors, with the trained weights. None
            rebuilds a reference STCA from the bundle's own weights: that tells whether the graphs compute the model,
            not whether the weights are the checkpoint's, which the export has shown.
        probes: requests to ask, as batches of (history tokens, targets).
        seed: of the probes.
        progress: told each stage as it starts.
    """
    manifest = bundle.manifest
    specs = manifest.graphs["request"].inputs
    rng = np.random.default_rng(seed)
    ragged = Door(manifest).ragged
    asked = [batch for batch in probes if ragged or len(batch) == 1]
    longest = max(n for batch in asked for n, _ in batch) if manifest.max_history is None else manifest.max_history
    batches = [[probe.single(specs, min(n, longest), m, rng) for n, m in batch] for batch in asked]
    feeds = [probe.pack(specs, batch) for batch in batches]
    alone = [[probe.pack(specs, [request]) for request in batch] if len(batch) > 1 else [] for batch in batches]
    everything = [*feeds, *(f for fs in alone for f in fs)]
    sizes = [[m for _, m in batch] for batch in asked]

    outcomes: list[tuple[str, list[Array]]] = []
    if module is None and manifest.model["kind"] == "stca":
        module = rebuild(bundle)
    if module is not None:
        progress("float64 reference (torch)")
        reference_name, reference = "float64 torch", run_torch(in_form(module, "projected"), everything, "float64")
        progress("torch")
        outcomes.append(("torch", run_torch(in_form(module, manifest.attention), feeds)))
    else:
        progress("float64 reference (onnx.reference)")
        reference_name, reference = "float64 onnx.reference", run_double(bundle, everything)
    _require_apart(reference[: len(feeds)], reference[len(feeds) :], alone)
    reference = reference[: len(feeds)]
    progress("request graph")
    engines = {name: OnnxRuntimeEngine(bundle.file(name)) for name in manifest.graphs}
    outcomes.append(("request_graph", [_run(engines["request"], bundle, "request", f) for f in feeds]))
    progress("joined halves")
    outcomes.append(("joined_halves", [_run_joined(engines, bundle, f) for f in feeds]))
    progress("session")
    session = Session.load(bundle.path, engine="graphs")
    outcomes.append(("session", [_run_session(session, batch, ragged) for batch in batches]))

    for batch, scores in zip(asked, reference, strict=True):
        if not np.isfinite(scores).all():
            sizes_ = ", ".join(f"{n} history tokens and {m} targets" for n, m in batch)
            raise ParityError(
                f"the model's own scores are not finite for a request of {sizes_}, in float64 too; "
                "guard the model (a mean or softmax over an empty history, say) and export it again"
            )
    eps = float(np.finfo(np.dtype(manifest.precision)).eps)
    tolerance: Tolerance | None = None
    results: list[StageParity] = []
    for name, values in outcomes:
        found = compare(name, reference_name, values, reference, sizes, eps, tolerance)
        results.append(found)
        if tolerance is None:
            tolerance = Tolerance.of(found.max_abs, reference, eps)
    return ParityReport(
        all(s.passed for s in results), manifest.weights, manifest.precision, reference_name, tuple(results)
    )


def _require_apart(together: Sequence[Array], apart: Sequence[Array], alone: Sequence[Sequence[object]]) -> None:
    """Raise ParityError where the requests of a batch have other scores than each alone, beyond float64's rounding."""
    singles = iter(apart)
    for scores, requests in zip(together, alone, strict=True):
        parts = [next(singles) for _ in requests]
        if not parts or not scores.ndim:
            continue
        joined = np.concatenate(parts)
        scale = float(np.abs(joined[np.isfinite(joined)]).max(initial=0.0))
        if joined.shape != scores.shape or not np.allclose(joined, scores, rtol=0, atol=1e-6 * scale, equal_nan=True):
            raise ParityError(
                "a request's scores depend on the others in its batch, in the model itself, in float64 too; let every "
                "row see rows of its own request alone, which the offsets tell apart, and export it again"
            )


def prove(bundle: Bundle, module: nn.Module | None = None, *, progress: Progress = lambda _: None) -> dict[str, Any]:
    """`verify` for the end of an export: the report as JSON values.

    Raises:
        ParityError: when a stage fails, so that the export keeps its bundle to itself.
    """
    return verify(bundle, module=module, progress=progress).require().as_dict()


def compare(
    name: str,
    against: str,
    values: Sequence[Array],
    reference: Sequence[Array],
    sizes: Sequence[Sequence[int]],
    eps: float,
    tolerance: Tolerance | None,
) -> StageParity:
    """One stage's scores against the reference's, over all probes.

    The yardstick itself, which comes without a tolerance, must keep half of its precision's digits: one that lost more
    would excuse too much in the stages after it.
    """
    a, b = (np.concatenate([np.ravel(x).astype(np.float64) for x in xs]) for xs in (values, reference))
    finite = bool(np.isfinite(a).all())
    error = np.abs(a - b)
    max_abs = float(error.max(initial=0.0)) if finite else float("inf")
    max_rel = float((error / np.maximum(np.abs(b), 1e-30)).max(initial=0.0)) if finite else float("inf")
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norm if norm > 0 else 1.0
    limit = tolerance.limit if tolerance else float(np.sqrt(eps) * np.abs(b).max(initial=0.0))
    # Two scores closer than twice the error may change places: sure scores round to equal ones.
    overlap = _topk_overlap(values, reference, sizes, limit if tolerance else 2 * max_abs)
    passed = finite and max_abs <= limit and overlap == 1.0
    return StageParity(name, against, max_abs, max_rel, cosine, overlap, limit, passed)


def _topk_overlap(
    values: Sequence[Array], reference: Sequence[Array], sizes: Sequence[Sequence[int]], tie: float
) -> float:
    found = wanted = 0
    for got, true, targets in zip(values, reference, sizes, strict=True):
        if got.ndim < 1 or len(got) != sum(targets):
            continue  # outputs that are not per target have no ranking
        for start, m in zip(np.cumsum([0, *targets]), targets, strict=False):
            for task in range(got.reshape(len(got), -1).shape[1]):
                g, t = (x.reshape(len(x), -1)[start : start + m, task] for x in (got, true))
                k = min(TOP_K, m)
                best = np.argsort(-g, kind="stable")[:k]
                threshold = np.sort(t)[::-1][k - 1] - tie if k else 0.0
                found += int((t[best] >= threshold).sum())
                wanted += k
    return found / wanted if wanted else 1.0


def rebuild(bundle: Bundle) -> nn.Module:
    """The reference module of a bundle made from a checkpoint, from the bundle's own config and weights."""
    import json

    from stca.export.checkpoint import Checkpoint, read_tensors
    from stca.export.config import StcaConfig

    config = StcaConfig.from_json(json.dumps(bundle.manifest.model["config"]))
    form = bundle.manifest.attention
    if form not in ("projected", "absorbed"):
        raise BundleError(f"{bundle.path}: attention is {form!r}; expected projected or absorbed, export it anew")
    return Checkpoint(config, read_tensors(bundle.path / WEIGHTS)[0]).build(form)  # type: ignore[arg-type]


def in_form(module: nn.Module, form: str | None) -> nn.Module:
    """A reference STCA in an attention form: `projected` is the paper's own formula. Other modules as they are."""
    import copy

    from stca.export.model import Stca

    if not isinstance(module, Stca) or form not in ("projected", "absorbed"):
        return module
    module = copy.copy(module)
    module.form = form  # type: ignore[assignment]
    return module


def run_torch(module: nn.Module, feeds: Sequence[Mapping[str, Array]], dtype: str | None = None) -> list[Array]:
    """Scores of `module` in torch's `dtype` (`float64`, …), None for its own; what numpy lacks comes as float32."""
    import copy

    import torch

    model = copy.deepcopy(module).eval()
    to = getattr(torch, dtype) if dtype else None
    model = model.to(to) if to else model
    out = []
    with torch.no_grad():
        for f in feeds:
            tensors = {n: torch.from_numpy(np.ascontiguousarray(x)) for n, x in f.items()}
            if to:
                tensors = {n: t.to(to) if t.is_floating_point() else t for n, t in tensors.items()}
            y = model(tensors)
            scores = [t.float() if t.itemsize < 4 else t for t in ([y] if isinstance(y, torch.Tensor) else y)]
            out.append(scores_of([t.numpy() for t in scores]))
    return out


def run_double(bundle: Bundle, feeds: Sequence[Mapping[str, Array]]) -> list[Array]:
    import onnx
    from onnx.reference import ReferenceEvaluator

    from stca.export.to_double import to_double

    evaluator = ReferenceEvaluator(to_double(onnx.load(bundle.file("request"))))
    wide = [{n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in f.items()} for f in feeds]
    runs: list[list[Array]] = [evaluator.run(None, f) for f in wide]  # type: ignore[misc]
    return [scores_of(outputs) for outputs in runs]


def _run(engine: OnnxRuntimeEngine, bundle: Bundle, graph: str, feeds: Mapping[str, Array]) -> Array:
    wanted = [s.name for s in bundle.manifest.graphs[graph].inputs]
    outputs = engine.run({n: feeds[n] for n in wanted})
    return scores_of([outputs[s.name] for s in bundle.manifest.graphs[graph].outputs])


def _run_joined(engines: Mapping[str, OnnxRuntimeEngine], bundle: Bundle, feeds: Mapping[str, Array]) -> Array:
    wanted = [s.name for s in bundle.manifest.graphs["user_encoder"].inputs]
    state = engines["user_encoder"].run({n: feeds[n] for n in wanted})
    return _run(engines["target_scorer"], bundle, "target_scorer", {**feeds, **state})


def _run_session(session: Session, batch: Sequence[Mapping[str, Array]], ragged: bool) -> Array:
    """Through the front door, twice: the second time from kept states, which must not change a bit."""
    users = [f"user {i}" for i in range(len(batch))]
    if len(batch) == 1:
        request: Request | RequestBatch = Request(batch[0], user=users[0])
    else:
        specs = session.manifest.graphs["request"].inputs
        request = RequestBatch(probe.pack(specs, [dict(r) for r in batch]), users=users)
    miss, hit = session.score(request), session.score(request)
    # Where the two differ the stage must fail, and NaN is further from the reference than any limit.
    return np.where(miss == hit, miss, np.nan)
