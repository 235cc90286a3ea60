"""The torch op beyond its numbers: what compilers and exporters see, its gradient, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stca.plugins import torch_op

Op = torch.ops.stca.target_history_attention


def arguments(key_heads: int, *, dtype: torch.dtype = torch.float32, gradients: bool = False) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    floats = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(gradients)
        for shape in ((5, 4, 8), (9, key_heads, 8), (9, key_heads, 6))
    ]
    structure = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 2, 5], [0, 4, 5, 9], [4, 0, 3])]
    return (*floats, *structure)


@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("lengths", [True, False])
def test_opcheck(key_heads: int, lengths: bool) -> None:
    tensors = arguments(key_heads, gradients=True)
    torch.library.opcheck(Op, (*tensors[:5], tensors[5] if lengths else None, 0.3))


def segmented(key_heads: int, *, dtype: torch.dtype = torch.float32, gradients: bool = False) -> tuple[Tensor, ...]:
    """Rows that two requests read, or one twice; query, key, value, bias, and the structure in the op's order."""
    query, key, value, targets, *_ = arguments(key_heads, dtype=dtype, gradients=gradients)
    bias = torch.tensor([0.5, -1, 2, 0, 1], dtype=dtype).requires_grad_(gradients)
    rows = [torch.tensor(x, dtype=torch.int32) for x in ([3, 0, 5, 3, 5, 9], [4, 2, 4, 0, 1], [0, 3, 3, 5])]
    return query, key, value, bias, targets, *rows


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_opcheck_of_lists_of_segments(key_heads: int, with_bias: bool) -> None:
    query, key, value, bias, targets, starts, lengths, ends = segmented(key_heads, gradients=True)
    segments = (ends, bias) if with_bias else (ends,)
    torch.library.opcheck(Op, (query, key, value, targets, starts, lengths, 0.3, *segments))


@pytest.mark.parametrize("key_heads", [1, 4])
def test_gradient_over_lists_of_segments(key_heads: int) -> None:
    *floats, targets, starts, lengths, ends = segmented(key_heads, dtype=torch.float64, gradients=True)
    f = lambda q, k, v, b: Op(q, k, v, targets, starts, lengths, 0.3, ends, b)  # noqa: E731
    assert torch.autograd.gradcheck(f, floats)
    ours, plain = (
        torch.autograd.grad(form(*floats[:3], targets, starts, lengths, 0.3, ends, floats[3]).sum(), floats)
        for form in (Op, torch_op.eager)
    )
    torch.testing.assert_close(ours, plain)


def test_gradients_of_rows_that_many_read_are_summed_up_in_float32() -> None:
    requests = 600
    query, key, value = (torch.ones(n, 1, 8, dtype=torch.bfloat16) for n in (requests, 2, 2))
    ends = torch.arange(requests + 1, dtype=torch.int32)
    starts = torch.cat([torch.zeros(requests, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)])
    lengths = torch.full((requests,), 2, dtype=torch.int32)
    out = Op(query, key, value.requires_grad_(), ends, starts, lengths, 1.0, ends)
    (gradient,) = torch.autograd.grad(out.sum(), [value])
    assert (gradient == requests / 2).all()  # one more half is lost in bfloat16 from 256 on


