"""Additive attention with positions counted from the end, over int32 ids padded on the left."""

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, WIDTH, LONGEST = 6000, 48, 200


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH, padding_idx=0)
        self.position = nn.Parameter(torch.randn(LONGEST, WIDTH) * 0.1)
        self.w1, self.w2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v = nn.Linear(WIDTH, 1, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.fm_bias = nn.Embedding(ITEMS, 1)

    def forward(self, sequence: Tensor, candidate: Tensor) -> Tensor:
        batch, length = sequence.shape
        ago = torch.arange(length, device=sequence.device).flip(0)
        x = self.item(sequence) + self.position[ago].unsqueeze(0).repeat(batch, 1, 1)
        query = self.item(candidate)
        logits = self.v(torch.tanh(self.w1(x) + self.w2(query)[:, None, :]))
        logits = logits + torch.where(sequence > 0, 0.0, float("-inf")).unsqueeze(-1)
        weights = torch.nan_to_num(torch.softmax(logits, dim=1))
        interest = self.norm(torch.sum(weights * x, dim=1))
        return torch.sigmoid((interest * query).sum(-1, keepdim=True) + self.fm_bias(candidate))


MODEL = GalleryModel(
    style="positions from the end, additive attention, -inf mask",
    module=Positions,
    inputs={
        "sequence": Input("int32", ("batch", "seq"), "user", ITEMS),
        "candidate": Input("int32", ("batch",), "target", ITEMS),
    },
    history=100,
)
