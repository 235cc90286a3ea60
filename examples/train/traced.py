"""A log as a trace: whole requests with the labels that came of them, for `stca calibrate`."""

from __future__ import annotations

from collections.abc import Iterator

from stca.examples.train.log import Log
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
    yield from log_trace(made.log, history)


def log_trace(log: Log, history: int, *, request_time: bool = False) -> Iterator[Traced]:
    """The requests that training does not see: each user's last events, labelled, given those before; one at a time.

    Args:
        log: of what happened.
        history: most events of each, the newest.
        request_time: for models whose tokens know the request's time.
    """
    for request in log.held_out_requests():
        inputs, labels = log.batch([request], [history], request_time=request_time)
        alone = {name: x for name, x in inputs.items() if not name.endswith("_offsets")}
        yield Traced(alone, labels, request.user, float(log.time[request.cut]))
