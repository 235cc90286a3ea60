"""IAT (arXiv 2604.08933): past instances, compressed offline, as a second history beside the user's behaviour.

The query is made of the target and the request's own features, as in the paper; tables and widths are smaller.
"""

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, INSTANCES, LABELS, HOURS, WIDTH = 10_000, 20_000, 8, 24, 64


class Attention(nn.Module):
    """One query over tokens of any width."""

    def __init__(self, query: int, tokens: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(query, WIDTH), nn.Linear(tokens, WIDTH), nn.Linear(tokens, WIDTH)

    def forward(self, query: Tensor, tokens: Tensor, none: Tensor) -> Tensor:
        logits = torch.einsum("bd,bld->bl", self.q(query), self.k(tokens)) * WIDTH**-0.5
        weights = logits.masked_fill(none, torch.finfo(logits.dtype).min).softmax(dim=-1)
        return torch.einsum("bl,bld->bd", weights, self.v(tokens))


class Iat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.compressed = nn.Embedding(INSTANCES, WIDTH, padding_idx=0)
        self.adapter, self.side = nn.Linear(WIDTH, WIDTH), nn.Embedding(LABELS, WIDTH)
        self.item, self.hour = nn.Embedding(ITEMS, WIDTH, padding_idx=0), nn.Embedding(HOURS, WIDTH)
        self.compress = nn.Sequential(nn.Linear(2 * WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, 2 * WIDTH))
        self.instances, self.behaviour = Attention(2 * WIDTH, 2 * WIDTH), Attention(2 * WIDTH, WIDTH)
        self.top = nn.Sequential(nn.Linear(4 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def forward(self, instance: Tensor, label: Tensor, history: Tensor, hour: Tensor, target: Tensor) -> Tensor:
        adapted = self.adapter(self.compressed(instance)).sigmoid()
        tokens = torch.cat([adapted, self.side(label)], dim=-1)
        query = self.compress(torch.cat([self.item(target), self.hour(hour)], dim=-1))
        far = self.instances(query, tokens, instance == 0)
        near = self.behaviour(query, self.item(history), history == 0)
        return self.top(torch.cat([far, near, query], dim=-1)).squeeze(-1)


MODEL = GalleryModel(
    style="IAT: compressed instances beside behaviour, the request in the query",
    module=Iat,
    inputs={
        "instance": Input("int64", ("batch", 256), "user", INSTANCES),
        "label": Input("int64", ("batch", 256), "user", LABELS),
        "history": Input("int64", ("batch", "seq"), "user", ITEMS),
        "hour": Input("int64", ("batch",), "request", HOURS),
        "target": Input("int64", ("batch",), "target", ITEMS),
    },
    history=512,
)
