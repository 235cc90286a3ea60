"""Long and short interest in branches, after SIM (arXiv 2006.05639): hard search by category; a GRU for the rest."""

import torch
from torch import Tensor, nn

from stca.examples.gallery.declared import GalleryModel, Input

ITEMS, CATEGORIES, WIDTH, RECENT = 8000, 50, 32, 20


class LongShort(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH, padding_idx=0)
        self.category = nn.Embedding(CATEGORIES, WIDTH, padding_idx=0)
        self.gru = nn.GRU(2 * WIDTH, WIDTH, batch_first=True)
        self.score = nn.Sequential(nn.Linear(4 * WIDTH, 32), nn.Sigmoid(), nn.Linear(32, 1))
        self.experts = nn.ModuleList(nn.Linear(7 * WIDTH, 64) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(2 * WIDTH, 2) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(64, 1) for _ in range(2))

    def embed(self, item: Tensor, category: Tensor) -> Tensor:
        return torch.cat([self.item(item), self.category(category)], dim=-1)

    def forward(self, items: Tensor, categories: Tensor, item: Tensor, category: Tensor) -> dict[str, Tensor]:
        history, target = self.embed(items, categories), self.embed(item, category)
        # Long: only events of the candidate's category count.
        found = (categories == category[:, None]) & (items > 0)
        long = (history * found.unsqueeze(-1)).sum(1) / found.sum(1, keepdim=True).clamp(min=1)
        # Short: the last events in order, and attention over them.
        recent = history[:, -RECENT:]
        hidden, last = self.gru(recent)
        query = target.unsqueeze(1).expand(-1, hidden.shape[1], -1)
        logits = self.score(torch.cat([hidden, recent[..., :WIDTH], query], dim=-1)).squeeze(-1)
        logits = torch.where(items[:, -RECENT:] > 0, logits, torch.full_like(logits, -(2.0**31)))
        short = (torch.softmax(logits, dim=1).unsqueeze(-1) * hidden).sum(1)
        x = torch.cat([long, short, last[0], target, short * target[:, :WIDTH]], dim=1)
        experts = torch.stack([torch.relu(expert(x)) for expert in self.experts], dim=1)
        tasks = [
            head((gate(target).softmax(-1).unsqueeze(-1) * experts).sum(1)).squeeze(1).sigmoid()
            for gate, head in zip(self.gates, self.heads, strict=True)
        ]
        return {"click": tasks[0], "buy": tasks[1]}


MODEL = GalleryModel(
    style="long and short branches, mixture of experts, two tasks",
    module=LongShort,
    inputs={
        "items": Input("int64", ("batch", 200), "user", ITEMS),
        "categories": Input("int64", ("batch", 200), "user", CATEGORIES),
        "item": Input("int64", ("batch",), "target", ITEMS),
        "category": Input("int64", ("batch",), "target", CATEGORIES),
    },
    history=200,
    outputs=("click", "buy"),
)
