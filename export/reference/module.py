"""The reference STCA in PyTorch (arXiv 2511.06077), ragged and request-level: one history, many targets, per request.

Every tensor is packed: history tokens `[N_h, …]` and targets `[N_t, …]` of all requests one after the other, with
int32 offsets `[B + 1]`. Nothing is padded, and no history token looks at another one, which is why the user side can
be computed once, cached and appended to exactly.

Weights are stored `[in, out]` so that `x @ W` exports as one MatMul on the very tensor of the checkpoint: an ONNX
initializer and a checkpoint tensor are then the same bytes, and new weights go into an old graph without a new export.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stca.plugins.torch_op  # noqa: F401  registers torch.ops.stca.target_history_attention
from stca.errors import CheckpointError
from stca.export.reference.config import StcaConfig
from stca.specs import OFFSETS, TARGETS, TOKENS, USERS, ScopeName, TensorSpec

AttentionForm = Literal["projected", "absorbed"]

# A duration's bucket is how many powers of two, in seconds, it has reached; the last, 2^23 s, is 97 days.
TIME_BUCKETS = 25


def request_inputs(config: StcaConfig) -> tuple[TensorSpec, ...]:
    """The request graph's inputs for `config`, in order, with dtype, symbolic shape, scope and id limit."""

    def ids(name: str, rows: str, scope: ScopeName, limit: int | None) -> TensorSpec:
        return TensorSpec(name=name, dtype="int64", shape=(rows,), scope=scope, limit=limit)

    def offsets(name: str, scope: ScopeName) -> TensorSpec:
        return TensorSpec(name=name, dtype="int32", shape=(OFFSETS,), scope=scope)

    return (
        ids("history_item", TOKENS, "user", config.items),
        *(ids(f"history_{f.name}", TOKENS, "user", f.size) for f in config.history_fields),
        ids("history_time", TOKENS, "user", None),
        ids("history_gap", TOKENS, "user", None),
        offsets("history_offsets", "user"),
        *(ids(f"user_{f.name}", USERS, "user", f.size) for f in config.user_fields),
        *(ids(f"request_{f.name}", USERS, "request", f.size) for f in config.request_fields),
        *([ids("request_time", USERS, "request", None)] if config.time == "delta" else []),
        ids("target_item", TARGETS, "target", config.items),
        *(ids(f"target_{f.name}", TARGETS, "target", f.size) for f in config.target_fields),
        offsets("target_offsets", "target"),
    )


def count_reached(values: Tensor, thresholds: Tensor) -> Tensor:
    """How many of `thresholds [K]` each of `values [N]` has reached, int64 `[N]`.

    Buckets are found with integer comparisons alone: a logarithm or a division in floating point rounds
    differently in each precision, and one token in the wrong bucket is no rounding error.
    """
    return (values.unsqueeze(1) >= thresholds).to(torch.int64).sum(dim=1)


def segment_of(rows: int, offsets: Tensor) -> Tensor:
    """Which request each of `rows` packed rows belongs to, int64 `[rows]`, from offsets `[B + 1]`, in O(rows + B).

    Each request that has rows puts a mark on its first one. The marks up to a row number the request among those that
    have rows, and a table has its place among all. Requests without rows write behind the rest, each to a place of its
    own: engines differ on writes to one place, and TensorRT has no scatter that adds them up. Rows that the offsets
    leave out belong to the last request before them, or to the first.

    B is counted and not asked of a shape: the exporter would ask any input that has it, a target's perhaps, and then
    the history would depend on the targets.
    """
    begins, ends = offsets[:-1].to(torch.int64), offsets[1:].to(torch.int64)
    row = torch.arange(rows, device=offsets.device)
    none = ends - ends
    counted = (none + 1).cumsum(0)
    requests, request = (none + 1).sum(), counted - 1
    some = ends > begins
    number = torch.where(some, some.to(torch.int64).cumsum(0), requests + counted)
    table = torch.cat([(requests - requests)[None], none, none]).scatter(0, number, request)
    first = torch.where(some, begins, rows + request)
    marks = torch.cat([torch.zeros(rows, dtype=torch.int64, device=offsets.device), none]).scatter(0, first, none + 1)
    # Picked and not cut off: of a cut, the exporter does not see that it has as many rows as there are.
    return table.index_select(0, marks.cumsum(0).index_select(0, row))


class Projection(nn.Module):
    """`x @ weight (+ bias)` with `weight [in, out]`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class SwiGluFfn(nn.Module):
    """`((x W_u) ⊙ Swish(x W_v)) W_o` (arXiv 2511.06077), `[…, d] → […, d]` through a hidden width of `r · d`."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.up = Projection(width, expansion * width)
        self.gate = Projection(width, expansion * width)
        self.out = Projection(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.up(x) * F.silu(self.gate(x)))
        return y


