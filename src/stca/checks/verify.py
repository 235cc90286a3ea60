"""Are the numbers still the model's numbers? Every stage of a bundle against a float64 reference.

float64 reference → torch → request graph → joined halves → session. PyTorch's own error in the bundle's precision is
the yardstick: a later stage may be off by twice that, plus a rounding floor (see
`Tolerance`). A bundle without a torch module (one split from an ONNX file) takes the request graph in ONNX Runtime as
its yardstick, and the same graph in float64 as its reference.
"""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from stca import probe
from stca.arrays import Array, Progress
from stca.bundle import Bundle
from stca.checks.asked import PROBES, Asked, in_neighbours, without
from stca.checks.row_by_row import in_pieces, pointwise_feeds, require_alone, some_targets
from stca.checks.tolerance import TOP_K, StageParity, judged
from stca.errors import BundleError, ExportError, ParityError, told
from stca.manifest import WEIGHTS, Manifest
from stca.pieces import pieces_of
from stca.runtime import Engine, OnnxRuntimeEngine, Request, RequestBatch, Session
from stca.runtime.engine import scores_of
from stca.runtime.tables import Lookups, RowSource, sources, with_tables
from stca.specs import HALVES, POINTWISE
from stca.tables import TableFile

if TYPE_CHECKING:
    from torch import nn

# Of each stage, its scores for each batch.
Outcomes: TypeAlias = list[tuple[str, list[Array]]]


@dataclass(frozen=True)
class ParityReport:
    """What `verify` found; `left_out` says of each request that was not compared what it was, and why."""

    passed: bool
    weights: str
    precision: str
    reference: str
    stages: tuple[StageParity, ...]
    left_out: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; an error that is not finite is null."""
        stages = [dataclasses.asdict(s).items() for s in self.stages]
        plain = [{k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in s} for s in stages]
        return {**dataclasses.asdict(self), "stages": plain}

    def require(self, *, what_next: str = "see `stca verify --json`") -> ParityReport:
        """Itself when it passed.

        Args:
            what_next: how the error ends, where the scores are finite.

        Raises:
            ParityError: naming the first stage that failed, its error and the limit.
        """
        own = self.stages[0]
        if not own.passed and np.isfinite(own.max_abs):
            raise ParityError(
                f"stage {own.name} differs from {own.against} by {own.max_abs:.3g} (limit {own.limit or 0:.3g}): the "
                f"model's own scores lose half of {self.precision}'s digits on random inputs; scale what it "
                "multiplies, or say what its inputs may hold (--ids INPUT=N, TensorSpec(limit=N, low=0))"
            )
        for s in self.stages:
            if not s.passed and not np.isfinite(s.max_abs):
                raise ParityError(
                    f"stage {s.name} has scores that are not finite: the weights overflow {self.precision}; export an "
                    "earlier step"
                )
            if not s.passed:
                raise ParityError(
                    f"stage {s.name} differs from {s.against} by {s.max_abs:.3g} (limit {s.limit:.3g}), "
                    f"top-{TOP_K} overlap {s.topk_overlap:.3f}; {what_next}"
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
    asked = Asked.of(manifest, probes, seed, few_copies=POINTWISE in manifest.graphs and module is not None)
    rows = sources(bundle)  # once for all stages: each checks the blocks that it looks into
    name, reference, outcomes = _reference(bundle, module, asked, rows, progress)
    outcomes += (served := _served(bundle, asked, rows, progress))
    left_out: list[str] = []
    for i, why in asked.optional:
        if asked.beyond(i, outcomes[0][1], reference, manifest.precision):
            left_out.append(why)
            outcomes = [(stage, without(scores, i)) for stage, scores in outcomes]
            asked, reference = asked.without(i), without(reference, i)
    _require_finite(asked, reference)

    quantized = [] if manifest.rounding is None else outcomes[1 - len(served) :]  # all but the request graph
    exact = outcomes[: len(outcomes) - len(quantized)]
    judge = functools.partial(judged, exact, name, reference, asked.targets, manifest.precision)
    results = judge()
    if manifest.precision == "float32" and not all(s.passed for s in results[1:]):
        from stca.checks.plain_sums import plain_error

        progress("every sum term after term")
        complete = Lookups(bundle, "request", rows).complete
        results = judge(plain_error(bundle.file("request"), [*map(complete, asked.feeds)]))
    if quantized:
        from stca.checks.quantized import judged_quantized

        progress("the quantized state in float64")
        results += judged_quantized(bundle, asked.feeds, quantized, name, reference, asked.targets)
    return ParityReport(
        all(s.passed for s in results), manifest.weights, manifest.precision, name, tuple(results), tuple(left_out)
    )


def _reference(
    bundle: Bundle, module: nn.Module | None, asked: Asked, rows: Mapping[str, RowSource], progress: Progress
) -> tuple[str, list[Array], Outcomes]:
    """What the stages are held against: its name and scores, and the module's own scores where there is one."""
    manifest = bundle.manifest
    if module is None and manifest.model["kind"] == "stca":
        module = rebuild(bundle)
    if module is not None and (axes := manifest.split.get("score_axes")):
        from stca.export.outputs import ByTarget

        module = ByTarget(module, list(axes.values()))
    alone = asked.apart(manifest)
    everything = [*asked.feeds, *(f for fs in alone for f in fs)]
    outcomes: Outcomes = []
    if POINTWISE in manifest.graphs:
        name, reference, outcomes = _of_lifted(bundle, module, asked.feeds, rows, progress)
    elif module is not None:
        progress("float64 reference (torch)")
        name, reference = "float64 torch", run_torch(in_form(module, "projected"), everything, "float64")
        progress("torch")
        outcomes = [("torch", run_torch(in_form(module, manifest.attention), asked.feeds))]
    else:
        progress("float64 reference (onnx.reference)")
        name, reference = "float64 onnx.reference", run_double(bundle, everything, rows=rows)
    _require_apart(reference[: len(asked.feeds)], reference[len(asked.feeds) :], alone)
    return name, reference[: len(asked.feeds)], outcomes


