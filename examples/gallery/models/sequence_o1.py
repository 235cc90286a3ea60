"""SequenceO1 (arXiv 2609.08443): a long history as a sketch of fixed size, beside recent events.

Public notes leave open what the second layer reads: here, the first layer's sketch, so that tokens are summed up once.
"""

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, ACTIONS, NARROW, WIDTH, SLOTS = 10_000, 4, 32, 64, 64


class SwiGlu(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * nn.functional.silu(self.gate(x)))


class Sketch(nn.Module):
    """Each token is shared out among prototypes by a softmax over these, so that sums over tokens are additive."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(1, slots, width))
        self.q, self.k = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.ffn, self.norm, self.scale = SwiGlu(width), nn.LayerNorm(width), width**-0.5

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        shares = (self.q(self.prototypes) @ self.k(tokens).transpose(1, 2) * self.scale).softmax(dim=1)
        slots = self.prototypes + (shares if mask is None else shares * mask[:, None, :]) @ tokens / 16
        return self.norm(slots + self.ffn(slots))


class CrossAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.scale = width**-0.5

    def forward(self, query: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        logits = (self.q(query)[:, None] @ self.k(tokens).transpose(1, 2)) * self.scale
        logits = logits if mask is None else logits.masked_fill(mask[:, None] == 0, -1e9)
        return (logits.softmax(dim=-1) @ self.v(tokens))[:, 0]


class SequenceO1(nn.Module):
    def __init__(self, narrow: int = NARROW, width: int = WIDTH, slots: int = SLOTS) -> None:
        super().__init__()
        self.item, self.action = nn.Embedding(ITEMS, narrow, padding_idx=0), nn.Embedding(ACTIONS, narrow)
        self.sketches = nn.ModuleList(Sketch(narrow, slots) for _ in range(2))
        self.adapter, self.recent, self.target = (nn.Linear(narrow, width) for _ in range(3))
        self.far, self.near = CrossAttention(width), CrossAttention(width)
        self.top = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, items: Tensor, actions: Tensor, last: Tensor, target: Tensor) -> Tensor:
        tokens, mask = self.item(items) + self.action(actions), (items != 0).float()
        slots, query = self.sketches[1](self.sketches[0](tokens, mask)), self.target(self.item(target))
        far = self.far(query, self.adapter(slots))
        near = self.near(query, self.recent(self.item(last)), (last != 0).float())
        return self.top(torch.cat([far, near, query], dim=-1)).squeeze(-1)


MODEL = GalleryModel(
    style="SequenceO1: a long history's sketch beside recent events",
    module=SequenceO1,
    inputs={
        "items": Input("int64", ("batch", "seq"), "user", ITEMS),
        "actions": Input("int64", ("batch", "seq"), "user", ACTIONS),
        "last": Input("int64", ("batch", 100), "user", ITEMS),
        "target": Input("int64", ("batch",), "target", ITEMS),
    },
    history=1000,
)