class CrossAttention(nn.Module):
    """One STCA layer: the target's query over its request's encoded history.

    `α = softmax(q W_Q (X̃ W_K)ᵀ / √d_h)`, `o = [α_1 X̃ W_V,1 ‖ …] W_O`, with `X̃ = LN(SwiGLUFFN(X))` of its own per layer.
    """

    def __init__(self, config: StcaConfig) -> None:
        super().__init__()
        d = config.width
        self.heads, self.head_width = config.heads, config.head_width
        self.history_ffn = SwiGluFfn(d, config.ffn_expansion)
        self.history_norm = nn.LayerNorm(d)
        self.query, self.key, self.value, self.out = (Projection(d, d) for _ in range(4))

    def encode(self, history: Tensor, form: AttentionForm) -> tuple[Tensor, Tensor]:
        """The user side: X `[N_h, d]` → key and value, `[N_h, h, d_h]` projected or one X̃ `[N_h, 1, d]` absorbed."""
        encoded = self.history_norm(self.history_ffn(history))
        if form == "absorbed":
            tied = encoded.unsqueeze(1)
            return tied, tied
        shape = (-1, self.heads, self.head_width)
        return self.key(encoded).view(shape), self.value(encoded).view(shape)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        target_offsets: Tensor,
        history_offsets: Tensor,
        form: AttentionForm,
    ) -> Tensor:
        """The target side: `query [N_t, d]` over `encode`'s key and value → `o [N_t, d]`."""
        h, d_h = self.heads, self.head_width
        q = self.query(query).view(-1, h, d_h)
        if form == "absorbed":  # fold W_K into the query: q_j W_K,jᵀ is [N_t, h, d], the history needs no projection
            q = torch.einsum("thd,chd->thc", q, self.key.weight.view(-1, h, d_h))
        lengths = history_offsets[1:] - history_offsets[:-1]
        o: Tensor = torch.ops.stca.target_history_attention(
            q, key, value, target_offsets, history_offsets, lengths, 1.0 / math.sqrt(d_h)
        )
        if form == "absorbed":  # and W_V into the output
            o = torch.einsum("thc,chd->thd", o, self.value.weight.view(-1, h, d_h))
        y: Tensor = self.out(o.reshape(-1, h * d_h))
        return y