def _served(bundle: Bundle, asked: Asked, rows: Mapping[str, RowSource], progress: Progress) -> Outcomes:
    """Scores of the bundle's own stages: its request graph, its halves joined, a session, histories in pieces."""
    progress("request graph")
    # Each stage's engines are let go before the next one's map the same weights.
    outcomes = [("request_graph", _of_request_graph(bundle, asked, rows))]
    progress("joined halves")
    outcomes.append(("joined_halves", _of_halves(bundle, asked, rows)))
    progress("session")
    session = Session.load(bundle.path, engine="graphs", check_finite=False, tables=rows)
    outcomes.append(("session", [_run_session(session, batch) for batch in asked.batches]))
    if further := len(pieces_of(bundle.manifest)):
        progress("pieces")
        batches = [[in_neighbours(bundle.manifest, one, further) for one in batch] for batch in asked.batches]
        outcomes.append(("pieces", [np.concatenate([session.score(one) for one in batch]) for batch in batches]))
    return outcomes


def _require_finite(asked: Asked, reference: Sequence[Array]) -> None:
    for batch, scores in zip(asked.sizes, reference, strict=True):
        if not np.isfinite(scores).all():
            sizes = ", ".join(f"{n} history tokens and {m} targets" for n, m in batch)
            raise ParityError(
                f"the model's own scores are not finite for a request of {sizes}, in float64 too; "
                "guard the model (a logarithm or root of a float, a mean or softmax over an empty history, say) and "
                "export it again"
            )


