"""Attention spelled out, softmax(q kᵀ / √d) v, with heads made by view and transpose and a model around it."""

import math

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, FIELDS, WIDTH, HEADS = 8000, (9, 21, 3), 64, 2


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1, HEADS, WIDTH // HEADS).transpose(1, 2)

    def forward(self, query: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(self.wq(query)), self.heads(self.wk(x)), self.heads(self.wv(x))
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(WIDTH // HEADS)
        scores = scores.masked_fill(mask == 0, -1e9)
        out = torch.matmul(torch.softmax(scores, dim=-1), v)
        return out.transpose(1, 2).contiguous().view(x.size(0), -1, WIDTH)


class ByHand(nn.Module):
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH, padding_idx=0)
        self.field = nn.Embedding(sum(FIELDS), WIDTH)
        self.register_buffer("offset", torch.tensor([0, FIELDS[0], FIELDS[0] + FIELDS[1]]))
        self.attention = MultiHead()
        self.top = nn.Sequential(nn.Linear(5 * WIDTH, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))

    def forward(self, hist: Tensor, fields: Tensor, item: Tensor) -> Tensor:
        query = self.item(item).unsqueeze(1)
        attended = self.attention(query, self.item(hist), (hist != 0)[:, None, None, :])
        profile = self.field(fields + self.offset).flatten(1)
        return self.top(torch.cat([profile, attended.squeeze(1), query.squeeze(1)], dim=-1)).squeeze(-1)


MODEL = GalleryModel(
    style="softmax(q k^T / sqrt(d)) v by hand, fields with offsets",
    module=ByHand,
    inputs={
        "hist": Input("int64", ("batch", "seq"), "user", ITEMS),
        "fields": Input("int64", ("batch", 3), "user", min(FIELDS)),
        "item": Input("int64", ("batch",), "target", ITEMS),
    },
    history=128,
)
