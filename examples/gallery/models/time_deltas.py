"""Attention that knows how long ago each event was: the request's time less the event's, in logarithmic buckets."""

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, WIDTH, BUCKETS, NOW = 8000, 32, 32, 1_900_000_000


class TimeAware(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH, padding_idx=0)
        self.age = nn.Embedding(BUCKETS, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.hour = nn.Embedding(24, WIDTH)
        self.top = nn.Sequential(nn.Linear(3 * WIDTH, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, hist: Tensor, hist_time: Tensor, request_time: Tensor, item: Tensor) -> Tensor:
        delta = (request_time.unsqueeze(1) - hist_time).clamp(min=0)
        bucket = torch.log2(delta.float() + 1.0).floor().long().clamp(max=BUCKETS - 1)
        x = self.item(hist) + self.age(bucket)
        query = self.item(item)
        logits = torch.bmm(self.key(x), query.unsqueeze(-1)).squeeze(-1) / WIDTH**0.5
        logits = logits.masked_fill(hist == 0, -1e4)
        attended = torch.bmm(logits.softmax(-1).unsqueeze(1), self.value(x)).squeeze(1)
        hour = self.hour(torch.div(request_time, 3600, rounding_mode="floor") % 24)
        return self.top(torch.cat([attended, query, hour], dim=-1))


MODEL = GalleryModel(
    style="time deltas: request time less event time, bucketed",
    module=TimeAware,
    inputs={
        "hist": Input("int64", ("batch", "seq"), "user", ITEMS),
        "hist_time": Input("int64", ("batch", "seq"), "user", NOW),
        "request_time": Input("int64", ("batch",), "request", NOW + 86_400, least=NOW),
        "item": Input("int64", ("batch",), "target", ITEMS),
    },
    history=128,
)
