"""One declaration of the operator's arguments; every implementation takes those, in that order."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import onnx
import pytest
import torch

from stca.errors import ExportError
from stca.plugins import kernels, launch, onnx_function, reference, spec, torch_op

NAMES = [a.name for a in spec.ARGUMENTS]
PLAIN = [a.name for a in spec.PLAIN]
CPP = Path(spec.__file__).parent / "cpp"


def _parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_torch_schema():
    arguments = torch.ops.stca.target_history_attention.default._schema.arguments
    assert [a.name for a in arguments] == [*PLAIN, spec.SCALE, *NAMES[len(PLAIN) :]]
    assert [str(a.type) for a in arguments] == ["Tensor"] * 5 + ["Optional[Tensor]", "float"] + ["Optional[Tensor]"] * 2


def test_the_onnx_schema_and_function_body():
    schema = onnx_function.schema()
    assert [i.name for i in schema.inputs] == NAMES
    assert [o.name for o in schema.outputs] == [spec.RESULT.name]
    for segments, names in ((False, PLAIN), (True, NAMES)):
        body = onnx_function.functions(segments)[-1]
        assert (list(body.input), list(body.output), list(body.attribute)) == (names, [spec.RESULT.name], [spec.SCALE])


@pytest.mark.parametrize(
    "function", [torch_op.eager, launch.target_history_attention, reference.target_history_attention]
)
def test_python_functions(function):
    assert sorted(_parameters(function)) == sorted([*NAMES, spec.SCALE])
    assert [p for p in _parameters(function) if p != spec.SCALE] == NAMES


def test_the_kernel_takes_them_in_order():
    source = inspect.getsource(inspect.getmodule(kernels) or kernels)
    taken = re.findall(r"^    (\w+),", source[source.index("def attend_kernel") :], flags=re.MULTILINE)
    assert [n for n in taken if n in NAMES][: len(NAMES)] == NAMES


def test_the_cpp_plugin():
    source = "".join((CPP / name).read_text(encoding="utf-8") for name in ("plugin.h", "plugin.cc"))

    def listed(constant: str) -> list[str]:
        found = re.search(rf"{constant}\[kINPUTS\]\s*=\s*\{{([^}}]*)\}}", source)
        assert found, constant
        return [x.strip().strip('"') for x in found[1].split(",")]

    assert listed("kINPUT_NAMES") == NAMES
    assert listed("kRANKS") == [str(len(a.shape)) for a in spec.ARGUMENTS]
    assert f"kINPUTS = {len(NAMES)};" in source
    assert f"kPLAIN = {len(PLAIN)};" in source
    assert f'kNAME = "{spec.OP_NAME}"' in source
    assert f'kNAMESPACE = "{spec.DOMAIN}"' in source


def test_the_contract_says_what_each_argument_looks_like():
    """Each size that is compared in `check_shapes` is named in the declaration, so that the two cannot part."""
    names = ["N_t", "N_h", "H", "H_k", "D", "D_v", "B + 1", "N_s + 1", "N_s"]
    sizes = dict(zip(names, [5, 7, 4, 1, 8, 6, 3, 5, 4], strict=True))
    shapes = {a.name: tuple(sizes[n] for n in a.shape) for a in spec.ARGUMENTS}
    spec.check_shapes(*shapes.values())
    for name, shape in shapes.items():
        with pytest.raises(ValueError, match=name if name != "query" else "query|key"):
            spec.check_shapes(*((*shape, 1) if n == name else s for n, s in shapes.items()))
    one_each = {**shapes, "history_offsets": (3,), "history_lengths": (2,)}
    spec.check_shapes(*list(one_each.values())[: len(PLAIN)])
    with pytest.raises(ValueError, match="segment_bias needs segment_offsets, which says whose the segments are"):
        spec.check_shapes(*list(one_each.values())[: len(PLAIN)], None, (2,))
    with pytest.raises(ValueError, match="target_offsets has 3 entries, history_offsets 5; both need batch"):
        spec.check_shapes(*list(shapes.values())[: len(PLAIN)])


def test_a_model_gets_the_bodies_that_its_nodes_need():
    node = onnx.helper.make_node(spec.OP_NAME, [*PLAIN], ["out"], "plain", domain=spec.DOMAIN, scale=1.0)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []), ir_version=8)
    onnx_function.attach(model)
    assert ([f.overload for f in model.functions], model.ir_version) == (["", ""], 8)
    model.graph.node[0].input.extend(NAMES[len(PLAIN) :])
    onnx_function.attach(model)
    assert ([f.overload for f in model.functions], model.ir_version) == (["", "", "segments"], 10)
    assert model.graph.node[0].overload == "segments"
    del model.graph.node[0].input[-1:]
    with pytest.raises(ExportError, match="'plain' gives segment_offsets or segment_bias alone"):
        onnx_function.attach(model)


@pytest.mark.parametrize("opset", [15, 16, 18])
@pytest.mark.parametrize("names", [PLAIN, NAMES])
def test_the_bodies_are_valid_in_models_of_any_opset(opset, names):
    """In the model's own, where that has what they use: a reduction of ScatterND came with 16."""
    node = onnx.helper.make_node(spec.OP_NAME, names, ["out"], "it", domain=spec.DOMAIN, scale=1.0)
    imports = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []), ir_version=10, opset_imports=imports)
    onnx_function.attach(model)
    for function in model.functions:
        taken = {entry.domain: entry.version for entry in function.opset_import}
        assert taken[""] == (opset if opset >= 16 else onnx_function.OPSET)
        for body in function.node:
            for attribute in body.attribute if not body.domain else ():
                assert attribute.name in onnx.defs.get_schema(body.op_type, taken[""], "").attributes