def _of_lifted(
    bundle: Bundle,
    module: nn.Module | None,
    feeds: Sequence[Mapping[str, Array]],
    rows: Mapping[str, RowSource],
    progress: Progress,
) -> tuple[str, list[Array], Outcomes]:
    """What a lifted bundle is held against: its module, or its graph in float64; some targets of each request alone.

    Returns:
        The reference's name and scores, and the module's own scores where there is one.
    """
    manifest = bundle.manifest
    if module is None:
        progress("float64 reference (onnx.reference), each target alone")
        reference = in_pieces(manifest, feeds, some_targets, lambda fs: run_double(bundle, fs, rows=rows))
        require_alone(manifest, feeds, reference, lambda fs: run_double(bundle, fs, POINTWISE, rows=rows))
        return "float64 onnx.reference", reference, []
    progress("float64 reference (torch), each target alone")
    reference = run_module(manifest, module, feeds, "float64")
    require_alone(manifest, feeds, reference, lambda fs: run_torch(module, fs, "float64"))
    progress("torch")
    return "float64 torch", reference, [("torch", run_module(manifest, module, feeds))]


def run_module(
    manifest: Manifest, module: nn.Module, feeds: Sequence[Mapping[str, Array]], dtype: str | None = None
) -> list[Array]:
    """Scores of a bundle's module for each request; that of a lifted bundle is given a copy of the user per target."""
    if POINTWISE not in manifest.graphs:
        return run_torch(module, feeds, dtype)
    return in_pieces(manifest, feeds, pointwise_feeds, lambda some: run_torch(module, some, dtype))


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

    Args:
        bundle: finished, and not yet at its place.
        module: it was made from; None for an ONNX file.
        progress: told each stage as it starts.

    Raises:
        ParityError: when a stage fails, so that the export keeps its bundle to itself.
    """
    report = verify(bundle, module=module, progress=progress)
    return report.require(what_next="nothing was kept, for the exported graph is not the model").as_dict()


def rebuild(bundle: Bundle) -> nn.Module:
    """The reference module of a bundle made from a checkpoint, from the bundle's own config and weights."""
    import json

    import torch

    from stca.export.reference.checkpoint import Checkpoint, read_tensors
    from stca.export.reference.config import StcaConfig

    config = StcaConfig.from_json(json.dumps(bundle.manifest.model["config"]))
    form = bundle.manifest.attention
    if form not in ("projected", "absorbed"):
        raise BundleError(f"{bundle.path}: attention is {form!r}; expected projected or absorbed, export it anew")
    tensors = read_tensors(bundle.path / WEIGHTS)[0]
    told = bundle.manifest.quantization or {}
    for name, kind in (
        (n, told[part]["kind"]) for part in ("tables", "weights") if part in told for n in told[part]["tensors"]
    ):
        if (numbers := tensors.pop(f"{name}_{kind}", None)) is not None:
            tensors[name] = numbers.float() * tensors.pop(f"{name}_scale")
    for t in bundle.manifest.tables or ():
        if t.has_scales:
            tensors[t.name] = torch.from_numpy(TableFile(bundle.path, t).rows(np.arange(t.rows)))
            continue
        # mapped, as a checkpoint's are
        file, dtype = str(bundle.path / t.file), getattr(torch, t.dtype)
        tensors[t.name] = torch.from_file(file, size=t.rows * t.width, dtype=dtype).view(t.rows, t.width)
    return Checkpoint(config, tensors).build(form)  # type: ignore[arg-type]


def in_form(module: nn.Module, form: str | None) -> nn.Module:
    """A reference STCA in an attention form: `projected` is the paper's own formula. Other modules as they are."""
    import copy

    from stca.export.reference.module import Stca

    if not isinstance(module, Stca) or form not in ("projected", "absorbed"):
        return module
    module = copy.copy(module)
    module.form = form  # type: ignore[assignment]
    return module


