"""Behavior Sequence Transformer (arXiv 1905.06874): the candidate joins the sequence, a transformer layer reads it."""

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, WIDTH, LENGTH, PROFILE = 5000, 32, 20, 12


class Bst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH)
        self.position = nn.Embedding(LENGTH + 1, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=64, dropout=0.1, batch_first=True)
        self.profile = nn.Linear(PROFILE, WIDTH)
        self.top = nn.Sequential(
            nn.Linear((LENGTH + 2) * WIDTH, 128), nn.LeakyReLU(), nn.Linear(128, 32), nn.LeakyReLU(), nn.Linear(32, 1)
        )

    def forward(self, history: Tensor, profile: Tensor, target: Tensor) -> Tensor:
        sequence = torch.cat([self.item(history), self.item(target).unsqueeze(1)], dim=1)
        sequence = sequence + self.position(torch.arange(LENGTH + 1, device=history.device))
        sequence = self.layer(sequence)
        x = torch.cat([sequence.flatten(1), self.profile(profile)], dim=1)
        return torch.sigmoid(self.top(x))


MODEL = GalleryModel(
    style="BST: target appended, nn.TransformerEncoderLayer",
    module=Bst,
    inputs={
        "history": Input("int64", ("batch", LENGTH), "user", ITEMS),
        "profile": Input("float32", ("batch", PROFILE), "user"),
        "target": Input("int64", ("batch",), "target", ITEMS),
    },
    history=LENGTH,
)
