"""Attention of a target over a history as people write it: layouts, masks, scales and precisions."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stca.specs import TensorSpec

WIDTH, HEADS = 8, 2
DEPTH: Final = WIDTH // HEADS

INPUTS: Final = (
    TensorSpec("history", "float32", ("batch", "seq", WIDTH), "user"),
    TensorSpec("kept", "bool", ("batch", "seq"), "user"),
    TensorSpec("bias", "float32", ("batch", "seq"), "user"),
    TensorSpec("lengths", "int64", ("batch",), "user", 6),
    TensorSpec("target", "float32", ("batch", WIDTH), "target"),
)
FIXED: Final = tuple(replace(s, shape=tuple(5 if n == "seq" else n for n in s.shape)) for s in INPUTS)
Mask = Callable[[Tensor, "Facts"], Tensor]


@dataclass(frozen=True)
class Facts:
    """What masks are made of: `kept [b, l]` bool, `bias [b, l]`, `lengths [b]`."""

    kept: Tensor
    bias: Tensor
    lengths: Tensor


def _none(logits: Tensor, _: Facts) -> Tensor:
    return logits


def _minus_infinity(logits: Tensor, facts: Facts) -> Tensor:
    return logits.masked_fill(~_like(facts.kept, logits), float("-inf"))


def _large_number(logits: Tensor, facts: Facts) -> Tensor:
    return torch.where(_like(facts.kept, logits), logits, torch.tensor(-1e9, dtype=logits.dtype))


def _lowest_number(logits: Tensor, facts: Facts) -> Tensor:
    return logits.masked_fill(_like(~facts.kept, logits), torch.finfo(logits.dtype).min)


def _added(logits: Tensor, facts: Facts) -> Tensor:
    return logits + (1.0 - _like(facts.kept, logits).to(logits.dtype)) * -1e4


def _bias(logits: Tensor, facts: Facts) -> Tensor:
    return logits - _like(facts.bias, logits).to(logits.dtype)


def _lengths(logits: Tensor, facts: Facts) -> Tensor:
    places = torch.arange(facts.kept.shape[1], device=logits.device)
    return logits.masked_fill(_like(places[None] >= facts.lengths[:, None], logits), -1e9)


def _bias_and_mask(logits: Tensor, facts: Facts) -> Tensor:
    return _minus_infinity(_bias(logits, facts), facts)


def _like(row: Tensor, logits: Tensor) -> Tensor:
    """`[b, l]` with axes between, or after where the history is not the last axis of the logits."""
    return row.reshape(row.shape[0], *[1] * (logits.ndim - 2), row.shape[1])


MASKS: Final[dict[str, Mask]] = {
    "none": _none,
    "where -inf": _minus_infinity,
    "where -1e9": _large_number,
    "where lowest": _lowest_number,
    "added": _added,
    "bias": _bias,
    "lengths": _lengths,
    "bias and -inf": _bias_and_mask,
}
Exporter = Literal["dynamo", "legacy"]
Scale = Literal["none", "query", "key", "times", "over", "after the mask", "root on both"]
SCALES: Final[tuple[Scale, ...]] = ("over", "times", "query", "key", "none", "root on both", "after the mask")


class Spelled(nn.Module):
    """A target attends to a history, in one spelling, with a head around it.

    Args:
        layout: name of a method below.
        mask: name of one of `MASKS`.
        scale: where the logits are scaled.
        softmax32: whether queries and keys are in float16 and the softmax in float32.
    """

    def __init__(self, layout: str, mask: str, scale: Scale, softmax32: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout, self.mask, self.scale, self.softmax32 = layout, MASKS[mask], scale, softmax32
        shared = WIDTH if layout != "multi_query" else DEPTH
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, shared), nn.Linear(WIDTH, shared)
        self.top = nn.Linear(WIDTH, 1)

    def forward(self, history: Tensor, kept: Tensor, bias: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        q, k, v = self.q(target), self.k(history), self.v(history)
        if self.scale in ("query", "root on both"):
            q = q * (DEPTH**-0.5 if self.scale == "query" else DEPTH**-0.25)
        if self.scale in ("key", "root on both"):
            k = k * (DEPTH**-0.5 if self.scale == "key" else DEPTH**-0.25)
        if self.softmax32:
            q, k = q.half(), k.half()
        out: Tensor = getattr(self, self.layout)(q, k, v, Facts(kept, bias, lengths))
        unused = (kept.sum() + lengths.sum()) * 0 + bias.sum() * 0  # every layout and mask has the same inputs
        return (self.top(out) + target.mean(1, keepdim=True) + unused).squeeze(1)

    def weights(self, logits: Tensor, facts: Facts, dim: int = -1) -> Tensor:
        """Softmax over the history, which the masks expect to be the last axis."""
        moved = logits.transpose(dim, -1)
        if self.scale == "over":
            moved = moved / math.sqrt(DEPTH)
        elif self.scale == "times":
            moved = moved * DEPTH**-0.5
        if self.softmax32:
            moved = moved.float()
        moved = self.mask(moved, facts)
        if self.scale == "after the mask":
            moved = moved * 0.7
        return torch.softmax(moved.transpose(dim, -1), dim=dim)

    # Layouts

    def heads_by_view(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        q, k, v = (x.reshape(x.shape[0], -1, HEADS, DEPTH).transpose(1, 2) for x in (q, k, v))
        out = self.weights(q @ k.transpose(-2, -1), facts) @ v
        return out.transpose(1, 2).reshape(out.shape[0], WIDTH)

    def heads_in_batch(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        batch, length = k.shape[:2]
        q = q.reshape(batch * HEADS, 1, DEPTH)
        k, v = (x.view(batch, length, HEADS, DEPTH).transpose(1, 2).reshape(-1, length, DEPTH) for x in (k, v))
        logits = torch.bmm(q, k.transpose(1, 2)).view(batch, HEADS, 1, length)
        weights = self.weights(logits, facts).view(batch * HEADS, 1, length)
        return torch.bmm(weights, v).view(batch, WIDTH)

    def one_head(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        return torch.bmm(self.weights(torch.bmm(q.unsqueeze(1), k.transpose(1, 2)), facts), v).squeeze(1)

    def keys_first(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        weights = self.weights(k @ q.unsqueeze(-1), facts, dim=1)
        return (v.transpose(1, 2) @ weights).squeeze(-1)

    def einsum(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        q, k, v = (x.unflatten(-1, (HEADS, DEPTH)) for x in (q, k, v))
        weights = self.weights(torch.einsum("nhd,nlhd->nhl", q, k), facts)
        return torch.einsum("nlhe,nhl->nhe", v, weights).flatten(1)

    def einsum_other_letters(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        q, k, v = (x.reshape(x.shape[0], -1, DEPTH, HEADS) for x in (q, k, v))  # heads vary fastest
        weights = self.weights(torch.einsum("zyxw,zaxw->zway", k, q), facts)
        return torch.einsum("cfba,cabd->cdfa", weights.permute(0, 2, 3, 1), v.permute(0, 3, 1, 2)).flatten(1)

    def multiply_and_sum(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        weights = self.weights((q.unsqueeze(1) * k).sum(-1), facts)
        return (weights.unsqueeze(-1) * v).sum(1)

    def expanded(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        q = q.unsqueeze(1).expand(-1, k.shape[1], -1)
        weights = self.weights((q * k).sum(-1), facts)
        return torch.sum(weights.unsqueeze(2).expand(-1, -1, v.shape[2]) * v, dim=1)

    def indexed(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        weights = self.weights((k @ q[:, :, None])[..., 0], facts)
        return (weights[:, None, :] @ v)[:, 0]

    def exponentials(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        logits = MASKS["bias"](torch.bmm(q.unsqueeze(1), k.transpose(1, 2)), facts)
        raised = torch.exp(logits - logits.max(-1, keepdim=True).values)
        return torch.bmm(raised / raised.sum(-1, keepdim=True), v).squeeze(1)

    def guarded(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        logits = torch.bmm(q.unsqueeze(1), k.transpose(1, 2))
        logits = MASKS["where -1e9"](logits, facts)
        raised = torch.exp(logits - logits.max(-1, keepdim=True)[0])
        return torch.bmm(raised / (raised.sum(-1, keepdim=True) + 1e-9), v).squeeze(1)

    def guarded_apart(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        logits = MASKS["where -inf"](torch.bmm(q.unsqueeze(1), k.transpose(1, 2)), facts)
        raised = torch.exp(logits - logits.amax(2).unsqueeze(2))
        return torch.bmm(raised / (1e-12 + raised.sum(2)[..., None]), v).squeeze(1)

    def clamped(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        logits = torch.bmm(k, q.unsqueeze(2))
        raised = torch.exp(logits - logits.max(1, keepdim=True)[0])
        return torch.bmm((raised / raised.sum(1, keepdim=True).clamp(min=1e-6)).transpose(1, 2), v).squeeze(1)

    def log_softmax(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        logits = MASKS["bias"](torch.bmm(q.unsqueeze(1), k.transpose(1, 2)), facts)
        return torch.bmm(torch.log_softmax(logits, -1).exp(), v).squeeze(1)

    def multi_query(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> Tensor:
        weights = self.weights(q.view(q.shape[0], HEADS, DEPTH) @ k.transpose(1, 2), facts)
        return (weights @ v).flatten(1)


LAYOUTS: Final = (
    "heads_by_view",
    "heads_in_batch",
    "one_head",
    "keys_first",
    "einsum",
    "einsum_other_letters",
    "multiply_and_sum",
    "expanded",
    "indexed",
    "multi_query",
)


class Library(nn.Module):
    """The same by torch's own modules: `mha`, `mha, sequence first`, `sdpa`, `sdpa, causal flag`, `decoder`."""

    def __init__(self, kind: str, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.masked = kind, masked
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=kind != "mha, sequence first")
        self.decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 16, batch_first=True)
        self.top = nn.Linear(WIDTH, 1)

    def forward(self, history: Tensor, kept: Tensor, bias: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        unused = (kept.sum() + lengths.sum()) * 0 + bias.sum() * 0
        query, padding = target.unsqueeze(1), ~kept if self.masked else None
        if self.kind == "mha":
            out = self.mha(query, history, history, key_padding_mask=padding)[0]
        elif self.kind == "mha, sequence first":
            x = history.transpose(0, 1)
            out = self.mha(query.transpose(0, 1), x, x, key_padding_mask=padding, need_weights=False)[0].transpose(0, 1)
        elif self.kind == "decoder":
            out = self.decoder(query, history, memory_key_padding_mask=padding)
        else:
            q, k = (x.unflatten(-1, (HEADS, DEPTH)).transpose(1, 2) for x in (query, history))
            mask = kept[:, None, None, :] if self.masked else None
            out = F.scaled_dot_product_attention(q, k, k, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.top(out.squeeze(1)).squeeze(1) + target.mean(1) + unused


def to_onnx(module: nn.Module, exporter: Exporter, inputs: Sequence[TensorSpec] = INPUTS) -> onnx.ModelProto:
    """`module` exported pointwise by one of torch's exporters, with `INPUTS` or those of a fixed length."""
    sizes = {"batch": 3, "seq": 5}
    shapes = {s.name: [n if isinstance(n, int) else sizes[n] for n in s.shape] for s in inputs}
    example = tuple(torch.ones(shapes[s.name], dtype=getattr(torch, s.dtype)) for s in inputs)
    free = {s.name: {i: n for i, n in enumerate(s.shape) if isinstance(n, str)} for s in inputs}
    file = io.BytesIO()
    dynamic = {"dynamic_shapes": free} if exporter == "dynamo" else {"dynamic_axes": {**free, "scores": {0: "batch"}}}
    fast = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)
        names = [s.name for s in inputs]
        program = torch.onnx.export(
            module.eval(),
            example,
            None if exporter == "dynamo" else file,
            input_names=names,
            output_names=["scores"],
            dynamo=exporter == "dynamo",
            opset_version=18,
            verbose=False,
            **dynamic,  # type: ignore[arg-type]
        )
        torch.backends.mha.set_fastpath_enabled(fast)
    if exporter == "legacy":
        return onnx.load_from_string(file.getvalue())
    assert program is not None
    return program.model_proto
