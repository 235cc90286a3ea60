"""Attention as people write it, read from the mix of values upwards: `mix(softmax(… query · key …), value)`.

What lies between the two products is a list of steps on the logits. Every value is known by its source, the last one up
the graph that is no mere arrangement of another, and by the places of its elements there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from stca.export.analysis.layout import Atom, Layout, Places, Product, Tried, atoms, before, places, product, trace
from stca.export.analysis.scope import Scope, attribute, explain, label
from stca.export.passes.rules import View
from stca.export.passes.softmax import BINARY, DEEPEST, Weights, weights_of, why_not_weights

QUERY, KEY, VALUE, OUT, WEIGHTS = "query", "key", "value", "out", "weights"


class NotFused(Layout):
    """Why an attention is left as it is."""


class NoAttention(NotFused):
    """A mix by other weights than those of an attention over a history, as that of experts by a gate."""


@dataclass(frozen=True)
class Step:
    """One operation on the logits, with another value.

    Attributes:
        op: `Add`, `Sub` (of the other), `Mul`, `Div` (by the other), or `Where`.
        other: source of the other value: what is added, a factor, or the condition of a Where.
        places: of it, for each element of the softmax.
        fill: what a Where puts in place of logits.
        keeps: whether a Where keeps logits where its condition holds.
    """

    op: str
    other: str
    places: Places
    fill: str = ""
    keeps: bool = True

    @property
    def is_number(self) -> bool:
        """Whether the other value has one element, whatever the request."""
        return bool(self.places.max(initial=0) == 0)


@dataclass
class Reading:
    """What one run says of an attention. Operands are `(name, labels, source, places in it)`."""

    run: Tried
    mix: Product
    logits: Product
    weights: Weights
    to_logits: Places
    operands: dict[str, tuple[str, tuple[int, ...], str, Places]]
    steps: list[Step]

    def along(self, label_: int) -> dict[str, Places]:
        """Places of every value along one label of the mix, from the origin."""
        where: dict[int, Places] = {label_: np.arange(self.mix.size(label_, self.run))}
        name, labels, _, _ = self.operands[WEIGHTS]
        place = self.mix.at(name, labels, self.run, where)
        element = self.weights.places.ravel()[place]
        shape = self.run.shape(self.logits.out)
        of_logits = np.unravel_index(self.to_logits.ravel()[element], shape)
        coordinates = dict(zip(self.logits.out_labels, of_logits, strict=True))
        found = {role: self._operand(role, self.logits, coordinates) for role in (QUERY, KEY)}
        found[VALUE] = self._operand(VALUE, self.mix, where)
        found[OUT] = self.mix.at(self.mix.out, self.mix.out_labels, self.run, where)
        found[WEIGHTS] = element
        found.update((str(i), step.places.ravel()[element]) for i, step in enumerate(self.steps))
        found.update((f.role, f.places.ravel()[place]) for f in self.weights.factors)
        n = len(where[label_])
        return {name: np.broadcast_to(x, n) for name, x in found.items()}

    def along_depth(self, label_: int) -> dict[str, Places]:
        """Places in query and key along a label that the logits are summed over."""
        where: dict[int, Places] = {label_: np.arange(self.logits.size(label_, self.run))}
        n = len(where[label_])
        return {role: np.broadcast_to(self._operand(role, self.logits, where), n) for role in (QUERY, KEY)}

    def _operand(self, role: str, of: Product, where: Mapping[int, Places]) -> Places:
        name, labels, _, found = self.operands[role]
        return found.ravel()[of.at(name, labels, self.run, where)]


@dataclass(frozen=True)
class Attention:
    """An attention of targets over a history, with each axis of its values named.

    Attributes:
        node: that mixes the values.
        readings: in two runs.
        sources: of query, key and value.
        axes: atoms by role: `t` targets, `h` heads, `l` history, `d` depth of query and key, `e` depth of value.
        shared: whether all heads read one head of key and value.
    """

    node: onnx.NodeProto
    readings: tuple[Reading, Reading]
    sources: Mapping[str, str]
    axes: Mapping[str, list[Atom]] = field(default_factory=dict)
    shared: bool = False


def read(view: View, node: onnx.NodeProto) -> Attention:
    """The attention whose values `node` mixes.

    Raises:
        NotFused, Layout: why it is none of targets over a history, in words for the model's author.
    """
    if view.scopes[node.output[0]] < Scope.TARGET:
        raise NotFused("its query is the user's own: it is computed once for all targets, in the user encoder")
    first, second = (_Reader(view, run).read(node) for run in view.tried)
    sources = {role: first.operands[role][2] for role in (QUERY, KEY, VALUE)}
    for role in (KEY, VALUE):
        if view.scopes[sources[role]] == Scope.TARGET:
            path = explain(view.model, view.inputs, sources[role], Scope.TARGET)
            raise NotFused(f"its {role} {sources[role]!r} depends on target input {path[0]!r}")
    axes, shared = _axes(first, second)
    found = Attention(node, (first, second), sources, axes, shared)
    _check_steps(view, found)
    return found


class _Reader:
    def __init__(self, view: View, run: Tried) -> None:
        self.view, self.run, self.flow = view, run, view.flow
        self.blind: set[str] = set()  # values that no product was found above

    def read(self, node: onnx.NodeProto) -> Reading:
        mix = product(self.flow, self.run, node)
        if mix is None or len(mix.summed) != 1:
            raise NotFused("its weights meet the values in no product over the history")
        (weights, labels), (value, value_labels) = (mix.left, mix.left_labels), (mix.right, mix.right_labels)
        found = weights_of(self.view, self.run, weights)
        if found is None:
            (weights, labels), (value, value_labels) = (value, value_labels), (weights, labels)
            found = weights_of(self.view, self.run, weights)
        if found is None:
            if (nearly := why_not_weights(self.view, node)) is not None:
                why, of = nearly
                raise self._no(mix.left if of == mix.right else mix.right, why)
            raise NotFused("its weights are changed between the softmax and the values")
        softmax = found.softmax
        if (other := self._other_reader(softmax.output[0], weights)) is not None:
            raise NotFused(f"its weights {softmax.output[0]!r} are read elsewhere too, by {other!r}")
        steps: list[Step] = []
        climbed = self._climb(softmax.input[0], places(self.run.shape(softmax.input[0])), steps, DEEPEST)
        if climbed is None:
            above = self.view.writer(softmax.input[0])
            what = f"{label(above)!r} ({above.op_type})" if above else repr(softmax.input[0])
            raise self._no(value, f"its logits, from {what}, are no product of a query and keys")
        logits, to_logits = climbed
        operands = {WEIGHTS: (weights, labels, weights, found.places)}
        operands[VALUE] = (value, value_labels, *trace(self.flow, self.run, value))
        self._query_and_key(logits, operands, value)
        return Reading(self.run, mix, logits, found, to_logits, operands, steps)

    def _no(self, value: str, why: str) -> NotFused:
        source, _ = trace(self.flow, self.run, value)
        return (NoAttention if self.view.scopes[source] == Scope.TARGET else NotFused)(why)

    def _query_and_key(
        self, logits: Product, operands: dict[str, tuple[str, tuple[int, ...], str, Places]], value: str
    ) -> None:
        both = [
            (name, labels, *trace(self.flow, self.run, name))
            for name, labels in ((logits.left, logits.left_labels), (logits.right, logits.right_labels))
        ]
        scopes = [self.view.scopes[source] for _, _, source, _ in both]
        if Scope.CONSTANT in scopes:
            weights = both[scopes.index(Scope.CONSTANT)][2]
            raise self._no(
                value,
                f"its logits are a layer's, with weights {weights!r}, and no product of targets and history, as DIN's",
            )
        query = next((i for i, s in enumerate(scopes) if s == Scope.TARGET), None)
        if query is None:
            raise NotFused("its logits do not depend on the target")
        operands[QUERY], operands[KEY] = both[query], both[1 - query]

    def _other_reader(self, softmax: str, weights: str) -> str | None:
        """A node that reads the softmax, or what is made of it, for anything but the mix."""
        inside, _ = self.flow.needed([weights], given=[softmax])
        made = {softmax}
        for i in sorted(inside):  # not the sizes that a Reshape on the way is given
            if not made.isdisjoint(self.flow.reads[i]):
                made.update(self.view.model.graph.node[i].output)
        readers = {i for n in made - {weights} for i in self.flow.readers.get(n, ())} - inside
        readers |= set(self.flow.readers.get(weights, ())[1:])
        return label(self.view.model.graph.node[min(readers)]) if readers else None

    def _climb(self, name: str, at: Places, steps: list[Step], left: int) -> tuple[Product, Places] | None:
        """From the softmax's logits up to the product they come from; steps are those on the way, the last first."""
        node = self.view.writer(name)
        if node is None or node.domain or not left or name in self.blind:
            return None
        self.blind.add(name)
        if (found := product(self.flow, self.run, node)) is not None:
            return found, at
        if node.op_type == "Cast":
            return self._climb(node.input[0], at, steps, left - 1)
        if (step := before(node, self.run)) is not None:
            return self._climb(step[0], step[1].ravel()[at], steps, left - 1)
        if node.op_type in BINARY or node.op_type == "Where":
            ways = [0, 1] if node.op_type in BINARY else [1, 2]
            ways.sort(key=lambda i: -self.view.scopes[node.input[i]])
            for i in ways[: 1 if node.op_type == "Div" else 2]:
                mine: list[Step] = []
                if (step_ := self._step(node, i, at)) is None:
                    continue
                onward = self._across(node.input[i], node.output[0]).ravel()[at]
                if (climbed := self._climb(node.input[i], onward, mine, left - 1)) is not None:
                    steps.extend((step_, *mine))
                    return climbed
        return None

    def _across(self, name: str, out: str) -> Places:
        """Places in `name` of each element of an elementwise result `out`."""
        return np.broadcast_to(places(self.run.shape(name)), self.run.shape(out))

    def _step(self, node: onnx.NodeProto, logits: int, at: Places) -> Step | None:
        others = [n for i, n in enumerate(node.input) if i != logits]
        if node.op_type in ("Sub", "Div") and logits != 0:
            return None
        source, moved = trace(self.flow, self.run, others[0])
        found = moved.ravel()[self._across(others[0], node.output[0]).ravel()[at]]
        if node.op_type != "Where":
            return Step(node.op_type, source, found)
        fill, moved = trace(self.flow, self.run, others[1])
        if moved.max(initial=0):
            values = np.unique(self.run.values[fill])
            if len(values) != 1:
                return None
        return Step("Where", source, found, fill, keeps=logits == 1)


