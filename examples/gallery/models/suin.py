"""SUIN (arXiv 2604.23810): the histories of similar users behind the user's own, in one attention.

A neighbour's similarity is a bias on its logits; positions depend on whose history it is, and not on the target.
"""

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, NEIGHBOURS, EACH, WIDTH, HEADS = 10_000, 4, 50, 64, 4


class Suin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item, self.own = nn.Embedding(ITEMS, WIDTH, padding_idx=0), nn.Parameter(torch.zeros(WIDTH))
        self.place = nn.Parameter(torch.randn(NEIGHBOURS, EACH, WIDTH) * 0.1)
        self.beta = nn.Parameter(torch.ones(HEADS))
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.top = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def forward(self, history: Tensor, others: Tensor, similarity: Tensor, target: Tensor) -> Tensor:
        batch = history.shape[0]
        theirs = (self.item(others) + self.place).flatten(1, 2)
        tokens = torch.cat([self.item(history) + self.own, theirs], dim=1)
        none = torch.cat([history, others.flatten(1)], dim=1) == 0
        theirs_bias = similarity.repeat_interleave(EACH, dim=1)
        bias = torch.cat([torch.zeros_like(history, dtype=torch.float32), theirs_bias], dim=1)
        q, k, v = self.q(self.item(target))[:, None], self.k(tokens), self.v(tokens)
        q, k, v = (x.view(batch, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for x in (q, k, v))
        logits = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        logits = logits + self.beta[:, None, None] * bias[:, None, None]
        weights = logits.masked_fill(none[:, None, None], -1e9).softmax(-1)
        read = (weights @ v).transpose(1, 2).reshape(batch, WIDTH)
        return self.top(torch.cat([read, self.item(target)], dim=-1)).squeeze(-1)


MODEL = GalleryModel(
    style="SUIN: similar users' histories in one attention, their similarity a bias",
    module=Suin,
    inputs={
        "history": Input("int64", ("batch", "seq"), "user", ITEMS),
        "others": Input("int64", ("batch", NEIGHBOURS, EACH), "user", ITEMS),
        "similarity": Input("float32", ("batch", NEIGHBOURS), "user"),
        "target": Input("int64", ("batch",), "target", ITEMS),
    },
    history=128,
)
