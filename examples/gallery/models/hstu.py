"""HSTU-like attention (arXiv 2402.17152): SiLU instead of softmax, a relative bias, a gate; the candidate is dotted."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, WIDTH, HEADS, LENGTH, BLOCKS = 8000, 64, 4, 64, 2


class HstuLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.uvqk = nn.Parameter(torch.randn(WIDTH, 4 * WIDTH) * 0.05)
        self.bias = nn.Parameter(torch.randn(2 * LENGTH - 1) * 0.02)
        self.out = nn.Linear(WIDTH, WIDTH)

    def relative_bias(self, n: int) -> Tensor:
        place = torch.arange(n, device=self.bias.device)
        return self.bias[place[None, :] - place[:, None] + LENGTH - 1]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, _ = x.shape
        u, v, q, k = torch.split(F.silu(F.layer_norm(x, [WIDTH]) @ self.uvqk), WIDTH, dim=-1)
        q, k = (t.view(b, n, HEADS, WIDTH // HEADS) for t in (q, k))
        weights = F.silu(torch.einsum("bnhd,bmhd->bhnm", q, k) + self.relative_bias(n)[None, None]) / LENGTH
        weights = weights * mask
        attended = torch.einsum("bhnm,bmhd->bnhd", weights, v.reshape(b, n, HEADS, WIDTH // HEADS)).reshape(b, n, WIDTH)
        return x + self.out(u * F.layer_norm(attended, [WIDTH]))


class Hstu(nn.Module):
    causal: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH, padding_idx=0)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(HstuLayer() for _ in range(BLOCKS))
        self.register_buffer("causal", torch.tril(torch.ones(LENGTH, LENGTH)), persistent=False)

    def forward(self, past_ids: Tensor, candidate_ids: Tensor) -> Tensor:
        n = past_ids.size(1)
        valid = (past_ids != 0).unsqueeze(-1).float()
        x = (self.item(past_ids) * WIDTH**0.5 + self.position.weight[:n]) * valid
        for layer in self.layers:
            x = layer(x, self.causal[:n, :n]) * valid
        user = F.normalize(x[:, -1], dim=-1, eps=1e-6)
        return (user * F.normalize(self.item(candidate_ids), dim=-1, eps=1e-6)).sum(-1) / 0.05


MODEL = GalleryModel(
    style="HSTU-like: SiLU attention, relative bias, gate",
    module=Hstu,
    inputs={
        "past_ids": Input("int64", ("batch", "seq"), "user", ITEMS),
        "candidate_ids": Input("int64", ("batch",), "target", ITEMS),
    },
    history=LENGTH,
)