def _axes(first: Reading, second: Reading) -> tuple[dict[str, list[Atom]], bool]:
    """Atoms by role, and whether heads share one head of key and value."""
    axes: dict[str, list[Atom]] = {role: [] for role in "thlde"}
    (history,) = first.mix.summed
    rows: list[Atom] = []
    for one in first.mix.out_labels:
        for atom in atoms([r.along(one) for r in (first, second)]):
            s = atom.strides
            if not s[WEIGHTS] and not s[VALUE]:
                raise Layout("its result repeats values along an axis")
            role = "e" if not s[WEIGHTS] else "h" if s[KEY] or s[VALUE] else "t"
            (rows if role == "t" else axes[role]).append(atom)
    axes["l"] = atoms([r.along(history) for r in (first, second)])
    if any(a.strides[QUERY] for a in axes["l"]):
        raise NotFused("its query depends on the place in the history")
    shape, axis = first.run.shape(first.weights.softmax.input[0]), attribute(first.weights.softmax, "axis", -1)
    line, step = first.along(history)[WEIGHTS], int(np.prod(shape[axis:][1:], dtype=np.int64))
    if len(line) != shape[axis] or not np.array_equal(line, np.arange(len(line)) * step):
        raise NotFused("its softmax is not over the history")
    for one in first.logits.summed:
        for atom in atoms([r.along_depth(one) for r in (first, second)]):
            if not (atom.strides[QUERY] and atom.strides[KEY]):
                raise Layout("its query and key are summed apart")
            axes["d"].append(atom)
    runs = (first.run.targets, second.run.targets)
    own = [a for a in rows if a.sizes == runs]
    if len(own) == 1 and not axes["h"]:  # heads that share key and value look like more rows
        axes["t"], axes["h"] = own, [a for a in rows if a is not own[0]]
        return axes, True
    axes["t"] = rows
    if not rows:
        raise NotFused("its result has no row for each target")
    return axes, not axes["h"]


def _check_steps(view: View, found: Attention) -> None:
    for factor in found.readings[0].weights.factors:
        if any(a.strides[factor.role] for a in found.axes["t"]):
            raise NotFused("its weights are changed between the softmax and the values, by the target's")
        if found.shared and any(a.strides[factor.role] for a in found.axes["h"]):
            raise NotFused(f"{factor.other!r} tells apart heads that share their values")
    for i, step in enumerate(found.readings[0].steps):
        if step.is_number and step.op != "Where":
            continue
        if any(a.strides[str(i)] for a in found.axes["t"]) or view.scopes[step.other] == Scope.TARGET:
            what = "mask" if step.op == "Where" else "bias" if step.op in ("Add", "Sub") else "factor"
            raise NotFused(f"its {what} {step.other!r} depends on the target")
        if found.shared and any(a.strides[str(i)] for a in found.axes["h"]):
            raise NotFused(f"{step.other!r} tells apart heads that share their keys")
