"""A torch module → one ONNX model of the whole request: the operator as a single node, the weights the module's own.

The exporter is torch's (`torch.export` + `torch.onnx`), told to leave the weights alone: every floating-point
initializer is a tensor of the checkpoint, by name and by bytes, which is what lets `refit` replace them later.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir
import onnx_ir.passes.common as ir_passes
import torch
from onnx_ir.passes import Sequential
from onnxscript import opset18, optimizer, values
from torch import Tensor, nn

from stca.arrays import Progress
from stca.errors import ExportError
from stca.export.one_name import inline
from stca.export.tables import Large
from stca.export.untraceable import as_in_training, batch_attention, by_older_exporter, plain_bags, why_untraceable
from stca.plugins import onnx_function, torch_op  # noqa: F401  # which registers the op in torch
from stca.plugins.spec import DOMAIN, OP_NAME, OP_VERSION
from stca.specs import OFFSETS, SCOPES, TARGETS, TOKENS, USERS, TensorSpec

_OPSET = values.Opset(DOMAIN, OP_VERSION)
_OTHERWISE_IN_TRAINING = (
    nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase, nn.RNNBase, nn.MultiheadAttention, nn.RReLU,
)  # fmt: skip


@dataclass(frozen=True)
class RequestModel:
    """A module to export and what goes in and out of it.

    Attributes:
        module: called with the inputs by name, as parameters or in one dict; returns a tensor, several in a tuple, or
            a dict, named tuple or dataclass of them.
        inputs: its inputs; each has a scope. Every symbolic size must be free to vary, 0 included.
        outputs: names of its outputs; those of a dict, named tuple or dataclass of another number are its own.
    """

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...] = ("scores",)


def check_inputs(model: RequestModel) -> None:
    """Hold a model's inputs against what an input must say of itself.

    Raises:
        ExportError: naming the first that is no `TensorSpec`, has a field of another kind, no scope, or another's name.
    """
    names: set[str] = set()
    for spec in model.inputs:
        if not isinstance(spec, TensorSpec):
            raise ExportError(
                f"RequestModel.inputs has {spec!r:.80}; expected TensorSpec(name, dtype, shape, scope), as in "
                'TensorSpec("history", "int64", ("N_h",), "user")'
            )
        if spec.scope not in SCOPES:
            raise ExportError(
                f"input {spec.name!r} has the scope {spec.scope!r:.40}; expected user (known before any request), "
                "request (one for all targets) or target (one for each)"
            )
        if spec.name in names:
            raise ExportError(f"two inputs are called {spec.name!r}; name each once")
        names.add(spec.name)


def to_request_graph(
    model: RequestModel, progress: Progress = lambda _: None, large: Large | None = None
) -> onnx.ModelProto:
    """Export `model` to ONNX, function bodies of the operator included, symbolic sizes named as in its inputs.

    Args:
        model: whose module takes one dict of named tensors.
        progress: told when torch's newer exporter cannot trace the model and the older one can, and of training mode.
        large: takes the weights that are to be kept out of the graph; None for none.

    Raises:
        ExportError: when torch cannot trace the module or ONNX has no operator for a part of it.
    """
    check_inputs(model)
    others = (part for part in model.module.modules() if isinstance(part, _OTHERWISE_IN_TRAINING))
    if any(part.training and getattr(part, "dropout", True) for part in others):
        progress("the module is in training mode: exporting it as after eval()")
    onnx_function.register_schema()
    feeds = example_inputs(model.inputs)
    dynamic = {
        s.name: {axis: torch.export.Dim.DYNAMIC for axis, n in enumerate(s.shape) if isinstance(n, str)}
        for s in model.inputs
    }
    try:
        with quietly(model.module), torch.no_grad(), plain_bags():
            traced = torch.export.export(model.module, (feeds,), dynamic_shapes=(dynamic,), strict=False)
            batch_attention(traced)
            program = torch.onnx.export(
                traced,
                (),
                input_names=[s.name for s in model.inputs],
                output_names=list(model.outputs),
                opset_version=onnx_function.OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
                custom_translation_table={torch.ops.stca.target_history_attention.default: _translate},
            )
        assert program is not None
        made: onnx_ir.Model = program.model
    except Exception as e:  # torch raises many types here; the cause is what the user can act on
        with quietly(model.module):
            scripted = by_older_exporter(model, feeds, e)
        if scripted is None:
            raise ExportError(f"the model cannot be traced: {why_untraceable(e)}") from e
        progress("torch's newer exporter cannot trace the model: taking the older one")
        made = onnx_ir.from_proto(scripted)
    if (outputs := len(made.graph.outputs)) != len(model.outputs):
        raise ExportError(f"the model has {outputs} outputs, {len(model.outputs)} are named; name each of them")
    graph = _tidy(made, large or Large())
    _name_sizes(graph, model.inputs)
    _name_attention(graph)
    inline(graph)
    onnx_function.attach(graph)
    graph.producer_name, graph.producer_version = "stca", ""
    return graph


@contextlib.contextmanager
def quietly(module: nn.Module) -> Iterator[None]:
    """Without the exporter's chatter, and with all of the module in eval mode; afterwards all is as it was."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.fx")]
    training = {part: part.training for part in module.modules()}
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), as_in_training(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # and stderr gets whole graphs
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        module.eval()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            for part, mode in training.items():  # train() would go to the parts too, a frozen norm's among them
                part.training = mode


def example_inputs(inputs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Small valid inputs for tracing: 2 requests, distinct sizes above 1 so that none is taken for a constant."""
    sizes = {USERS: 2, OFFSETS: 3, TOKENS: 7, TARGETS: 5}
    made: dict[str, Tensor] = {}
    for spec in inputs:
        shape = [n if isinstance(n, int) else sizes.setdefault(n, 6 + 2 * len(sizes)) for n in spec.shape]
        dtype = getattr(torch, spec.dtype)
        if spec.is_offsets:
            rows = sizes[TOKENS if spec.scope == "user" else TARGETS]
            made[spec.name] = torch.tensor([0, rows // 2, rows], dtype=dtype)
        elif dtype.is_floating_point:
            made[spec.name] = torch.linspace(-1, 1, max(1, _product(shape))).reshape(shape).to(dtype)
        else:
            # From 1 on: a lone integer may be a length, and few models take one of 0.
            alone = len(shape) == 1 and spec.limit not in (1, 2)
            low, end = max(spec.low or 0, 1 if alone or not spec.limit else 0), spec.limit or 2
            values = low + torch.arange(1, 1 + _product(shape)) % max(end - low, 1)
            made[spec.name] = values.reshape(shape).to(dtype)
    return made


def _translate(
    query: Any,
    key: Any,
    value: Any,
    target_offsets: Any,
    history_offsets: Any,
    history_lengths: Any,
    scale: float,
    segment_offsets: Any = None,
    segment_bias: Any = None,
) -> Any:
    """The torch op as one ONNX node; the exporter calls this with its symbolic tensors."""
    if history_lengths is None:
        raise ExportError("target_history_attention needs history_lengths in an exported model; pass the segments' own")
    tensors = [query, key, value, target_offsets, history_offsets, history_lengths]
    if segment_offsets is not None:
        none = segment_bias is None
        bias = opset18.ConstantOfShape(opset18.Shape(history_lengths)) if none else segment_bias
        tensors += [segment_offsets, bias]
    return _OPSET.TargetHistoryAttention(*tensors, scale=scale, plugin_namespace=DOMAIN)


def _tidy(model: onnx_ir.Model, large: Large) -> onnx.ModelProto:
    """Remove what the exporter repeats. Weights are not folded or renamed: they stay the checkpoint's."""
    _fold_constants(model)
    passes = Sequential(
        ir_passes.NameFixPass(),  # a value may have an input's name, `cat` say
        ir_passes.IdentityEliminationPass(),
        ir_passes.CommonSubexpressionEliminationPass(),
        ir_passes.RemoveUnusedNodesPass(),
        ir_passes.RemoveUnusedOpsetsPass(),
        ir_passes.ClearMetadataAndDocStringPass(),
    )
    tidy = passes(model).model
    kept_out: dict[str, onnx_ir.TensorProtocol] = {}
    for name, value in tidy.graph.initializers.items():
        weight = value.const_value
        if weight is not None and large.takes(weight.dtype.value, weight.shape.numpy()):
            kept_out[name] = weight
            kind, shape = weight.dtype, onnx_ir.Shape(weight.shape.numpy())
            value.const_value = onnx_ir.ExternalTensor("", 0, weight.nbytes, kind, name=name, shape=shape)
    tidied = onnx_ir.to_proto(tidy)
    for tensor in tidied.graph.initializer:
        if tensor.name in kept_out:
            large.hollow(tensor, kept_out[tensor.name].numpy())
    _make_branch_outputs(tidied.graph)
    return tidied


def _fold_constants(model: onnx_ir.Model) -> None:
    """Compute, in place, what depends on constants alone and on no weight: patterns look for the numbers themselves.

    The exporter writes a scale of 1 / sqrt(16), say, as a chain of nodes. What is computed becomes a Constant, since
    an initializer would be taken for a weight.
    """
    graph = model.graph
    weights = set(graph.initializers)
    optimizer.fold_constants(
        model, should_fold=lambda node: False if any(x is not None and x.name in weights for x in node.inputs) else None
    )
    for name in [name for name in graph.initializers if name not in weights]:  # in an order that every run has
        value = graph.initializers.pop(name)
        constant = onnx_ir.node("Constant", [], {"value": value.const_value})
        graph.insert_before(graph[0], constant)
        value.replace_all_uses_with(constant.outputs[0], replace_graph_outputs=True)
        constant.outputs[0].name = name


def _make_branch_outputs(graph: onnx.GraphProto) -> None:
    """Give each branch its own outputs, in place: one that hands an outer value on must make a copy, says ONNX."""
    for node in graph.node:
        for branch in (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH):
            _make_branch_outputs(branch)
            made = {o for n in branch.node for o in n.output} | {t.name for t in branch.initializer}
            for output in branch.output:
                if output.name not in made and output.name not in {i.name for i in branch.input}:
                    outer, output.name = output.name, f"{node.name or node.output[0]}_{output.name}"
                    branch.node.append(onnx.helper.make_node("Identity", [outer], [output.name]))


def _name_sizes(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> None:
    """Give symbolic sizes the names of the input specs (`s18` → `N_h`), in place, everywhere they occur."""
    names: dict[str, str] = {}
    by_name = {i.name: i for i in model.graph.input}
    for spec in inputs:
        if spec.name not in by_name:
            raise ExportError(f"input {spec.name!r} is not used by the model; remove it from the inputs")
        for size, dim in zip(spec.shape, by_name[spec.name].type.tensor_type.shape.dim, strict=True):
            if isinstance(size, str):
                if dim.HasField("dim_value"):
                    raise ExportError(
                        f"input {spec.name!r}: size {size} became the constant {dim.dim_value} in tracing; "
                        f"write {dim.dim_value} for it in the shape, or make the model's code independent of it"
                    )
                names[dim.dim_param] = size
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b") if names else None
    for info in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if pattern and dim.HasField("dim_param"):
                named = pattern.sub(lambda m: names[m[1]], dim.dim_param)
                dim.dim_param = re.sub(r"(?<!\*)(?<!\* )\bB_plus_1 - 1\b", "B", named)


def _name_attention(model: onnx.ModelProto) -> None:
    """Name what each attention reads (`attention_0_key`, …), in place: these values become the user state."""
    names: dict[str, str] = {}
    nodes = [n for n in model.graph.node if (n.domain, n.op_type) == (DOMAIN, OP_NAME)]
    for i, node in enumerate(nodes):
        tied = node.input[1] == node.input[2]
        for role, name in zip(("query", "key", "value"), node.input[:3], strict=True):
            names.setdefault(name, f"attention_{i}_{'history' if tied and role != 'query' else role}")
    made = {o for n in model.graph.node for o in n.output} - {o.name for o in model.graph.output}
    names = {old: new for old, new in names.items() if old in made and new not in made}
    for node in model.graph.node:
        for ends in (node.input, node.output):
            for j, name in enumerate(ends):
                ends[j] = names.get(name, name)
    for info in model.graph.value_info:
        info.name = names.get(info.name, info.name)


def _product(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
