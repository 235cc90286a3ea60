"""Nodes spelled as later passes and engines know them: a cast says its type, an Einsum has two values, and so on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from stca.export.analysis.cost import without_weights
from stca.export.analysis.rows import constants_of
from stca.export.passes.nodes import NewNodes, names_in, rename

_BASES: Final = (2, 10)


def spell_out(model: onnx.ModelProto) -> tuple[str, ...]:
    """Rewrite such nodes of the graph's top level, in place.

    `CastLike`, as of PyTorch's `x.type_as(y)`, becomes a `Cast`, or nothing where the type is the same. An Einsum of
    several values, as of `einsum("bhs,bhsk,hkd->bd", …)`, becomes one of two after the other, from the left: so ONNX
    Runtime computes it, too. So it does a choice between booleans, as of `mask.masked_fill(…)`, in And and Or.
    `torch.log2` and `log10` are a Log and a Div in ONNX, and say 12.999999 of 8192; of a power it becomes the whole
    number, as PyTorch says, so that no bucket's bound moves. A quotient of the model's own
    stays. torch's older exporter writes both alike and is taken to mean the logarithm, as most models do.

    Returns:
        A line on each base whose logarithms changed, for the export's notes.
    """
    bases, sure = _bases(model)
    if not bases and not any(_is_castlike(n) or _is_long_einsum(n) or _is_choice(n) for n in model.graph.node):
        return ()
    types, outputs = _types(model), {o.name for o in model.graph.output}
    new, same, logs = NewNodes(names_in(model.graph)), dict[str, str](), dict[str, str]()
    for node in list(model.graph.node):
        rename(node, same)
        if _is_log(node):
            logs[node.output[0]] = node.input[0]
        if _is_castlike(node) and (to := types.get(node.input[1])):
            if types.get(node.input[0]) == to and node.output[0] not in outputs:
                same[node.output[0]] = node.input[0]
                continue
            node.op_type = "Cast"
            del node.input[1:], node.attribute[:]
            node.attribute.append(helper.make_attribute("to", to))
        elif _is_long_einsum(node) and (steps := list(_in_pairs(node))):
            first = node.input[0]
            for name, equation in steps[:-1]:
                first = new.node("Einsum", [first, name], f"{node.output[0]}_part", equation=equation)
            name, equation = steps[-1]
            del node.attribute[:]
            node.input[:] = [first, name]
            node.attribute.append(helper.make_attribute("equation", equation))
        elif _is_choice(node) and types.get(node.output[0]) == onnx.TensorProto.BOOL:
            condition, yes, no = node.input
            chosen = new.node("And", [condition, yes], f"{node.output[0]}_if")
            other = new.node(
                "And", [new.node("Not", [condition], f"{node.output[0]}_not"), no], f"{node.output[0]}_else"
            )
            new.node("Or", [chosen, other], node.output[0], exact=True)
            continue
        elif node.output[0] in bases:
            _whole_of_powers(new, node, logs[node.input[0]], bases[node.output[0]])
            continue
        new.nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(new.nodes)
    model.graph.initializer.extend(new.weights)
    return tuple(_note(base, sure) for base in sorted(set(bases.values())))


def _note(base: int, sure: bool) -> str:
    said = f"torch.log{base} of a power of {base} gives a whole number as in PyTorch, where ONNX's may be just below"
    return (
        said if sure else f"{said}; if your model divides by log({base}) itself, export with dynamo=True, which tells"
    )


def _bases(model: onnx.ModelProto) -> tuple[dict[str, int], bool]:
    """The base of each logarithm to base 2 or 10, by its name; and whether the exporter tells that these are some."""
    graph = model.graph
    logs = {n.output[0] for n in graph.node if _is_log(n)}
    divided = [n for n in graph.node if (n.op_type, n.domain) == ("Div", "") and n.input[0] in logs]
    known = (
        {t.name: t for t in constants_of(graph) if t.data_type == t.FLOAT and t.dims in ([], [1])} if divided else {}
    )
    found, sure = dict[str, int](), True
    for node in divided:
        if (divisor := known.get(node.input[1])) is None:
            continue
        base = next((b for b in _BASES if numpy_helper.to_array(divisor) == np.float32(math.log(b))), None)
        calls = [p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.fx_node"]
        told = any(f"target=torch.ops.aten.log{base}." in call for call in calls)
        # The older exporter keeps no calls; of its own logarithms to base 10 the divisor has the shape [1].
        meant = not calls and model.producer_name == "pytorch" and (base == 2 or divisor.dims == [1])
        if base and (told or meant):
            found[node.output[0]] = base
            sure &= told
    return found, sure


def _is_log(node: onnx.NodeProto) -> bool:
    return (node.op_type, node.domain) == ("Log", "")


def _whole_of_powers(new: NewNodes, node: onnx.NodeProto, x: str, base: int) -> None:
    """`node`, a logarithm of `x`, but for powers of the base its rounded value."""
    name = node.output[0]
    near = new.name(f"{name}_near")
    node.output[0] = near
    new.nodes.append(node)
    whole = new.node("Round", [near], f"{name}_whole")
    power = new.node("Pow", [new.weight(f"{name}_base", np.float32(base)), whole], f"{name}_power")
    same = new.node("Equal", [power, x], f"{name}_same")
    new.node("Where", [same, whole, near], name, exact=True)


def _is_castlike(node: onnx.NodeProto) -> bool:
    return (node.op_type, node.domain) == ("CastLike", "")


def _is_long_einsum(node: onnx.NodeProto) -> bool:
    return (node.op_type, node.domain) == ("Einsum", "") and len(node.input) > 2


def _is_choice(node: onnx.NodeProto) -> bool:
    return (node.op_type, node.domain) == ("Where", "")


def _types(model: onnx.ModelProto) -> Mapping[str, int]:
    """Element types, by value; none where inference fails."""
    try:
        graph = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    except Exception:  # onnx's own types
        graph = model.graph
    typed = (*graph.input, *graph.output, *graph.value_info)
    known = {v.name: v.type.tensor_type.elem_type for v in typed if v.type.tensor_type.elem_type}
    return known | {t.name: t.data_type for t in model.graph.initializer}


def _in_pairs(node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    """Each value after the first, and the equation that joins it to what came before; none where letters are hidden."""
    equation = helper.get_attribute_value(node.attribute[0]).decode().replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or any(len(set(t)) < len(t) for t in terms):
        return
    before = terms[0]
    for i in range(1, len(terms)):
        rest = set(out).union(*terms[i + 1 :])
        made = "".join(c for c in dict.fromkeys(before + terms[i]) if c in rest) if i + 1 < len(terms) else out
        yield node.input[i], f"{before},{terms[i]}->{made}"
        before = made
