"""From a checkpoint, a module or an ONNX file to a proven bundle: trace, split, write, prove, and only then name it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx
from torch import nn

import stca
from stca.arrays import Progress
from stca.bundle import Bundle, place_for, seal, sha256_of, writing
from stca.errors import SplitError
from stca.export.accept import (
    drop_unused,
    load_onnx,
    name_history,
    nominal_sizes,
    refuse_types,
    refuse_unservable,
    require_known,
    with_ranges,
)
from stca.export.analysis.cost import DEFAULT_WORKLOAD, Measured
from stca.export.analysis.cut import DEFAULT_FLOPS_PER_BYTE, DEFAULT_FLOPS_PER_ROW
from stca.export.analysis.growth import Growth
from stca.export.analysis.rows import dims_of
from stca.export.analysis.scope import input_scopes, require_sides, stand_ins
from stca.export.answers import answers
from stca.export.appending import Appending, appending, counts_all
from stca.export.files import finish, spec_of
from stca.export.freeing import RULES, freed_and_proven
from stca.export.lifting import lifted_and_proven
from stca.export.modules import adapted, least_history, other_in_eval
from stca.export.one_batch import of_one_request, with_one_batch
from stca.export.outputs import lay_out_by_target, name_rows, score_axes
from stca.export.padding import PadOptions
from stca.export.passes.bags import without_loops_of_bags
from stca.export.passes.by_hand import drop_idle_guards
from stca.export.passes.rules import View
from stca.export.passes.sequences import without_sequences
from stca.export.passes.spelled_out import spell_out
from stca.export.passes.squeezes import name_squeezed_axes
from stca.export.passes.whole_slices import drop_whole_slices
from stca.export.passes.zero_points import name_zero_points
from stca.export.pieces import add_pieces
from stca.export.reference.checkpoint import Checkpoint
from stca.export.reference.config import StcaConfig
from stca.export.reference.module import AttentionForm, request_inputs
from stca.export.split import Split, StateTensor, split
from stca.export.state import not_one_users
from stca.export.tables import DEFAULT_ABOVE, Large, Left, leave
from stca.export.to_onnx import RequestModel, to_request_graph
from stca.manifest import WEIGHTS, Manifest
from stca.near import did_you_mean
from stca.plugins import onnx_function
from stca.plugins.spec import DOMAIN, OP_NAME
from stca.specs import GROWER, POINTWISE, SUM, TARGETS, TOKENS, ScopeName, StateSpec, TensorSpec

# What proves a finished bundle before it gets its name, against the module it was made from (None for an ONNX file):
# returns the parity report to record, raises when it fails.
Prover = Callable[[Bundle, nn.Module | None], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class CutOptions:
    """How to cut, and what is known of the model's inputs.

    Attributes:
        workload: the nominal request to cut for, by symbolic size.
        flops_per_byte: work worth redoing per request to save a byte of state.
        ids: how many ids an input has, by its name, where the graph does not tell.
        pad: how histories are padded, where asking the model does not tell.
        lift: whether a batch axis that users and targets share is parted.
        free: whether rules rewrite the graph to free user work.
        tables_above: embedding tables of more bytes leave the graphs; None for none.
        flops_per_row: work in whose time a row of such a table is looked up.
        pieces: of a history that a graph of the bundle reads where they lie; 1 for no such graph.
    """

    workload: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict(DEFAULT_WORKLOAD))
    flops_per_byte: float = DEFAULT_FLOPS_PER_BYTE
    ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pad: PadOptions = dataclasses.field(default_factory=PadOptions)
    lift: bool = True
    free: bool = True
    tables_above: int | None = DEFAULT_ABOVE
    flops_per_row: float = DEFAULT_FLOPS_PER_ROW
    pieces: int = 1


def choose_form(config: StcaConfig, targets: int) -> AttentionForm:
    """The attention form with less work for a request of `targets` that finds no state (model.md, two exact forms).

    Per layer and history token, absorbed costs 4·m·h·d and projected 4·m·d + 4·d², so they break even at
    m = d / (h - 1). With a kept state projected always works less per request, for twice the bytes of state.
    """
    absorbed = targets * config.heads
    projected = targets + config.width
    return "absorbed" if absorbed < projected else "projected"


def export_checkpoint(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    *,
    prove: Prover,
    form: AttentionForm | Literal["auto"] = "auto",
    max_history: int | None = None,
    cut: CutOptions | None = None,
    progress: Progress = lambda _: None,
) -> Bundle:
    """A trained reference STCA → a proven bundle at `out`.

    Args:
        checkpoint: from `load_checkpoint`.
        out: directory of the bundle; an existing bundle there is replaced at the very end, or stays as it was.
        prove: runs on the finished bundle before it gets its name, with the checkpoint's own module; use
            `stca.checks.verify.prove`.
        form: attention form, or `auto` to take the one with less work at the cut's nominal request.
        max_history: longest history to serve, in tokens; None takes the config's.
        cut: how to split.
        progress: told each step as it starts.

    Raises:
        CheckpointError, ExportError, SplitError, BundleError, ParityError: one line; `out` is untouched.
    """
    config = checkpoint.config
    cut = cut or CutOptions()
    chosen = choose_form(config, cut.workload.get(TARGETS, 1)) if form == "auto" else form
    progress(f"checkpoint: {sum(t.numel() for t in checkpoint.tensors.values()):,} parameters, {chosen} attention")
    model = RequestModel(checkpoint.build(chosen), request_inputs(config))
    return export_module(
        model,
        out,
        prove=lambda bundle, _: prove(bundle, checkpoint.build("projected")),
        source={"kind": "stca", "config": json.loads(config.to_json())},
        attention=chosen,
        max_history=max_history or config.max_history,
        cut=cut,
        progress=progress,
    )


def export_module(
    model: RequestModel,
    out: str | os.PathLike[str],
    *,
    prove: Prover,
    source: Mapping[str, Any],
    attention: str | None = None,
    max_history: int | None = None,
    cut: CutOptions | None = None,
    progress: Progress = lambda _: None,
) -> Bundle:
    """Any torch module with scoped inputs → a proven bundle; see `export_checkpoint`.

    Args:
        model: the module, its inputs with their scopes, and the names of its outputs.
        out, prove, cut, progress: as in `export_checkpoint`.
        source: recorded as the manifest's `model`.
        attention: recorded as the manifest's `attention`.
        max_history: longest history to serve, in tokens; None for no limit.
    """
    place_for(out)
    progress("tracing the request graph")
    cut, model = cut or CutOptions(), adapted(model)
    require_known(model.inputs, cut.ids, cut.workload)
    large = Large(cut.tables_above)
    graph = to_request_graph(model, progress, large)
    return _write(graph, model.inputs, large, out, prove, source, attention, max_history, cut, progress, model)


def split_onnx(
    file: str | os.PathLike[str],
    scopes: Mapping[str, ScopeName],
    out: str | os.PathLike[str],
    *,
    prove: Prover,
    max_history: int | None = None,
    cut: CutOptions | None = None,
    progress: Progress = lambda _: None,
) -> Bundle:
    """Any ONNX model → a proven bundle with its two halves.

    Args:
        file: the model; external data must lie inside its directory.
        scopes: scope of each input, by name.
        out, prove, max_history, cut, progress: as in `export_module`.

    Raises:
        SplitError: when the file is no valid ONNX model, an input has no scope, or nothing can be cached.
    """
    place_for(out)
    progress("reading the model")
    cut = cut or CutOptions()
    large = Large(cut.tables_above)
    graph = load_onnx(file, large)
    names = [i.name for i in graph.graph.input]
    if unknown := [name for name in scopes if name not in names]:
        meant = did_you_mean(unknown[0], names)
        raise SplitError(f"the model has no input {unknown[0]!r}; its inputs are {', '.join(names)}{meant}")
    given = [spec_of(i) for i in graph.graph.input]
    refuse_types(given)
    require_known(given, cut.ids, cut.workload)
    specs = tuple(dataclasses.replace(s, scope=scopes.get(s.name)) for s in given)
    if any((n.domain, n.op_type) == (DOMAIN, OP_NAME) for n in graph.graph.node):
        onnx_function.attach(graph)
    return _write(graph, specs, large, out, prove, {"kind": "onnx"}, None, max_history, cut, progress)


@dataclasses.dataclass(frozen=True)
class _Request:
    """A request graph that is ready to be cut.

    Attributes:
        graph: lifted where it was pointwise, with user work freed.
        specs: of its inputs.
        pointwise: the graph as it was exported, where users and targets shared a batch axis.
        workload: nominal size of each symbolic dimension.
        measured: shapes of values as runs showed them.
        left: the tables that stand-ins are in the place of.
        facts: for the split's report.
        ruleless: the same without what the rules did, where they did anything.
    """

    graph: onnx.ModelProto
    specs: tuple[TensorSpec, ...]
    pointwise: onnx.ModelProto | None
    workload: Mapping[str, int]
    measured: Measured
    left: Left
    facts: Mapping[str, Any]
    notes: tuple[str, ...]
    ruleless: _Request | None = None


def _request_graph(
    graph: onnx.ModelProto,
    specs: tuple[TensorSpec, ...],
    large: Large,
    folder: Path,
    cut: CutOptions,
    progress: Progress,
) -> _Request:
    """Through the door, to request level, and past the rules that free user work; tables go to `folder`."""
    without_sequences(graph)
    without_loops_of_bags(graph)
    drop_whole_slices(graph)
    notes = spell_out(graph)
    drop_idle_guards(graph)
    name_zero_points(graph)
    drop_unused(graph)
    specs = with_ranges(graph, specs, cut.ids)
    left = Left()
    if large.contents:
        left = leave(graph, large, folder, progress)
    specs = with_one_batch(graph, of_one_request(graph, specs), progress) if cut.lift else specs
    name_squeezed_axes(graph, specs)
    facts: dict[str, Any] = {"tables": left.verdicts} if left.verdicts else {}
    name_rows(graph.graph, specs)
    axes = score_axes(graph.graph, specs)
    if lay_out_by_target(graph, axes):
        facts["score_axes"] = {o.name: axis for o, axis in zip(graph.graph.output, axes, strict=True)}
    refuse_unservable(graph, [spec_of(o) for o in graph.graph.output])
    specs, history = name_history(graph, specs)
    pointwise, sized = None, cut.workload
    if lifted := lifted_and_proven(graph, specs, progress) if cut.lift else None:
        pointwise = graph if lifted.shared else None
        graph, specs = lifted.model, lifted.inputs
        sized = {n: size for n, size in sized.items() if n != lifted.rows or n == TARGETS}
        facts["lifted"] = {"rows": lifted.rows, "decisions": dict(lifted.decisions)}
        if lifted.shared:
            notes += (f"lifted to request level: {lifted.rows} is one row for the user and {TARGETS} for the targets",)
    given = {TOKENS if n == history else n: size for n, size in sized.items()}
    workload, assumed = nominal_sizes(graph.graph, specs, given)
    if history != TOKENS:
        assumed = {f"{history} (the history)": workload[TOKENS], **assumed}
    if assumed:
        sizes = ", ".join(f"{n} = {size}" for n, size in assumed.items())
        progress(f"assuming {sizes}; --history, --targets and --size say otherwise")
    measured = dims_of(graph, specs)
    rules = RULES if cut.free else ()
    freed = freed_and_proven(View(graph, _scopes(specs), workload, measured), specs, progress, rules)
    if rules:
        facts["rules"] = [dataclasses.asdict(v) for v in freed.verdicts]
        facts["rules_without_a_place"] = [r.name for r in rules if r.name not in {v.rule for v in freed.verdicts}]
    plain = _Request(graph, specs, pointwise, workload, measured, left, facts, notes)
    if all(v.why for v in freed.verdicts):
        return plain
    return dataclasses.replace(plain, graph=freed.model, measured=dims_of(freed.model, specs), ruleless=plain)


def _scopes(specs: Sequence[TensorSpec]) -> dict[str, ScopeName]:
    return {s.name: s.scope for s in specs if s.scope is not None}


def _write(
    graph: onnx.ModelProto,
    specs: tuple[TensorSpec, ...],
    large: Large,
    out: str | os.PathLike[str],
    prove: Prover,
    source: Mapping[str, Any],
    attention: str | None,
    max_history: int | None,
    cut: CutOptions,
    progress: Progress,
    model: RequestModel | None = None,
) -> Bundle:
    require_sides(input_scopes(graph.graph, _scopes(specs)).values())  # sizes are assumed by scope: told before those
    with writing(out) as (work, commit):
        request = _request_graph(graph, specs, large, work, cut, progress)
        # Asked what it takes is the graph before the rules: they may leave out what refuses a request.
        asked = (request.ruleless or request).graph if request.pointwise is not None else request.graph
        takes, padded = answers(
            request.graph, asked, request.specs, max_history, cut.pad, work, progress,
            config=source["kind"] == "stca", apart=request.left.apart, least=least_history(model) if model else None,
        )  # fmt: skip
        eager = other_in_eval(model, padded.padding or ()) if model else ()
        progress("splitting by dataflow")
        free = _halves(request, cut, takes.max_history)
        appends = appending(free, request.specs)
        if appends.sums and (counts := next((p.lengths for p in padded.padding or () if p.lengths), None)):
            appends = Appending(free, counts_all(counts))
        halves = appends.halves
        found, freed = _by_rules(request, free, cut, takes.max_history)
        facts, notes = {**request.facts, **found}, [*halves.report.notes, *request.notes, *freed]
        if appends.why_not is not None:
            notes.append(f"new events cannot be appended to a state: {appends.why_not}")
        progress("writing the bundle")
        models = {"request": request.graph, "user_encoder": halves.user_encoder, "target_scorer": halves.target_scorer}
        if request.pointwise is not None:
            models[POINTWISE] = request.pointwise
        if appends.grower is not None:
            models[GROWER] = appends.grower
        notes += add_pieces(models, appends, cut.pieces)
        graphs = finish(models, request.left, padded.inputs, work)
        manifest = Manifest(
            model=source,
            weights=sha256_of(work / WEIGHTS),
            precision=graphs["request"].outputs[0].dtype,
            attention=attention,
            graphs=graphs,
            state=tuple(_state_spec(t, appends.sums) for t in halves.state),
            appendable=appends.why_not is None,
            max_history=takes.max_history,
            min_history=takes.min_history,
            padding=padded.padding,
            split={**halves.report.as_dict(), **facts, "notes": [*notes, *takes.told, *padded.told, *eager]},
            parity={},
            producer={"stca": stca.__version__, "onnx": onnx.__version__},
            tables=request.left.tables or None,
        )
        parity = prove(seal(work, manifest), model.module if model else None)
        return commit(dataclasses.replace(manifest, parity=parity))


def _by_rules(
    request: _Request, freed: Split, cut: CutOptions, max_history: int | None
) -> tuple[dict[str, int], tuple[str, ...]]:
    """What rules took off a hit's work, as a fact for the split's report and a note; nothing where they did nothing."""
    if request.ruleless is None:
        return {}, ()
    try:
        before = _halves(request.ruleless, cut, max_history).report.hit_work
    except SplitError:  # rules made it one that can be cut
        return {}, ()
    facts, after = {"hit_work_without_rules": before}, freed.report.hit_work
    if after >= before:  # attention as one operator may count more and yet move less
        return facts, ()
    return facts, (f"rules took a hit's work from {before / 1e9:.3g} to {after / 1e9:.3g} GFLOP",)


def _halves(request: _Request, cut: CutOptions, max_history: int | None) -> Split:
    """The two halves, cut for the nominal request or, where that has a longer history, for the longest served."""
    longest = {n: max_history for n in request.workload if n == TOKENS and max_history is not None}
    workload = {n: min(size, longest.get(n, size)) for n, size in request.workload.items()}
    return split(
        request.graph,
        _scopes(request.specs),
        workload=workload,
        flops_per_byte=cut.flops_per_byte,
        never=lambda model, of: not_one_users(model, of, request.specs) | stand_ins(model),
        measured=request.measured,
        shown=Growth(request.graph, request.specs, workload).at(workload),
        per_row={table.name: cut.flops_per_row for table in request.left.tables},
        verbatim=request.pointwise is not None,
    )


def _state_spec(t: StateTensor, sums: Collection[str]) -> StateSpec:
    append: Literal["sum"] | None = SUM if t.name in sums else None
    return StateSpec(t.name, t.dtype, t.shape, t.bytes_per_token, t.value if t.verbatim else None, append)
