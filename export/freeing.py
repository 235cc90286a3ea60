"""Free user-side work in a request graph by rules, each proven in float64, or leave the graph as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx

from stca import probe
from stca.arrays import Array, Progress
from stca.errors import said, told
from stca.export.analysis.cost import without_weights
from stca.export.analysis.rows import attempts, below
from stca.export.analysis.scope import label
from stca.export.passes.batch_norm import NormInLayer, NormOfLayer
from stca.export.passes.channels import ConvAsLayer, TurnedOnce
from stca.export.passes.flat import FlatApart
from stca.export.passes.flat_rows import RowsKept
from stca.export.passes.fuse import FuseAttention
from stca.export.passes.layer_norm import LayerBeforeNorm
from stca.export.passes.rules import Rule, Verdict, View, apply
from stca.export.passes.slopes import SlopeApart
from stca.export.passes.spectra import SpectrumAsProduct
from stca.export.passes.spread_sums import SumAsProduct
from stca.export.passes.sums import SumOfProducts
from stca.export.passes.to_double import distance, in_double
from stca.specs import TensorSpec

# In the order in which they are applied: a later rule sees what the earlier ones made, so that one pass mostly does.
RULES: Final[tuple[Rule, ...]] = (
    SpectrumAsProduct(),
    FuseAttention(),
    SumAsProduct(),
    FlatApart(),
    ConvAsLayer(),
    NormInLayer(),
    NormOfLayer(),
    LayerBeforeNorm(),
    TurnedOnce(),
    RowsKept(),
    SumOfProducts(),
    SlopeApart(),
)

# History tokens and targets of each request that is tried, several together where a graph takes them packed.
_TRIED: Final = (((17, 12),), ((5, 3),), ((1, 1),), ((40, 30),), ((0, 4),), ((5, 3), (0, 2), (17, 4)))
# Relative, in float64: what roundings of sums in another order stay far below, and one wrong weight far above.
_TOLERANCE: Final = 1e-9
# Times that all rules are gone through: few make anything that an earlier one finds.
_MOST_PASSES: Final = 5
# Rewrites of one rule that may be wrong before all of them are left out.
_MOST_WRONG: Final = 8


@dataclass(frozen=True)
class Freed:
    """A graph after the rules, and what each rule did or why it did nothing."""

    model: onnx.ModelProto
    verdicts: tuple[Verdict, ...]


def freed_and_proven(
    view: View, inputs: Sequence[TensorSpec], progress: Progress, rules: Sequence[Rule] = RULES
) -> Freed:
    """Apply `rules` to the graph of `view`, and keep what each makes of it if the scores stay the same in float64.

    Args:
        view: of the request graph.
        inputs: of that graph.
        progress: told of each rule that fired.
        rules: in order.
    """
    proven = [_Proven(rule, inputs) for rule in rules]
    for _ in range(_MOST_PASSES):  # a rule may find what a later one made: in any order they gain about as much
        before = view
        for rule in proven:
            view = rule.apply(view, progress)
        if view is before:
            break
    return Freed(view.model, tuple(v for rule in proven for v in rule.verdicts))


class _Proven:
    """A rule, applied one after the other, so that a rewrite that fails its proof costs itself alone."""

    def __init__(self, rule: Rule, inputs: Sequence[TensorSpec]) -> None:
        self.rule, self.inputs = rule, inputs
        self.fired: list[Verdict] = []
        self.refused: list[Verdict] = []
        self.wrong: dict[str, Verdict] = {}  # by the value that a rewritten node makes
        self.hopeless = False

    @property
    def verdicts(self) -> list[Verdict]:
        """Of every match, those that stay as they are last."""
        return [*self.fired, *self.refused, *self.wrong.values()]

    def apply(self, view: View, progress: Progress) -> View:
        """The view with what the rule rewrites and the proof lets stand; the same one where that is nothing."""
        while not self.hopeless:
            after, found = apply(self.rule, view, self.wrong)
            fired, self.refused = [v for v in found if v.why is None], [v for v in found if v.why]
            difference = _differs(view, after, self.inputs) if fired else None
            if difference is None:
                if fired:
                    progress(f"{self.rule.name}: {len(fired)} nodes rewritten")
                self.fired += fired
                return after
            self.hopeless = not difference.value or difference.value in self.wrong or len(self.wrong) == _MOST_WRONG
            if self.hopeless:
                self.refused += [Verdict(v.rule, v.node, difference.refusal) for v in fired]
            else:
                node = view.model.graph.node[view.flow.writer[difference.value]]
                self.wrong[difference.value] = Verdict(self.rule.name, label(node), difference.refusal)
        return view


@dataclass(frozen=True)
class Difference:
    """The first value in which a rewritten graph is not the graph it was, empty where it does not run, and why."""

    value: str
    why: str

    @property
    def refusal(self) -> str:
        """Why the rewrite is not kept."""
        return f"it does not keep the scores: {self.why}"


def _differs(before: View, after: View, inputs: Sequence[TensorSpec]) -> Difference | None:
    """Where the two graphs differ in float64; None when they agree.

    What a rewritten node made is compared besides the scores: those may be flat where it matters.
    """
    outputs = [o.name for o in before.model.graph.output]
    names = [*_rewritten(before.model, after.model), *outputs]
    try:
        onnx.checker.check_model(without_weights(after.model), full_check=True)
    except Exception as e:  # the checker's and the inference's own types
        return Difference("", f"the rewritten graph is no valid ONNX: {said(e)}")
    was, now = (in_double(_returning(view.model, names)) for view in (before, after))
    for integers, scale in attempts():
        proven = False
        for feeds in _requests(below(inputs, integers), scale):
            try:
                wanted = was(feeds)
            except Exception:
                continue  # it does not take such a request, rewritten or not
            try:
                found = now(feeds)
            except Exception as e:
                return Difference("", f"the rewritten graph fails: {told(e)}")
            for name, a, b in zip(names, found, wanted, strict=True):
                if (error := distance(np.asarray(a), np.asarray(b))) > _TOLERANCE:
                    what = "output" if name in outputs else "value"
                    sizes = ", ".join(f"{n} {list(x.shape)}" for n, x in feeds.items())
                    return Difference(name, f"{what} {name!r} differs by {error:.2g} of its size with {sizes}")
            proven = proven or any(np.size(x) for x in wanted)
        if proven:
            return None
    return Difference("", "the model runs with none of the requests that were tried")


def _requests(inputs: Sequence[TensorSpec], scale: int) -> Iterator[dict[str, Array]]:
    ragged, rng = any(s.is_offsets for s in inputs), np.random.default_rng(1)
    for batch in _TRIED if ragged else [b for b in _TRIED if len(b) == 1]:
        requests = [probe.single(inputs, n * scale, m, rng) for n, m in batch]
        yield probe.pack(inputs, requests)
        if batch == _TRIED[0]:
            yield probe.pack(inputs, [probe.padded(inputs, request, rng) for request in requests])
            yield probe.pack(inputs, [_without_events(inputs, request) for request in requests])


def _without_events(inputs: Sequence[TensorSpec], request: Mapping[str, Array]) -> dict[str, Array]:
    """A request in which all of a user's ids and flags are the least there is, as of a history that is masked whole."""
    made = dict(request)
    for spec in inputs:
        if spec.scope == "user" and spec.name in made and made[spec.name].dtype.kind in "biu":
            made[spec.name] = np.full_like(made[spec.name], max(spec.low or 0, 0))
    return made


def _rewritten(before: onnx.ModelProto, after: onnx.ModelProto) -> list[str]:
    """Values that both graphs make, each with another node."""
    nodes = {name: node for node in before.graph.node for name in node.output}
    return [n for node in after.graph.node for n in node.output if n in nodes and nodes[n] != node]


def _returning(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    return copy
