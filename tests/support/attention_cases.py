"""The one table of cases that every implementation of the operator must pass, and the rule its errors are judged by."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stca.plugins.launch import Launch
from stca.plugins.reference import target_history_attention as reference
from stca.plugins.tiling import Shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Layout:
    """A ragged batch: targets of each request, tokens its segment holds, and how many of them count.

    With `lists`, a request reads the segments whose numbers it lists, in that order, each with a bias.
    """

    name: str
    targets: tuple[int, ...]
    segments: tuple[int, ...]
    lengths: tuple[int, ...] | None = None  # the whole segments
    lists: tuple[tuple[int, ...], ...] | None = None

    @property
    def read(self) -> tuple[tuple[int, ...], ...]:
        """The segments of each request."""
        return self.lists or tuple((i,) for i in range(len(self.segments)))

    @property
    def pairs(self) -> int:
        """Targets times the tokens they look at."""
        lengths = self.lengths or self.segments
        return sum(m * sum(lengths[s] for s in read) for m, read in zip(self.targets, self.read, strict=True))


@dataclass(frozen=True)
class Case:
    """One row of the table. `scores` says what the logits are like; unused tokens always hold NaN and inf. With `tied`,
    key and value are one tensor."""

    layout: Layout
    heads: int
    key_heads: int
    depth: int
    value_depth: int
    dtype: str
    scores: str = "ordinary"
    scale: float = 0.25
    tied: bool = False

    @property
    def name(self) -> str:
        form = ("absorbed" if self.key_heads == 1 else "projected") + "-tied" * self.tied
        return f"{self.layout.name}-{form}{self.heads}x{self.depth}to{self.value_depth}-{self.scores}-{self.dtype}"

    @property
    def shape(self) -> Shape:
        """What is compiled in."""
        lists = self.layout.lists is not None
        return Shape(self.heads, self.key_heads, self.depth, self.value_depth, self.dtype, self.tied, lists)

    @property
    def products(self) -> int:
        """Target-token pairs times heads: what a slow implementation takes time for."""
        return self.heads * self.layout.pairs


@dataclass(frozen=True)
class Inputs:
    """The operator's tensor arguments; a tied case's key and value are the same object."""

    query: Tensor
    key: Tensor
    value: Tensor
    target_offsets: Tensor
    history_offsets: Tensor
    history_lengths: Tensor
    segment_offsets: Tensor | None = None
    segment_bias: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that every request needs, in the operator's order."""
        return (
            self.query,
            self.key,
            self.value,
            self.target_offsets,
            self.history_offsets,
            self.history_lengths,
        )

    def segments(self) -> tuple[Tensor, ...]:
        """What follows where requests list their segments."""
        return tuple(x for x in (self.segment_offsets, self.segment_bias) if x is not None)

    def cuda(self) -> Inputs:
        """The same on the GPU."""
        query, key, value, *structure = (x.cuda() for x in (*self.tensors(), *self.segments()))
        return Inputs(query, key, key if self.value is self.key else value, *structure)


PADDED = Layout("padded", (4, 3, 2), (40, 40, 40), (40, 17, 1))
# Blocks are 16 or 32 wide in the interpreter, 16 to 128 on a GPU: sizes around these, and around no block at all.
LAYOUTS = (
    Layout("no-request", (), ()),
    Layout("no-target", (0,), (5,)),
    Layout("no-token", (3,), (0,)),
    Layout("all-empty", (2, 0, 3), (0, 0, 0)),
    Layout("one-one", (1,), (1,)),
    Layout("block-less-1", (15,), (31,)),
    Layout("block", (16,), (32,)),
    Layout("block-plus-1", (17,), (33,)),
    Layout("odd", (5,), (77,)),
    Layout("wide-block-less-1", (3,), (127,)),
    Layout("wide-block-plus-1", (2,), (129,)),
    Layout("empty-between", (3, 2, 4, 1), (19, 0, 40, 1)),
    Layout("no-targets-between", (3, 0, 0, 4), (7, 30, 5, 23)),
    Layout("starts-off-block", (7, 9, 16, 1), (16, 17, 15, 34)),
    PADDED,
    Layout("padded-empty", (2, 3, 1), (24, 24, 24), (0, 23, 0)),
    Layout("padded-block", (2, 2), (48, 48), (32, 33)),
    Layout("padded-alone", (3,), (40,), (29,)),
    Layout("one-token-each", (1, 1, 1, 1, 1), (1, 1, 1, 1, 1)),
)
# A request's own state beside other users', which others read too; pages of a pool, the last of each request not full.
SEGMENTED = (
    Layout("neighbours", (3, 2, 4), (21, 9, 40, 1, 33), None, ((0, 2, 4), (1, 4, 2), (3,))),
    Layout("one-list", (5,), (17, 40, 32), (17, 33, 32), ((0, 1, 2),)),
    Layout("no-list-between", (2, 3, 1), (30, 7, 5), (30, 0, 5), ((0, 1, 2), (), (1, 2, 1, 0, 2))),
    Layout("pages", (4, 3), (16,) * 9, (16,) * 4 + (5,) + (16,) * 3 + (11,), ((7, 2, 0, 4), (3, 1, 6, 2, 8))),
    Layout("pages-of-32", (2,), (32,) * 6, None, ((5, 0, 3, 2),)),
    Layout("lists-of-nothing", (2, 1), (4,), (0,), ((), (0,))),
)
# More segments than the kernel looks at in one go, some of them empty.
MANY = Layout("many-segments", (2, 1), tuple(i % 4 for i in range(200)), None, (tuple(range(199, 20, -1)), (3, 7)))
# More requests than the kernel looks at in one go.
CROWD = Layout("crowd", tuple(i % 2 for i in range(140)), tuple(i % 3 for i in range(140)))
LONG = Layout("long-beside-empty", (0, 3, 1, 2), (0, 10_000, 0, 0))
DEPTHS = ((16, 16), (32, 32), (32, 64), (64, 32), (48, 80), (64, 64), (128, 128), (256, 256), (512, 512), (320, 16))
SCORES = ("large", "equal", "negative-scale", "one-token-wins", "far-apart")


