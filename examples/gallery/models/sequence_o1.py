"""SequenceO1 (arXiv 2609.08443): a long history as a sketch of fixed size, beside recent events.

Public notes leave open what the second layer's prototypes are: here, the first layer's sketch.
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
    """Each token is shared out among the slots by a softmax over the slots, so that sums over tokens are additive."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(NARROW, NARROW, bias=False) for _ in range(2))
        self.ffn, self.norm = SwiGlu(NARROW), nn.LayerNorm(NARROW)

    def forward(self, slots: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        shares = torch.einsum("bkd,bld->bkl", self.q(slots), self.k(tokens)) / NARROW**0.5
        slots = slots + (shares.softmax(dim=1) * mask[:, None, :]) @ tokens / 16
        return self.norm(slots + self.ffn(slots))


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, query: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        logits = (self.q(query)[:, None] @ self.k(tokens).transpose(1, 2)) / WIDTH**0.5
        logits = logits if mask is None else logits.masked_fill(mask[:, None] == 0, -1e9)
        return (logits.softmax(dim=-1) @ self.v(tokens))[:, 0]


class SequenceO1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item, self.action = nn.Embedding(ITEMS, NARROW, padding_idx=0), nn.Embedding(ACTIONS, NARROW)
        self.prototypes = nn.Parameter(torch.randn(1, SLOTS, NARROW))
        self.sketches = nn.ModuleList(Sketch() for _ in range(2))
        self.adapter, self.recent, self.target = (nn.Linear(NARROW, WIDTH) for _ in range(3))
        self.far, self.near = CrossAttention(), CrossAttention()
        self.top = nn.Sequential(nn.Linear(3 * WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))

    def forward(self, items: Tensor, actions: Tensor, last: Tensor, target: Tensor) -> Tensor:
        tokens, mask = self.item(items) + self.action(actions), (items != 0).float()
        slots = self.prototypes.expand(items.shape[0], -1, -1)
        for sketch in self.sketches:
            slots = sketch(slots, tokens, mask)
        query = self.target(self.item(target))
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
