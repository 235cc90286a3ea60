"""GRU4Rec (arXiv 1511.06939) with lengths: the state after the last real event scores the candidate."""

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, WIDTH, LENGTH = 8000, 64, 50


class Gru4Rec(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH, padding_idx=0)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Embedding(ITEMS, 1)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, item: Tensor) -> Tensor:
        output, _ = self.gru(self.item(item_seq))
        output = self.project(output)
        last = (item_seq_len - 1).view(-1, 1, 1).expand(-1, -1, output.shape[-1])
        user = output.gather(dim=1, index=last).squeeze(1)
        return torch.mul(user, self.item(item)).sum(dim=1) + self.bias(item).squeeze(1)


MODEL = GalleryModel(
    style="GRU with lengths, last state, dot product",
    module=Gru4Rec,
    inputs={
        "item_seq": Input("int64", ("batch", LENGTH), "user", ITEMS),
        "item_seq_len": Input("int64", ("batch",), "user", LENGTH + 1, least=1),
        "item": Input("int64", ("batch",), "target", ITEMS),
    },
    history=LENGTH,
)