def _table() -> Iterator[Case]:
    forms = ((4, 1), (3, 3))
    small = itertools.cycle(((32, 32), (16, 32), (48, 16)))
    for layout, (heads, key_heads), dtype in itertools.product(LAYOUTS, forms, DTYPES):
        yield Case(layout, heads, key_heads, *next(small), dtype)
    for layout, (heads, key_heads), dtype in itertools.product(SEGMENTED, forms, DTYPES):
        yield Case(layout, heads, key_heads, *next(small), dtype)
    middle = Layout("three", (3, 1, 2), (21, 0, 50), (21, 0, 37))
    for (depth, value_depth), (heads, key_heads), dtype in itertools.product(DEPTHS, ((2, 1), (2, 2)), DTYPES):
        yield Case(middle, heads, key_heads, depth, value_depth, dtype, scale=depth**-0.5)
    for scores, (heads, key_heads), dtype in itertools.product(SCORES, forms, DTYPES):
        yield Case(middle, heads, key_heads, 32, 32, dtype, scores)
    for dtype in DTYPES:
        yield Case(Layout("single-head", (9,), (50,)), 1, 1, 32, 32, dtype)
        yield Case(CROWD, 4, 1, 16, 16, dtype)
        yield Case(MANY, 2, 1, 16, 16, dtype)
        yield Case(SEGMENTED[0], 4, 1, 64, 64, dtype, tied=True)
        yield Case(SEGMENTED[0], 3, 3, 32, 32, dtype, "negative-scale")
        yield Case(Layout("few", (1, 1), (30, 17)), 2, 1, 1024, 1024, dtype, scale=1 / 32)
        for heads, key_heads in forms:
            yield Case(LONG, heads, key_heads, 32, 32, dtype)
            yield Case(middle, heads, key_heads, 32, 32, dtype, tied=True)
        yield Case(PADDED, 4, 1, 64, 64, dtype, tied=True)


TABLE = tuple(_table())


