"""Modules that torch's newer exporter cannot trace: the older one may, and if not, why, in one line."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from stca.plugins import onnx_function

if TYPE_CHECKING:
    from stca.export.to_onnx import RequestModel

_WAY_OUT: Final = "rewrite that, or export it with torch.onnx.export(…, dynamo=False) and run `stca split`"
_BAG_ARGUMENTS: Final = (
    "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights", "include_last_offset",
    "padding_idx",
)  # fmt: skip
_CONSTANT: Final = r"specialized it to be a constant \((\d+)\)|Constraints violated"
# What torch says, and what it means.
_CAUSES: Final = (
    (
        r"data-dependent expression|Could not extract specialized integer",
        "its code asks for the value of a tensor (in an if, .item() or a shape), which a graph does not know",
    ),
    (
        _CONSTANT,
        "its code, or a layer of torch's, turns a size that varies into a constant",
    ),
    (
        r"zeros\(\): argument 'size' failed to unpack .*FakeTensor",
        "it packs a sequence (pack_padded_sequence), whose sizes are values; give the layer the padded history, and "
        "pick its output at each length less one",
    ),
    (r"No ONNX function found for <OpOverload\(op='([\w.]+)'", "ONNX has no operator for {0}"),
)


@contextlib.contextmanager
def plain_bags() -> Iterator[None]:
    """With bags, as `nn.EmbeddingBag` takes them in rows or by offsets, summed by plain operators and no loop."""
    whole = functional.embedding_bag

    def bags(input: Tensor, weight: Tensor, offsets: Tensor | None = None, *args: Any, **given: Any) -> Tensor:
        asked = {**dict(zip(_BAG_ARGUMENTS, args, strict=False)), **given}
        if asked.get("max_norm") is not None or (input.dim() != 2 and offsets is None):
            return whole(input, weight, offsets, *args, **given)
        return _bags(input, weight, asked) if offsets is None else _bags_by_offsets(input, weight, offsets, asked)

    functional.embedding_bag = bags
    try:
        yield
    finally:
        functional.embedding_bag = whole


@contextlib.contextmanager
def as_in_training() -> Iterator[None]:
    """Without torch's fast path for attention layers in eval mode: exporters lack its operators, and where padding is
    at the end, its nested tensors come back with zeros there, whatever the layers make of padding in training."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def batch_attention(traced: torch.export.ExportedProgram) -> None:
    """Give attention over two or three axes, in place, the four that its ONNX operator has: leading axes of size 1."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    graph = traced.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=attention):
        axes = 4 - node.args[0].meta["val"].dim()
        if axes <= 0:
            continue
        with graph.inserting_before(node):
            inputs = list(node.args[:3])
            for _ in range(axes):
                inputs = [graph.call_function(torch.ops.aten.unsqueeze.default, (x, 0)) for x in inputs]
            attended = graph.call_function(attention, (*inputs, *node.args[3:]), dict(node.kwargs))
        # The node itself keeps its name, which the program's signature may have.
        node.target, node.args, node.kwargs = torch.ops.aten.squeeze.dims, (attended, list(range(axes))), {}
    traced.graph_module.recompile()


def _bags(ids: Tensor, table: Tensor, asked: Mapping[str, Any]) -> Tensor:
    """`[bags, ids]` looked up in `[rows, width]` and brought together, but for the padding: `[bags, width]`."""
    pad, mode, weights = asked.get("padding_idx"), asked.get("mode", "mean"), asked.get("per_sample_weights")
    rows = functional.embedding(ids, table)
    pad = None if pad is None else pad % table.shape[0]
    kept = (torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad)[..., None]
    if mode == "max":
        none = rows.masked_fill(~kept, -torch.inf).amax(1)
        return torch.where(kept.any(1), none, torch.zeros_like(none))
    scaled = rows * (kept if weights is None else kept * weights[..., None])
    return scaled.sum(1) / kept.sum(1).clamp(min=1) if mode == "mean" else scaled.sum(1)


def _bags_by_offsets(ids: Tensor, table: Tensor, offsets: Tensor, asked: Mapping[str, Any]) -> Tensor:
    """As `_bags` of `[ids]` of which each bag begins at its offset: by a matrix `[bags, ids]` of whose an id is."""
    pad, mode, weights = asked.get("padding_idx"), asked.get("mode", "mean"), asked.get("per_sample_weights")
    place = torch.arange(ids.shape[0], device=ids.device)
    begun = (place >= offsets[:, None]).sum(0)  # bags that begin at or before each id
    count = offsets.shape[0] - (1 if asked.get("include_last_offset") else 0)
    mine = torch.arange(1, count + 1, device=ids.device)[:, None] == begun
    kept = mine if pad is None else mine & (ids != pad % table.shape[0])
    rows = functional.embedding(ids, table)
    if mode == "max":
        none = rows.masked_fill(~kept[..., None], -torch.inf).amax(1)
        return torch.where(kept.any(1, keepdim=True), none, torch.zeros_like(none))
    total = kept.to(rows.dtype) @ (rows if weights is None else rows * weights[:, None])
    return total / kept.sum(1, keepdim=True).clamp(min=1) if mode == "mean" else total


class _Positional(nn.Module):
    """A module that takes one dict, called with the dict's values."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Scores, by the inputs in order."""
        return self.module(dict(zip(self.names, values, strict=True)))  # type: ignore[no-any-return]


