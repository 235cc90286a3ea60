"""`nn.MultiheadAttention` from the candidate to the history, with a key padding mask, as TransAct and kin write it."""

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, SURFACES, WIDTH, HEADS, LENGTH = 8000, 6, 64, 4, 128


class TargetAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH, padding_idx=0)
        self.surface = nn.Embedding(SURFACES, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.cross = nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.top = nn.Sequential(nn.Linear(2 * WIDTH, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, hist: Tensor, hist_surface: Tensor, hist_mask: Tensor, item: Tensor) -> Tensor:
        x = self.item(hist) + self.surface(hist_surface)
        query = self.item(item).unsqueeze(1)
        attended, _ = self.attention(query, x, x, key_padding_mask=~hist_mask)
        x0 = torch.cat([self.norm(attended + query).squeeze(1), query.squeeze(1)], dim=1)
        return self.top(x0 * self.cross(x0) + x0)


MODEL = GalleryModel(
    style="nn.MultiheadAttention from the target, padding mask",
    module=TargetAttention,
    inputs={
        "hist": Input("int64", ("batch", LENGTH), "user", ITEMS),
        "hist_surface": Input("int64", ("batch", LENGTH), "user", SURFACES),
        "hist_mask": Input("bool", ("batch", LENGTH), "user"),
        "item": Input("int64", ("batch",), "target", ITEMS),
    },
    history=LENGTH,
)