@functools.lru_cache(maxsize=8)
def inputs(case: Case) -> Inputs:
    """The case's tensors, the same every time. Tokens beyond the lengths hold NaN and inf, which must not matter."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    layout = case.layout
    n_targets, n_tokens = sum(layout.targets), sum(layout.segments)
    lengths = layout.segments if layout.lengths is None else layout.lengths
    query = rng.standard_normal((n_targets, case.heads, case.depth))
    key = rng.standard_normal((n_tokens, case.key_heads, case.depth))
    value = rng.standard_normal((n_tokens, case.key_heads, case.value_depth))
    if case.scores == "large":  # logits of both signs, to about 1e4
        query *= 1e4 / (np.abs(query).max(initial=1) * 12)
        key *= 2
    elif case.scores == "equal":
        key[:] = key[:1]
    elif case.scores == "one-token-wins":
        key *= 0.01
        key[len(key) // 2 :: 7] *= 500
    elif case.scores == "far-apart":  # every token far below or above the one before
        key[:] = np.sign(key[:1]) * (np.arange(n_tokens) % 5 - 2).reshape(-1, 1, 1)
        query[:] = np.abs(query) * np.sign(key[:1, :1])
        query *= 30
    offsets = np.concatenate([[0], np.cumsum(layout.segments)]).astype(np.int32)
    for begin, end, length in zip(offsets[:-1], offsets[1:], lengths, strict=True):
        key[begin + length : end] = np.nan
        value[begin + length : end] = np.inf
    listed: list[Tensor] = []
    if layout.lists is not None:
        rows = [s for read in layout.lists for s in read]
        ends = np.cumsum([0, *map(len, layout.lists)])
        bias = rng.integers(-16, 17, len(rows)) / 4  # numbers of every type, so that PyTorch's error is not theirs
        offsets, lengths = np.append(offsets[rows], n_tokens), [lengths[s] for s in rows]
        listed = [torch.from_numpy(ends.astype(np.int32)), torch.from_numpy(bias.astype(np.float32))]
    floats = [torch.from_numpy(x).to(DTYPES[case.dtype]) for x in (query, key, value)]
    if case.tied:
        floats[2] = floats[1]
    target_offsets = np.concatenate([[0], np.cumsum(layout.targets)]).astype(np.int32)
    structure = (torch.from_numpy(np.array(x, dtype=np.int32)) for x in (target_offsets, offsets, lengths))
    return Inputs(*floats, *structure, *listed)


def poison_parts(steps: Sequence[Launch]) -> None:
    """Fill the partial results that a split launch leaves for the join with NaN: what it does not write then shows."""
    for part in steps[0].arguments[-2:] if len(steps) == 2 else ():
        assert isinstance(part, Tensor)
        part.fill_(float("nan"))


def signed_scale(case: Case) -> float:
    """The attribute `scale` of the case."""
    return -case.scale if case.scores == "negative-scale" else case.scale


@functools.lru_cache(maxsize=8)
def truth(case: Case) -> NDArray[np.float64]:
    """The reference's output on the case's rounded inputs."""
    x = inputs(case)
    arrays = [y.double().numpy() if y.is_floating_point() else y.numpy() for y in (*x.tensors(), *x.segments())]
    return reference(*arrays, scale=signed_scale(case))


@functools.lru_cache(maxsize=8)
def tolerance(case: Case) -> float:
    """The largest error allowed: twice PyTorch's own in the same precision, plus a rounding floor.

    PyTorch's own is `scaled_dot_product_attention` on each request in the case's dtype. The floor, for cases in which
    PyTorch happens to be nearly exact: two roundings of the largest output in that dtype, and one float32 rounding of
    the largest logit, which changes a weight by as much relative to itself.
    """
    x = inputs(case)
    expected = truth(case)
    if expected.size == 0:
        return 0.0
    worst = largest_logit = largest_value = 0.0
    t, b = x.target_offsets.tolist(), x.history_offsets.tolist()
    lengths, ends = x.history_lengths.tolist(), itertools.accumulate(map(len, case.layout.read), initial=0)
    for i, (first, last) in enumerate(itertools.pairwise(ends)):
        tokens = [b[s] + n for s in range(first, last) for n in range(lengths[s])]
        if not tokens or t[i] == t[i + 1]:
            continue
        q = x.query[t[i] : t[i + 1]].transpose(0, 1)
        k, v = (y[tokens].transpose(0, 1).expand(case.heads, -1, -1) for y in (x.key, x.value))
        bias = None
        if x.segment_bias is not None:
            bias = x.segment_bias[first:last].repeat_interleave(x.history_lengths[first:last])
            largest_logit = max(largest_logit, float(bias.abs().max()))
            bias = bias.to(q.dtype).expand(1, case.heads, q.shape[1], -1)
        scale = signed_scale(case)
        out = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], bias, scale=scale)[0]
        worst = max(worst, float(np.abs(out.transpose(0, 1).double().numpy() - expected[t[i] : t[i + 1]]).max()))
        largest_logit = max(largest_logit, float((q.float() @ k.float().mT).abs().max()) * case.scale)
        largest_value = max(largest_value, float(v.abs().max()))
    rounding = torch.finfo(DTYPES[case.dtype]).eps * float(np.abs(expected).max())
    return 2 * worst + rounding + torch.finfo(torch.float32).eps / 2 * largest_logit * largest_value


def check(case: Case, out: Tensor) -> None:
    """Fail unless `out` is the case's output: shape, dtype, finite everywhere, and near enough to the truth."""
    expected = truth(case)
    assert tuple(out.shape) == expected.shape
    assert out.dtype == DTYPES[case.dtype]
    got = out.double().numpy()
    assert np.isfinite(got).all(), "the output has elements that are not finite, or were never written"
    error = float(np.abs(got - expected).max(initial=0.0))
    assert error <= tolerance(case), f"error {error:.3g} exceeds {tolerance(case):.3g}"
