"""`stca inspect`: what is inside a bundle: graphs, scopes, state, sizes, costs."""

from __future__ import annotations

import argparse
import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from stca import probe
from stca.account import check_account
from stca.bundle import Bundle
from stca.commands.options import dims, emit, memory
from stca.manifest import EngineEntry, Manifest
from stca.specs import ITEM_BYTES, SUM, Padding

# What `inspect` says of an engine; --json has the rest.
_ENGINE_FACTS = ("graph", "flavour", "version", "sm", "precision", "lowering", "file", "bytes", "requests")

# Inputs named in a reason; a model may have hundreds.
_MOST_INPUTS = 6

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
    check_account(m, cut=bool(m.split))
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
    """What was decided of each input and node when the model was lifted and cut; nodes alike have one reason."""
    report = {name: told for name, told in m.split.items() if told is not None}
    lifted: Mapping[str, str] = report.get("lifted", {}).get("decisions", {})
    inputs = m.graphs["request"].inputs
    copies = {s.input: f"kept as it came, as {s.name}" for s in m.state if s.input is not None}
    lines = ["why: inputs"]
    for i in inputs:
        told = [f"scope {i.scope}", *(d[i.name] for d in (copies, lifted) if i.name in d)]
        lines.append(_line(i.name, "; ".join(told)))
    for half, when in (("user_encoder", "no state is kept"), ("target_scorer", "there is a request")):
        lines.append(f"why: nodes of the {half.replace('_', ' ')}, run when {when}")
        for r in report.get("reasons", ()):
            if r["half"] == half:
                lines += _reason(f"{r['scope']}{_from(r['inputs'])}: {r['why']}", r["nodes"])
        if half == "user_encoder" and all(s.input is not None for s in m.state):
            lines.append("  none; the state is user inputs as they came")
        if "reasons" not in report:  # of a bundle that an earlier release wrote
            names = report.get("encoder_nodes" if half == "user_encoder" else "scorer_nodes", ())
            lines += _reason("their reasons are not told; export the bundle again", names)
    if rest := [n for n in lifted if n not in {i.name for i in inputs}]:
        lines += ["why: what lifting did", *(_line(n, lifted[n]) for n in rest)]
    if tables := report.get("tables"):
        lines.append("why: tables that may leave the graphs")
        for v in tables:
            verdict = f"stays: {v['why']}" if v.get("why") else "left the graphs"
            lines.append(_line(v["table"], f"{v['bytes']:,} bytes; {verdict}"))
    return lines + _rules(report.get("rules", ()), report.get("rules_without_a_place", ()))


def _rules(verdicts: Sequence[Mapping[str, Any]], idle: Sequence[str]) -> list[str]:
    """Each rule: the nodes that it rewrote, and those that it left, with the reason."""
    nodes: dict[str, dict[str, list[str]]] = {}
    for v in verdicts:
        nodes.setdefault(v["rule"], {}).setdefault(v.get("why") or "", []).append(v["node"])
    lines = ["why: rules that free user work"] if nodes or idle else []
    for rule, by_reason in nodes.items():
        for why, names in by_reason.items():
            lines += _reason(f"{rule}: {f'left, as {why}' if why else 'rewritten'}", names)
    return lines + (_reason("nothing in the graph looks like what these rewrite", idle) if idle else [])


def _line(name: str, told: str) -> str:
    return f"  {name:<40} {told}"


def _from(inputs: Sequence[str]) -> str:
    more = f" and {len(inputs) - _MOST_INPUTS} more" if len(inputs) > _MOST_INPUTS else ""
    return f", from {', '.join(inputs[:_MOST_INPUTS])}{more}" if inputs else ""


def _reason(why: str, nodes: Sequence[str]) -> list[str]:
    """A reason, and the nodes that it is of, some on each line."""
    return [f"  {why}", *textwrap.wrap(", ".join(nodes), 112, initial_indent=" " * 6, subsequent_indent=" " * 6)]


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
    lines.append(f"history: {_limits(m)}")
    return lines + [_padding(m, p) for p in m.padding or ()]


def _limits(m: Manifest) -> str:
    """How many events a session takes."""
    inputs = m.graphs["request"].inputs
    fixed = probe.history_of(inputs, -1)
    if fixed == 0:
        return "none; no user input has a size of events"
    exact = bool(m.padding) and all(p.side is None for p in m.padding or ())
    if fixed > 0 and (exact or not m.padding):
        return f"exactly {fixed:,} events"
    most = min((n for n in (m.max_history, fixed) if n is not None and n > 0), default=None)
    limit = "no limit" if most is None else f"at most {most:,} events"
    return limit + (f", at least {m.min_history:,}" if m.min_history else "")


def _padding(m: Manifest, history: Padding) -> str:
    """How a history that is not packed is brought to the model's length, and what a request may leave out."""
    events = ", ".join(f"{e.name} with {e.value} along axis {e.axis}" for e in history.inputs)
    first = history.inputs[0]
    size = next(s.shape[first.axis] for s in m.graphs["request"].inputs if s.name == first.name)
    unpadded = f"exactly {size} events" if isinstance(size, int) else "as many events as are sent"
    side = f"padded on the {history.side} to {size} events" if history.side else unpadded
    made = [*([history.lengths] if history.lengths else []), *(e.name for e in history.inputs if e.event is not None)]
    return f"  {side}: {events}" + (f"; made when left out: {', '.join(made)}" if made else "")


def _state(m: Manifest) -> list[str]:
    appends = "can be appended" if m.appendable else "cannot be appended"
    lines = [f"user state: {sum(s.bytes_per_token for s in m.state)} bytes per token; new events {appends}"]
    for s in m.state:
        size = f"{s.bytes_per_token} bytes per token"
        if not s.bytes_per_token:
            fixed = [n for n in s.shape if isinstance(n, int)]
            size = f"{ITEM_BYTES[s.dtype] * math.prod(fixed):,} bytes" if len(fixed) == len(s.shape) else "of any size"
        size = "a sum over tokens" if s.append == SUM else size
        lines.append(f"  {s.name:<24} {s.dtype:<8} {dims(s.shape):<16} {size}")
    return lines


def _work(m: Manifest) -> list[str]:
    """What the cut buys, in operations counted from shapes."""
    split = m.split
    if not split:
        return ["the bundle does not tell of its cut; export it again to see its work and why its nodes are there"]
    user, again = split["user_work"], split["recomputed_work"]
    sizes = ", ".join(f"{name} {size:,}" for name, size in split["workload"].items())
    if (fixed := probe.history_of(m.graphs["request"].inputs, -1)) > 0:
        sizes += f"{', ' if sizes else ''}the history's {fixed:,} events"
    return [
        f"cached {100 * m.cached:.3g} % of the work of a request of {sizes}",
        f"  user {user / 1e9:.3g} GFLOP, {again / 1e9:.3g} of them redone per request; request "
        f"{split['request_work'] / 1e9:.3g}, target {split['target_work'] / 1e9:.3g}",
        *(d["text"] for d in split.get("request_dependencies", ())),
        *(f"  {note}" for note in split.get("notes", ())),
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