def by_older_exporter(model: RequestModel, feeds: Mapping[str, Tensor], error: BaseException) -> onnx.ModelProto | None:
    """A model by torch's TorchScript exporter, in which recurrent layers take any length; None where it fails.

    What is a constant to the newer one, whose `error` this is, is one in a record too, and its line is better told.

    It records one run. Where it warns that the module's code made a constant of a value in this run, the graph is not
    taken; what it does not notice, the proof at other sizes does.
    """
    recurrent = any(isinstance(part, nn.RNNBase) for part in model.module.modules())
    if re.search(_CONSTANT, str(_innermost(error))) and not recurrent:
        return None
    names = [s.name for s in model.inputs]
    sizes = {s.name: {axis: n for axis, n in enumerate(s.shape) if isinstance(n, str)} for s in model.inputs}
    file = io.BytesIO()
    log, torch._C._jit_onnx_log = torch._C._jit_onnx_log, lambda *_: None  # which prints whole graphs on stdout
    try:
        with warnings.catch_warnings(record=True) as warned, torch.no_grad(), as_in_training():
            warnings.simplefilter("always")
            torch.onnx.export(
                _Positional(model.module, names).eval(),
                tuple(feeds[n] for n in names),
                file,  # type: ignore[arg-type]  # older than its annotation
                input_names=names,
                output_names=list(model.outputs),
                dynamic_axes=sizes,
                opset_version=onnx_function.OPSET,
                do_constant_folding=False,
                dynamo=False,
            )
    except Exception:  # torch raises many types here; the newer exporter's reason is the one told
        return None
    finally:
        torch._C._jit_onnx_log = log
    traced = [w.filename for w in warned if issubclass(w.category, torch.jit.TracerWarning)]  # type: ignore[attr-defined]
    if any(_theirs(name) for name in traced):
        return None
    return onnx.load_model_from_string(file.getvalue())


def why_untraceable(error: BaseException) -> str:
    """The innermost reason that has words, and the line of the module's own code, on one line, with the way out."""
    error = _innermost(error)
    said = str(error)
    places = re.findall(r'File "([^"]+)", line (\d+)', said)
    theirs = [(file, line) for file, line in places if _theirs(file)]
    place = f" at {theirs[-1][0]}:{theirs[-1][1]}" if theirs else ""
    reason = said.split("\n\nFrom user code")[0].split("\n\nThe following call raised")[0]
    told = f"{type(error).__name__}: {' '.join(reason.split())[:300]}"
    for pattern, meaning in _CAUSES:
        if found := re.search(pattern, said):
            told = meaning.format(*found.groups())
    return f"{told}{place}; {_WAY_OUT}"


def _innermost(error: BaseException) -> BaseException:
    inner = error.__cause__ or error.__context__
    while inner is not None:
        error, inner = inner if str(inner).strip() else error, inner.__cause__ or inner.__context__
    return error


def _theirs(file: str) -> bool:
    return "site-packages" not in file and "/torch/" not in file