def test_no_tensor_of_the_historys_size_is_made_on_the_way() -> None:
    """Pages are read where they lie: what is allocated grows with targets times tokens, not with the history's rows."""
    rows, width, page = 8192, 256, 512
    query, pool = torch.randn(1, 1, width), torch.randn(rows, 1, width)
    table = torch.randperm(rows // page).int()
    starts, ends = torch.cat([table * page, torch.tensor([rows])]).int(), torch.tensor([0, len(table)]).int()
    made = (query, pool, pool, torch.tensor([0, 1]).int(), starts, torch.full((len(table),), page).int(), 0.1, ends)
    with torch.profiler.profile(profile_memory=True) as profile:
        Op(*made)
    allocated = [event.cpu_memory_usage for event in profile.events() if event.name != "[memory]"]
    assert max(allocated) >= rows * 4  # the logits are seen
    assert sum(n for n in allocated if n > 0) < pool.nbytes / 8


@pytest.mark.parametrize("key_heads", [1, 4])
def test_gradient(key_heads: int) -> None:
    query, key, value, *structure = arguments(key_heads, dtype=torch.float64, gradients=True)
    assert torch.autograd.gradcheck(lambda q, k, v: Op(q, k, v, *structure, 0.3), (query, key, value))


def test_gradient_equals_that_of_the_plain_form() -> None:
    tensors = arguments(1, gradients=True)
    weights = torch.linspace(-1, 1, 5 * 4 * 6).reshape(5, 4, 6)
    ours, plain = (torch.autograd.grad(form(*tensors, 0.3), tensors[:3], weights) for form in (Op, torch_op.eager))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


class _Module(torch.nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        out: Tensor = Op(*tensors, 0.3)
        return out * 2


def test_export_sees_one_node_with_symbolic_sizes() -> None:
    tokens, targets, batch = (torch.export.Dim(name, max=4096) for name in ("tokens", "targets", "batch"))
    shapes = [{0: targets}, {0: tokens}, {0: tokens}, {0: batch + 1}, {0: batch + 1}, {0: batch}]
    tensors = arguments(1)
    program = torch.export.export(_Module(), tensors, dynamic_shapes=(tuple(shapes),))
    nodes = [node for node in program.graph.nodes if node.target is Op.default]
    assert len(nodes) == 1
    more = (*(torch.cat([x, x]) for x in tensors[:3]), torch.tensor([0, 10], dtype=torch.int32))
    more = (*more, torch.tensor([0, 18], dtype=torch.int32), torch.tensor([18], dtype=torch.int32))
    torch.testing.assert_close(program.module()(*more), _Module()(*more))


def test_compile_has_no_graph_break() -> None:
    tensors = arguments(4, gradients=True)
    compiled = torch.compile(_Module(), fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(*tensors), _Module()(*tensors))
    mine, plain = (torch.autograd.grad(f(*tensors).sum(), tensors[:3]) for f in (compiled, _Module()))
    torch.testing.assert_close(mine, plain)


def test_lengths_may_be_left_out() -> None:
    query, key, value, target_offsets, history_offsets, _ = arguments(1)
    whole = history_offsets.diff()
    torch.testing.assert_close(
        Op(query, key, value, target_offsets, history_offsets, None, 0.3),
        Op(query, key, value, target_offsets, history_offsets, whole, 0.3),
    )


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("position", [3, 4, 5])
def test_offsets_of_the_wrong_type_are_refused(position: int, fake: bool) -> None:
    tensors = list(arguments(1))
    if fake:
        tensors = [x.to("meta") for x in tensors]
    tensors[position] = tensors[position].long()
    names = ("target_offsets", "history_offsets", "history_lengths")
    with pytest.raises(ValueError, match=rf"{names[position - 3]} is torch.int64, expected torch.int32"):
        Op(*tensors, 0.3)


@pytest.mark.parametrize("fake", [False, True])
def test_other_bad_arguments_are_refused_by_name(fake: bool) -> None:
    tensors = arguments(1)
    query, key, value, *structure = [x.to("meta") for x in tensors] if fake else tensors
    with pytest.raises(ValueError, match=r"query is torch.int32, expected torch.float32, .*torch.bfloat16"):
        Op(query.int(), key.int(), value.int(), *structure, 0.3)
    with pytest.raises(ValueError, match=r"key is torch.float64, expected torch.float32"):
        Op(query, key.double(), value, *structure, 0.3)
    with pytest.raises(ValueError, match="query has rank 2, expected 3"):
        Op(query[0], key, value, *structure, 0.3)
    with pytest.raises(ValueError, match="history_lengths has shape"):
        Op(query, key, value, *structure[:2], structure[2][None], 0.3)
    with pytest.raises(ValueError, match=r"key has 2 heads; expected 1 \(absorbed\) or the query's 4"):
        Op(query, key.expand(-1, 2, -1), value.expand(-1, 2, -1), *structure, 0.3)


def test_what_has_no_gpu_kernel_is_refused_while_a_model_is_compiled() -> None:
    with FakeTensorMode():
        query, key = torch.empty(5, 4, 8, device="cuda"), torch.empty(9, 1, 8, device="cuda")
        offsets = torch.empty(3, dtype=torch.int32, device="cuda")
        with pytest.raises(ValueError, match="head size D = 8 is not supported; the kernels take multiples of 16"):
            Op(query, key, key, offsets, offsets, None, 0.3)
        with pytest.raises(ValueError, match="history_offsets is on cpu, expected cuda:0 as the query"):
            Op(query, key, key, offsets, torch.empty(3, dtype=torch.int32), None, 0.3)


def test_export_and_compile_report_a_wrong_dtype() -> None:
    tensors = list(arguments(1))
    tensors[4] = tensors[4].long()
    message = "history_offsets is torch.int64, expected torch.int32"
    with pytest.raises(Exception, match=message):
        torch.export.export(_Module(), tuple(tensors))
    with pytest.raises(Exception, match=message):
        torch.compile(_Module(), fullgraph=True, backend="aot_eager")(*tensors)


def test_arguments_may_be_named() -> None:
    tensors = arguments(1)
    names = ("query", "key", "value", "target_offsets", "history_offsets", "history_lengths")
    named = dict(zip(names, tensors, strict=True))
    torch.testing.assert_close(Op(**named, scale=0.3), Op(*tensors, 0.3), rtol=0, atol=0)