def run_torch(module: nn.Module, feeds: Sequence[Mapping[str, Array]], dtype: str | None = None) -> list[Array]:
    """Scores of `module` in torch's `dtype` (`float64`, …), None for its own; what numpy lacks comes as float32."""
    import torch

    from stca.checks.in_double import InDouble, LargeRows, converted, copied
    from stca.export.modules import place_in_their_code
    from stca.export.untraceable import as_in_training

    model = copied(module)
    to = getattr(torch, dtype) if dtype else None
    model = converted(model, to) if to else model
    out = []
    with torch.no_grad(), as_in_training(), InDouble() if to == torch.float64 else LargeRows(to):
        for f in feeds:
            tensors = {n: torch.from_numpy(np.ascontiguousarray(x)) for n, x in f.items()}
            if to:
                tensors = {n: t.to(to) if t.is_floating_point() else t for n, t in tensors.items()}
            try:
                y = model(tensors)
            except Exception as e:  # the module's own code, on sizes that it was not traced with
                sizes = ", ".join(f"{n} {list(x.shape)}" for n, x in f.items())
                raise ExportError(
                    f"the model raised {told(e)}{place_in_their_code(e)} when it was called with inputs of the sizes "
                    f"{sizes}; let it take every number of events and targets, and every integer below an input's limit"
                ) from e
            scores = [t.float() if t.itemsize < 4 else t for t in ([y] if isinstance(y, torch.Tensor) else y)]
            out.append(scores_of([t.numpy() for t in scores]))
    return out


def run_double(
    bundle: Bundle,
    feeds: Sequence[Mapping[str, Array]],
    graph: str = "request",
    *,
    rows: Mapping[str, RowSource] | None = None,
) -> list[Array]:
    """Scores of one of the bundle's graphs in float64; `rows` as `stca.runtime.tables.sources` gives them."""
    from stca.export.passes.to_double import in_double
    from stca.export.tables import with_mapped_tables

    run = in_double(*with_mapped_tables(bundle.file(graph)))
    lookups = Lookups(bundle, graph, rows)
    try:
        runs = [run(lookups.complete(f)) for f in feeds]
    except Exception as e:  # numpy's and its own, of any kind
        raise ParityError(
            f"nothing can prove this bundle: {_node_of(e)}ONNX's reference implementation fails in float64 "
            f"({told(e)}); express that part of the model in other operators"
        ) from e
    return [scores_of(outputs) for outputs in runs]


def _node_of(error: Exception) -> str:
    """`at node …, ` from the frames that an error in ONNX's reference implementation went through."""
    from stca.export.analysis.scope import label

    frames = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    nodes = [node for node in (getattr(frame, "onnx_node", None) for frame in frames) if node is not None]
    return f"at node {label(nodes[0])!r} ({nodes[0].op_type}), " if nodes else ""


def _of_request_graph(bundle: Bundle, asked: Asked, rows: Mapping[str, RowSource]) -> list[Array]:
    engine = _opened(bundle, "request", rows)
    return [_run(engine, bundle, "request", f) for f in asked.feeds]


def _of_halves(bundle: Bundle, asked: Asked, rows: Mapping[str, RowSource]) -> list[Array]:
    encoder, scorer = (_opened(bundle, half, rows) for half in HALVES)
    wanted = [s.name for s in bundle.manifest.graphs["user_encoder"].inputs]
    states = ({**f, **encoder.run({n: f[n] for n in wanted})} for f in asked.feeds)
    return [_run(scorer, bundle, "target_scorer", f) for f in states]


def _opened(bundle: Bundle, graph: str, rows: Mapping[str, RowSource]) -> Engine:
    return with_tables(bundle, graph, OnnxRuntimeEngine(bundle.file(graph)), rows)


def _run(engine: Engine, bundle: Bundle, graph: str, feeds: Mapping[str, Array]) -> Array:
    wanted = [s.name for s in bundle.manifest.graphs[graph].inputs]
    outputs = engine.run({n: feeds[n] for n in wanted})
    return scores_of([outputs[s.name] for s in bundle.manifest.graphs[graph].outputs])


def _run_session(session: Session, batch: Sequence[Mapping[str, Array]]) -> Array:
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
