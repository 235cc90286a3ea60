"""A two-tower ranker: pooled history, dense and multi-hot features of the user against features of the item."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, TAGS, CITIES, WIDTH, DENSE = 10_000, 200, 300, 64, 13


class TwoTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH, padding_idx=0)
        self.tag = nn.Embedding(TAGS, WIDTH)
        self.city = nn.Embedding(CITIES, WIDTH)
        self.user_tower = nn.Sequential(nn.Linear(3 * WIDTH + DENSE, 256), nn.ReLU(), nn.Linear(256, WIDTH))
        self.item_tower = nn.Sequential(nn.Linear(WIDTH + 4, 128), nn.ReLU(), nn.Linear(128, WIDTH))
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def forward(
        self,
        watched: Tensor,
        interests: Tensor,
        city: Tensor,
        dense: Tensor,
        item_id: Tensor,
        item_dense: Tensor,
    ) -> Tensor:
        mask = (watched > 0).float().unsqueeze(-1)
        pooled = (self.item(watched) * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        user = self.user_tower(torch.cat([pooled, self.tag(interests).mean(1), self.city(city), dense], dim=1))
        item = self.item_tower(torch.cat([self.item(item_id), item_dense], dim=1))
        return (F.normalize(user, dim=-1) * F.normalize(item, dim=-1)).sum(-1) / self.temperature


MODEL = GalleryModel(
    style="two-tower: pooled history, dense, multi-hot, cosine",
    module=TwoTower,
    inputs={
        "watched": Input("int64", ("batch", "history_len"), "user", ITEMS),
        "interests": Input("int64", ("batch", 8), "user", TAGS),
        "city": Input("int64", ("batch",), "user", CITIES),
        "dense": Input("float32", ("batch", DENSE), "user"),
        "item_id": Input("int64", ("batch",), "target", ITEMS),
        "item_dense": Input("float32", ("batch", 4), "target"),
    },
    history=100,
)
