"""SASRec (arXiv 1808.09781): causal self-attention over the history, a dot product with the candidate."""

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, WIDTH, LENGTH, BLOCKS, HEADS = 8000, 64, 50, 2, 2


class PointWiseFeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, kernel_size=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.conv1(x.transpose(-1, -2)))).transpose(-1, -2)


class SasRec(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH, padding_idx=0)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, eps=1e-8) for _ in range(BLOCKS))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS) for _ in range(BLOCKS))
        self.forwards = nn.ModuleList(PointWiseFeedForward(WIDTH) for _ in range(BLOCKS))
        self.last = nn.LayerNorm(WIDTH, eps=1e-8)

    def encode(self, seq: Tensor) -> Tensor:
        x = self.item(seq) * WIDTH**0.5
        x = x + self.position(torch.arange(seq.shape[1], device=seq.device).unsqueeze(0).expand_as(seq))
        pad = (seq == 0).unsqueeze(-1)
        x = x.masked_fill(pad, 0.0)
        causal = ~torch.tril(torch.ones((seq.shape[1], seq.shape[1]), dtype=torch.bool, device=seq.device))
        for norm, attention, forward in zip(self.norms, self.attentions, self.forwards, strict=True):
            x = x.transpose(0, 1)
            query = norm(x)
            x = query + attention(query, x, x, attn_mask=causal, need_weights=False)[0]
            x = forward(x.transpose(0, 1)).masked_fill(pad, 0.0)
        return self.last(x)

    def forward(self, input_seq: Tensor, candidate: Tensor) -> Tensor:
        return (self.encode(input_seq)[:, -1] * self.item(candidate)).sum(-1)


MODEL = GalleryModel(
    style="SASRec: causal self-attention, dot product",
    module=SasRec,
    inputs={
        "input_seq": Input("int64", ("batch", LENGTH), "user", ITEMS),
        "candidate": Input("int64", ("batch",), "target", ITEMS),
    },
    history=LENGTH,
)
