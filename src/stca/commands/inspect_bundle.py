"""`stca inspect`: what is inside a bundle: graphs, scopes, state, sizes, costs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping

from stca.bundle import Bundle
from stca.commands.options import dims, emit, memory
from stca.manifest import EngineEntry, Manifest, Padding, check_account

# What `inspect` says of an engine; --json has the rest.
_ENGINE_FACTS = ("graph", "flavour", "version", "sm", "precision", "lowering", "file", "bytes", "requests")

HELP = "what is inside a bundle: graphs, scopes, state, sizes, costs"
EXAMPLES = (
    "stca inspect bundle",
    "stca inspect bundle --why",
    "stca inspect bundle --json",
)


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("bundle", metavar="BUNDLE", help="directory that `stca export` or `stca split` wrote")
    p.add_argument("--why", action="store_true", help="say for each input and node what was decided")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    bundle = Bundle.load(args.bundle)
    m = bundle.manifest
    check_account(m)
    lines = [
        f"{bundle.path}: {m.model['kind']} model, {m.precision}, weights {m.weights[:12]}, "
        f"{sum(f['bytes'] for f in m.files.values()) + sum(t.bytes for t in m.tables or ()):,} bytes",
        *(f"  {name:<24} {f['bytes']:>12,} bytes" for name, f in m.files.items()),
        *_tables(m),
        *_tensors(m),
        *_state(m),
        *_work(m),
        _parity(m),
        *(line for e in m.engines for line in _engine_lines(e)),
        *(_why(m) if args.why else ()),
    ]
    emit(args, dataclasses.asdict(m), "\n".join(lines))
    return 0


def _why(m: Manifest) -> list[str]:
    """What was decided of each input and node when the model was lifted and cut; nodes in the order they run."""
    report = m.split
    lifted: Mapping[str, str] = report.get("lifted", {}).get("decisions", {})
    state = {s.name for s in m.state}
    again = set(report.get("recomputed_nodes", ()))
    encoder = report.get("encoder_nodes", ())

    def line(name: str, *facts: str) -> str:
        told = [f for f in (*facts, lifted.get(name)) if f]
        return f"  {name:<40} {'; '.join(told)}"

    kept = [s for s in m.state if s.input is not None]
    copies = {s.input: f"kept as it came, as {s.name}" for s in kept}
    lines = ["why: inputs"]
    lines += [line(i.name, f"scope {i.scope}", copies.get(i.name, "")) for i in m.graphs["request"].inputs]
    lines.append("why: nodes of the user encoder, run when no state is kept")
    lines += [
        line(n, "computed for each request too" if n in again else "", "kept" if n in state else "") for n in encoder
    ]
    lines.append("why: nodes of the target scorer, run for each request")
    lines += [
        line(n, "a user's, cheaper to compute again than to keep" if n in again else "")
        for n in report.get("scorer_nodes", ())
    ]
    nodes = {*encoder, *report.get("scorer_nodes", ()), *(i.name for i in m.graphs["request"].inputs)}
    if rest := [n for n in lifted if n not in nodes]:
        lines += ["why: values", *(line(n) for n in rest)]
    if tables := report.get("tables"):
        lines.append("why: tables that may leave the graphs")
        lines += [
            line(v["table"], f"{v['bytes']:,} bytes", f"stays: {v['why']}" if v["why"] else "left the graphs")
            for v in tables
        ]
    if rules := report.get("rules"):
        lines.append("why: rules that free user work")
        lines += [line(v["node"], f"{v['rule']}: {v['why'] or 'rewritten'}") for v in rules]
    return lines


def _tables(m: Manifest) -> list[str]:
    """The tables beside the graphs, and which ids are looked up in each."""
    lines = ["tables outside the graphs"] if m.tables else []
    for t in m.tables or ():
        ids = [f"{one.ids} in {name}" for name, g in m.graphs.items() for one in g.lookups or () if one.table == t.name]
        lines.append(f"  {t.file:<24} {t.bytes:>12,} bytes  {t.name}: {t.dtype} {dims((t.rows, t.width))}")
        lines.append(f"    looked up by {', '.join(ids)}")
    return lines


def _tensors(m: Manifest) -> list[str]:
    """What goes into the model and what comes out, with the limits that requests must keep."""
    request = m.graphs["request"]
    lines = ["inputs"]
    for i in request.inputs:
        ids = f", ids below {i.limit:,}" if i.limit else ""
        ids += f", at least {i.low:,}" if i.low is not None else ""
        ids += f", counts {i.length_of}" if i.length_of else ""
        ids += f", not all {i.blank}" if i.blank is not None else ""
        lines.append(f"  {i.name:<24} {i.dtype:<8} {dims(i.shape):<16} {i.scope}{ids}")
    lines += ["outputs", *(f"  {o.name:<24} {o.dtype:<8} {dims(o.shape)}" for o in request.outputs)]
    limit = "no limit" if m.max_history is None else f"at most {m.max_history:,} events"
    least = f", at least {m.min_history:,}" if m.min_history else ""
    lines.append(f"history: {limit}{least}")
    return lines + [_padding(m, p) for p in m.padding or ()]


def _padding(m: Manifest, history: Padding) -> str:
    """How a history that is not packed is brought to the model's length, and what a request may leave out."""
    events = ", ".join(f"{e.name} with {e.value} along axis {e.axis}" for e in history.inputs)
    first = history.inputs[0]
    size = next(s.shape[first.axis] for s in m.graphs["request"].inputs if s.name == first.name)
    unpadded = f"exactly {size} events" if isinstance(size, int) else "as many events as are sent"
    side = f"padded on the {history.side}" if history.side else unpadded
    made = [*([history.lengths] if history.lengths else []), *(e.name for e in history.inputs if e.event is not None)]
    return f"  {side}: {events}" + (f"; made when left out: {', '.join(made)}" if made else "")


