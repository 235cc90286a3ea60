"""Deep Interest Network (arXiv 1706.06978): an MLP scores each event of the history against the candidate."""

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, CATEGORIES, AGES, WIDTH = 5000, 100, 8, 16


class AttentionUnit(nn.Module):
    """Weights of the events, from `[k, q, q - k, q * k]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4 * width, 36), nn.PReLU(), nn.Linear(36, 1))

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        query = query.unsqueeze(1).expand(-1, keys.shape[1], -1)
        weight = self.mlp(torch.cat([keys, query, query - keys, query * keys], dim=-1)).squeeze(-1)
        weight = weight.masked_fill(~mask, 0.0)
        return torch.bmm(weight.unsqueeze(1), keys).squeeze(1)


class Din(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH, padding_idx=0)
        self.category = nn.Embedding(CATEGORIES, WIDTH, padding_idx=0)
        self.age = nn.Embedding(AGES, WIDTH)
        self.attention = AttentionUnit(2 * WIDTH)
        self.top = nn.Sequential(
            nn.Linear(7 * WIDTH, 80), nn.BatchNorm1d(80), nn.PReLU(), nn.Linear(80, 40), nn.PReLU(), nn.Linear(40, 1)
        )

    def forward(self, hist_item: Tensor, hist_category: Tensor, age: Tensor, item: Tensor, category: Tensor) -> Tensor:
        keys = torch.cat([self.item(hist_item), self.category(hist_category)], dim=-1)
        query = torch.cat([self.item(item), self.category(category)], dim=-1)
        interest = self.attention(query, keys, hist_item != 0)
        x = torch.cat([self.age(age), interest, query, interest * query], dim=-1)
        return torch.sigmoid(self.top(x)).squeeze(-1)


MODEL = GalleryModel(
    style="DIN: MLP scorer over [k, q, q-k, q*k]",
    module=Din,
    inputs={
        "hist_item": Input("int64", ("batch", "seq"), "user", ITEMS),
        "hist_category": Input("int64", ("batch", "seq"), "user", CATEGORIES),
        "age": Input("int64", ("batch",), "user", AGES),
        "item": Input("int64", ("batch",), "target", ITEMS),
        "category": Input("int64", ("batch",), "target", CATEGORIES),
    },
    history=100,
)
