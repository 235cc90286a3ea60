"""Training: request-level loss, sampled history lengths, AdamW; minutes on two cores for the shipped size."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from stca.arrays import Progress
from stca.errors import StcaError
from stca.examples.train.evaluate import ScoreFn
from stca.examples.train.log import Inputs, Log
from stca.examples.train.sampler import LengthSampler, training_batches
from stca.export.reference.config import Field, StcaConfig
from stca.export.reference.module import CrossAttention, Projection, Stca

# Standard deviation the tables start with. What says which events are alike must stand out from what says what
# happened in them, and both from the time: see `attend_to_alike`.
ALIKE_STD = 0.8
OTHER_STD = 0.5


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train. `requests` per step, each with up to `targets` targets that share one history."""

    steps: int = 3000
    requests: int = 8
    targets: int = 64
    lengths: LengthSampler = field(default_factory=LengthSampler)
    learning_rate: float = 2e-3
    item_rate_factor: float = 5.0
    weight_decay: float = 0.01
    seed: int = 0


def model_config(
    log: Log, *, width: int = 64, heads: int = 2, layers: int = 2, time: Literal["log", "delta"] = "log"
) -> StcaConfig:
    """A small model for the log's own vocabularies."""

    def fields(*names: str) -> tuple[Field, ...]:
        return tuple(Field(name, log.sizes[name]) for name in names)

    return StcaConfig(
        items=log.items,
        tasks=log.tasks,
        item_width=width // 2,
        field_width=width // 4,
        history_fields=fields("action", *log.event_fields),
        user_fields=fields(*log.user_fields),
        request_fields=fields(*log.request_fields),
        target_fields=fields(*log.event_fields),
        time=time,
        width=width,
        heads=heads,
        layers=layers,
        ffn_expansion=1,
        mixer_layers=1,
        mixer_head_width=8,
    )


@torch.no_grad()
def attend_to_alike(model: Stca) -> None:
    """Start a fresh model so that an untrained target already attends to events like itself.

    Attention learns to pick out the few events of the target's kind only from the difference they make, and at random
    weights one event in hundreds makes none that a step could see: training sits on a plateau. So the target's side
    starts as a copy of the history's (item and field columns, FFN, query projection), which makes equal things similar,
    and the tables start with the kind standing out. All of it is then trained freely.
    """
    c = model.config
    shared = [f.name for f in c.target_fields]
    history = {"item": slice(0, c.item_width)}
    for i, f in enumerate(c.history_fields):
        history[f.name] = slice(c.item_width + i * c.field_width, c.item_width + (i + 1) * c.field_width)
    begin = 0
    for name in ("item", *shared):
        width = c.item_width if name == "item" else c.field_width
        if name in history:
            model.target_in.weight[begin : begin + width] = model.history_in.weight[history[name]]
        begin += width
    for i, layer in enumerate(cast(Iterable[CrossAttention], model.layers)):
        model.query_ffn[i].load_state_dict(layer.history_ffn.state_dict())
        layer.query.weight.copy_(layer.key.weight)
        if i:  # later queries start from the target too, with a little of the outputs before
            mix = cast(Projection, model.query_in[i - 1]).weight
            mix[: -c.width] *= 0.1
            mix[-c.width :] = torch.eye(c.width)
    for name, table in model.field_tables.items():
        table.normal_(std=ALIKE_STD if name in shared else OTHER_STD)


def fit(model: Stca, log: Log, options: TrainOptions, *, least_history: int, progress: Progress) -> list[float]:
    """Train `model` in place and return the loss of every step.

    The loss is the mean over all targets of a step of the tasks' mean cross-entropy: request-level, an unbiased
    estimate of the pointwise loss (arXiv 2511.06077). Seeded; another number of threads adds in another order, so
    that results then agree closely, not bit for bit.

    Args:
        model: a fresh one starts well after `attend_to_alike`.
        log: its training events are used.
        options: see there.
        least_history: that many events of each user are history alone.
        progress: told step, loss, speed and time left every so often.
    """
    batches = training_batches(
        log,
        options.lengths,
        np.random.default_rng(options.seed),
        requests=options.requests,
        targets=options.targets,
        least_history=least_history,
        request_time=model.config.time == "delta",
    )
    rest = [p for p in model.parameters() if p is not model.item_table]
    groups = [
        {"params": rest, "lr": options.learning_rate},
        # An item is seen far less often than a weight is used; it must learn from fewer steps.
        {"params": [model.item_table], "lr": options.learning_rate * options.item_rate_factor},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay, betas=(0.9, 0.98))
    warm = max(1, min(100, options.steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 1.0) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / options.steps)) / 2),
    )
    model.train()
    losses: list[float] = []
    started, tokens, said = time.monotonic(), 0, 0.0
    for step, (inputs, labels) in zip(range(1, options.steps + 1), batches, strict=False):
        logits = model.logits(tensors(inputs))
        loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise StcaError(f"the loss is {losses[-1]} at step {step}; lower --learning-rate")
        tokens += len(inputs["history_item"])
        spent = time.monotonic() - started
        if spent - said >= 5 or step == options.steps:
            said, left = spent, spent / step * (options.steps - step)
            recent = np.mean(losses[-100:])
            progress(
                f"step {step}/{options.steps}  loss {recent:.4f}  {tokens / spent:,.0f} tokens/s  {left:.0f} s left"
            )
    model.eval()
    return losses


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    """The same arrays as torch tensors, without copying."""
    return {name: torch.from_numpy(column) for name, column in inputs.items()}


def score_with(model: Stca) -> ScoreFn:
    """What `stca.examples.train.evaluate` measures, for a torch model."""

    @torch.no_grad()
    def score(inputs: Inputs) -> NDArray[Any]:
        scores: NDArray[Any] = model.logits(tensors(inputs)).numpy()
        return scores

    return score