class MixerBlock(nn.Module):
    """One RankMixer block (arXiv 2507.15551): `S = LN(Mix(X) + X)`, `X' = LN(PFFN(S) + S)` on tokens `[T, N, D]`.

    Mix hands head i of token j to token i as its head j; PFFN is a GELU MLP with weights of its own per token. Tokens
    come first so that PFFN is a batched product without a transpose, which ONNX Runtime (1.31) would fuse into one
    that divides by zero when there are no targets.
    """

    def __init__(self, tokens: int, width: int, expansion: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.mix_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        hidden = expansion * width
        self.weight_in = nn.Parameter(torch.randn(tokens, width, hidden) / math.sqrt(width))
        self.bias_in = nn.Parameter(torch.zeros(tokens, 1, hidden))
        self.weight_out = nn.Parameter(torch.randn(tokens, hidden, width) / math.sqrt(hidden))
        self.bias_out = nn.Parameter(torch.zeros(tokens, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        t, width = self.tokens, x.shape[2]
        mixed = x.view(t, -1, t, width // t).transpose(0, 2).reshape(t, -1, width)
        s = self.mix_norm(mixed + x)
        hidden = F.gelu(s @ self.weight_in + self.bias_in)
        y: Tensor = self.ffn_norm(hidden @ self.weight_out + self.bias_out + s)
        return y


class Stca(nn.Module):
    """History and targets in, one probability per task out. `form` picks the attention's exact form."""

    durations: Tensor
    hours: Tensor

    def __init__(self, config: StcaConfig, form: AttentionForm = "projected") -> None:
        super().__init__()
        self.config = config
        self.form: AttentionForm = form
        d, w = config.width, config.field_width
        times = ["hour", "gap"] + (["delta"] if config.time == "delta" else [])
        self.register_buffer("durations", torch.tensor([1 << k for k in range(TIME_BUCKETS - 1)]), persistent=False)
        self.register_buffer("hours", torch.arange(3600, 86400, 3600), persistent=False)
        self.item_table = nn.Parameter(torch.randn(config.items, config.item_width) * 0.1)
        tables = {f.name: f.size for f in config.fields()}
        if taken := [n for n in tables if hasattr(nn.ParameterDict(), n)]:  # type, float, keys, …
            raise CheckpointError(f"config: field name {taken[0]!r} is taken by torch's modules; choose another")
        self.field_tables = nn.ParameterDict({n: nn.Parameter(torch.randn(s, w) * 0.1) for n, s in tables.items()})
        time_rows = {"hour": 24, "gap": TIME_BUCKETS, "delta": TIME_BUCKETS}
        self.time_tables = nn.ParameterDict({n: nn.Parameter(torch.randn(time_rows[n], w) * 0.1) for n in times})

        history_width = config.item_width + w * (len(config.history_fields) + len(times))
        target_width = config.item_width + w * len(config.target_fields)
        self.history_in = Projection(history_width, d, bias=True)
        self.target_in = Projection(target_width, d, bias=True)
        self.layers = nn.ModuleList(CrossAttention(config) for _ in range(config.layers))
        # Query i looks at x_t and the i - 1 outputs before it; the first one at x_t alone, without W_C.
        self.query_in = nn.ModuleList(Projection((i + 1) * d, d) for i in range(1, config.layers))
        self.query_ffn = nn.ModuleList(SwiGluFfn(d, config.ffn_expansion) for _ in range(config.layers))
        self.query_norm = nn.ModuleList(nn.LayerNorm(d) for _ in range(config.layers))
        self.summary_in = Projection((config.layers + 1) * d, d)
        self.summary_ffn = SwiGluFfn(d, config.ffn_expansion)

        token_widths = [d, *[w] * (len(config.user_fields) + len(config.request_fields)), config.item_width]
        token_widths += [w] * len(config.target_fields)
        self.token_in = nn.ModuleList(Projection(n, config.mixer_width, bias=True) for n in token_widths)
        self.mixer = nn.ModuleList(
            MixerBlock(config.tokens, config.mixer_width, config.mixer_expansion) for _ in range(config.mixer_layers)
        )
        self.task_out = Projection(config.mixer_width, len(config.tasks), bias=True)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Probabilities `[N_t, tasks]`; `inputs` as `request_inputs(config)` lists them."""
        return torch.sigmoid(self.logits(inputs))

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Log-odds `[N_t, tasks]` before the sigmoid."""
        return self.score_logits(inputs, self.encode(inputs))

    def encode(self, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The user side alone: key and value of every layer, as `CrossAttention.encode` gives them."""
        history = self._history(inputs)
        return [layer.encode(history, self.form) for layer in self.layers]  # type: ignore[operator]

    def score_logits(self, inputs: Mapping[str, Tensor], state: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The target side alone: log-odds `[N_t, tasks]` from `encode`'s state and the history's offsets."""
        target_offsets, history_offsets = inputs["target_offsets"], inputs["history_offsets"]
        item = F.embedding(inputs["target_item"], self.item_table)
        fields = [self._embed(f"target_{f.name}", f.name, inputs) for f in self.config.target_fields]
        target = self.target_in(torch.cat([item, *fields], dim=1))

        outputs: list[Tensor] = []
        for i, (layer, (key, value)) in enumerate(zip(self.layers, state, strict=True)):
            seen = target if i == 0 else self.query_in[i - 1](torch.cat([*outputs, target], dim=1))
            query = self.query_norm[i](self.query_ffn[i](seen))
            outputs.append(layer.attend(query, key, value, target_offsets, history_offsets, self.form))  # type: ignore[operator]
        summary = self.summary_ffn(self.summary_in(torch.cat([*outputs, target], dim=1)))

        segment = segment_of(target.shape[0], target_offsets)
        shared = [self._embed(f"user_{f.name}", f.name, inputs) for f in self.config.user_fields]
        shared += [self._embed(f"request_{f.name}", f.name, inputs) for f in self.config.request_fields]
        # What a request's targets share is projected once per request, then handed to each of them.
        first_shared, first_target = 1, 1 + len(shared)
        tokens = [self.token_in[0](summary)]
        tokens += [self.token_in[first_shared + i](x).index_select(0, segment) for i, x in enumerate(shared)]
        tokens += [self.token_in[first_target + i](x) for i, x in enumerate([item, *fields])]
        x = torch.stack(tokens)
        for block in self.mixer:
            x = block(x)
        y: Tensor = self.task_out(x.mean(dim=0))
        return y

    def _history(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Raw history tokens X `[N_h, d]`, each from its own event alone."""
        parts = [F.embedding(inputs["history_item"], self.item_table)]
        parts += [self._embed(f"history_{f.name}", f.name, inputs) for f in self.config.history_fields]
        time = inputs["history_time"]
        parts.append(F.embedding(count_reached(time % 86400, self.hours), self.time_tables["hour"]))
        parts.append(F.embedding(count_reached(inputs["history_gap"], self.durations), self.time_tables["gap"]))
        if self.config.time == "delta":
            asked = inputs["request_time"].index_select(0, segment_of(time.shape[0], inputs["history_offsets"]))
            parts.append(F.embedding(count_reached(asked - time, self.durations), self.time_tables["delta"]))
        x: Tensor = self.history_in(torch.cat(parts, dim=1))
        return x

    def _embed(self, name: str, table: str, inputs: Mapping[str, Tensor]) -> Tensor:
        return F.embedding(inputs[name], self.field_tables[table])
