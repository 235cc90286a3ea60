"""Written for one request at once: a history `[N_h]` of one user and `[N_t]` candidates, no batch axis."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, WIDTH, HEADS = 10_000, 64, 4


class RequestLevel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH)
        self.encode = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.user = nn.Linear(8, WIDTH)
        self.top = nn.Sequential(nn.Linear(3 * WIDTH, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, history: Tensor, profile: Tensor, targets: Tensor) -> Tensor:
        x, query = self.encode(self.item(history)), self.item(targets)
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (self.q(query), self.k(x), self.v(x)))
        logits = torch.einsum("thd,nhd->htn", q, k) / k.shape[-1] ** 0.5
        attended = torch.einsum("htn,nhd->thd", F.softmax(logits, dim=-1), v).flatten(1)
        user = self.user(profile).expand(targets.shape[0], -1)
        return self.top(torch.cat([attended, query, user], dim=-1))


MODEL = GalleryModel(
    style="request level: [N_h] history, [N_t] targets",
    module=RequestLevel,
    inputs={
        "history": Input("int64", ("N_h",), "user", ITEMS),
        "profile": Input("float32", (1, 8), "user"),
        "targets": Input("int64", ("N_t",), "target", ITEMS),
    },
    history=256,
)
