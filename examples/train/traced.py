"""The generated log as a trace: whole requests with the labels that came of them, for `stca calibrate`."""

from __future__ import annotations

from collections.abc import Iterator

from stca.examples.train.world import World, generate
from stca.trace import Traced

# Users that neither training (1) nor evaluation (7) has seen: the generator's stream of that number.
TRACE_SEED = 13


def demo_trace(
    *, users: int = 64, history: int = 10_000, targets: int = 512, world: World | None = None
) -> Iterator[Traced]:
    """One request of each of `users` new users, with `history` events and `targets` labelled targets; one at a time.

    Args:
        users: how many.
        history: events of each.
        targets: of each request, all on one device.
        world: whose; None for the shipped checkpoint's.
    """
    made = generate(world or World(), users=users, history=history, targets=targets, seed=TRACE_SEED)
    for request in made.log.held_out_requests():
        inputs, labels = made.log.batch([request], [history])
        alone = {name: x for name, x in inputs.items() if not name.endswith("_offsets")}
        yield Traced(alone, labels, request.user, float(made.log.time[request.cut]))
