"""Stacked target-to-history cross-attention, pointwise, in Einsum: keys and values are projected per head."""

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, ACTIONS, WIDTH, HEADS, LAYERS = 10_000, 4, 64, 4, 2


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.norm = RmsNorm()
        self.ffn = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        q = self.q(self.norm(x)).unflatten(-1, (HEADS, -1))
        k, v = (w(history).unflatten(-1, (HEADS, -1)) for w in (self.k, self.v))
        logits = torch.einsum("bhd,blhd->bhl", q, k) * q.shape[-1] ** -0.5
        weights = (logits + (1.0 - mask[:, None, :]) * -1e9).softmax(dim=-1)
        attended = self.o(torch.einsum("bhl,blhd->bhd", weights, v).flatten(1))
        return x + self.ffn(torch.cat([x, attended], dim=-1))


class PointwiseStca(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH, padding_idx=0)
        self.action = nn.Embedding(ACTIONS, WIDTH)
        self.encode = nn.Sequential(nn.Linear(2 * WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))
        self.layers = nn.ModuleList(CrossAttention() for _ in range(LAYERS))
        self.top = nn.Linear(WIDTH, 1)

    def forward(self, items: Tensor, actions: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        history = self.encode(torch.cat([self.item(items), self.action(actions)], dim=-1))
        x = self.item(target)
        for layer in self.layers:
            x = layer(x, history, mask)
        return self.top(x).squeeze(-1)


MODEL = GalleryModel(
    style="STCA pointwise in Einsum, a float mask as an input",
    module=PointwiseStca,
    inputs={
        "items": Input("int64", ("batch", "seq"), "user", ITEMS),
        "actions": Input("int64", ("batch", "seq"), "user", ACTIONS),
        "mask": Input("float32", ("batch", "seq"), "user", limit=2),
        "target": Input("int64", ("batch",), "target", ITEMS),
    },
    history=256,
)