def _state(m: Manifest) -> list[str]:
    appends = "can be appended" if m.appendable else "cannot be appended"
    return [
        f"user state: {m.split['bytes_per_token']} bytes per token; new events {appends}",
        *(f"  {s.name:<24} {s.dtype:<8} {dims(s.shape):<16} {s.bytes_per_token} bytes per token" for s in m.state),
    ]


def _work(m: Manifest) -> list[str]:
    """What the cut buys, in operations counted from shapes."""
    split = m.split
    user, again = split["user_work"], split["recomputed_work"]
    sizes = ", ".join(f"{name} {size:,}" for name, size in split["workload"].items())
    return [
        f"cached {100 * m.cached:.3g} % of the work of a request of {sizes}",
        f"  user {user / 1e9:.3g} GFLOP, {again / 1e9:.3g} of them redone per request; request "
        f"{split['request_work'] / 1e9:.3g}, target {split['target_work'] / 1e9:.3g}",
        *(d["text"] for d in split.get("request_dependencies", ())),
    ]


def _parity(m: Manifest) -> str:
    """What the export's own check found."""
    stages = m.parity.get("stages") or ()
    if not stages:
        return "parity: not checked at export; run `stca verify`"
    worst = max(stages, key=lambda s: s["max_abs"])
    verdict = "passed" if m.parity.get("passed") else "FAILED"
    return (
        f"parity at export: {verdict}, {len(stages)} stages against {m.parity.get('reference')}, "
        f"largest error {worst['max_abs']:.2e} ({worst['name']})"
        + "".join(f"\n  left out: {what}" for what in m.parity.get("left_out") or ())
    )


def _engine_lines(entry: EngineEntry) -> list[str]:
    """What is known of an engine: how it was made, its layers, and what memory it takes."""
    lines = [
        "engine "
        + ", ".join(f"{name} {value}" for name in _ENGINE_FACTS if (value := getattr(entry, name)) is not None)
    ]
    for profile in entry.profiles:
        lines.append("  sizes: " + ", ".join(f"{dim} {low} to {high}" for dim, (low, _, high) in profile.items()))
    if layers := entry.layers:
        counts = ", ".join(f"{kind} {n}" for kind, n in sorted(layers.items(), key=lambda x: -x[1]))
        lines.append(f"  layers before fusion: {counts}")
    if fused := entry.fused_layers:
        lines.append(f"  layers of the engine: {len(fused)}")
        lines += [f"    {layer if isinstance(layer, str) else layer.get('Name', layer)}" for layer in fused]
    if parts := entry.memory:
        lines.append(f"  {memory(parts)}")
    return lines
