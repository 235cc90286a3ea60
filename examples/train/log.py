"""An interaction log in columns, and request-level batches cut out of it.

A log holds each user's events one after the other, oldest first. A *request* is a cut in one user's events: the `L`
events before the cut are its history, the events from the cut to its end are its targets, and all of them share that
one history (request-level batching, arXiv 2511.06077). Keeping the last `L` events before the cut is the paper's
"most recent suffix".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Inputs = dict[str, NDArray[Any]]
"""Arrays of one or more requests under the request graph's input names."""


class LoggedRequest(NamedTuple):
    """Events `[cut, end)` of `user` to score, given events before `cut`; both index the log's rows."""

    user: int
    cut: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Log:
    """Events of `U` users in `N` rows, sorted by user, then by time.

    Attributes:
        user_offsets: `[U + 1]` int64; user `u` owns rows `user_offsets[u]` to `user_offsets[u + 1]`.
        held_out: `[U]` int64; a user's rows from here on are for evaluation, those before for training.
        item: `[N]` ids below `items`.
        time: `[N]` int64 UTC seconds.
        action: `[N]` ids below `sizes["action"]`; known of history events only.
        labels: `[N, tasks]` 0 or 1.
        event_fields: `[N]` each; known of history events and targets alike (`category`).
        user_fields: `[U]` each.
        request_fields: `[N]` each, constant over a request.
        items, sizes, tasks: the vocabularies, as `StcaConfig` wants them; `sizes` by field name.
    """

    user_offsets: NDArray[np.int64]
    held_out: NDArray[np.int64]
    item: NDArray[np.integer[Any]]
    time: NDArray[np.int64]
    action: NDArray[np.integer[Any]]
    labels: NDArray[np.uint8]
    items: int
    sizes: Mapping[str, int]
    tasks: tuple[str, ...]
    event_fields: Mapping[str, NDArray[np.integer[Any]]] = field(default_factory=dict)
    user_fields: Mapping[str, NDArray[np.integer[Any]]] = field(default_factory=dict)
    request_fields: Mapping[str, NDArray[np.integer[Any]]] = field(default_factory=dict)

    @property
    def users(self) -> int:
        return len(self.user_offsets) - 1

    def training_requests(self, targets: int, least_history: int = 0) -> list[LoggedRequest]:
        """Each user's training events in consecutive requests of `targets` (the last may have fewer).

        A user's first `least_history` events are the first request's history, and no request's targets.
        """
        return [
            LoggedRequest(u, cut, min(cut + targets, int(self.held_out[u])))
            for u, begin in enumerate(self.user_offsets[:-1].tolist())
            for cut in range(begin + least_history, int(self.held_out[u]), targets)
        ]

    def held_out_requests(self) -> list[LoggedRequest]:
        """One request per user: all the events held out, given all those before."""
        ends = self.user_offsets[1:]
        return [
            LoggedRequest(u, int(self.held_out[u]), int(ends[u]))
            for u in range(self.users)
            if self.held_out[u] < ends[u]
        ]

    def history(self, request: LoggedRequest, length: int) -> NDArray[np.int64]:
        """Rows of the most recent `length` events before the request's cut, or of as many as there are."""
        begin = max(int(self.user_offsets[request.user]), request.cut - length)
        return np.arange(begin, request.cut, dtype=np.int64)

    def batch(
        self, requests: Sequence[LoggedRequest], lengths: Sequence[int], *, request_time: bool = False
    ) -> tuple[Inputs, NDArray[np.float32]]:
        """Requests packed as the request graph takes them, each with its most recent `lengths[b]` events.

        Returns:
            The inputs, ids and times int64, offsets int32, with `request_time` only when asked for; and the targets'
            labels `[N_t, tasks]` float32.
        """
        histories = [self.history(r, n) for r, n in zip(requests, lengths, strict=True)]
        past = np.concatenate(histories) if histories else np.zeros(0, np.int64)
        ahead = np.concatenate([np.arange(r.cut, r.end) for r in requests]) if requests else np.zeros(0, np.int64)
        users = np.array([r.user for r in requests], np.int64)
        cuts = np.array([r.cut for r in requests], np.int64)
        # The gap is to the event before in the log, even where the history was cut there: a token never changes when
        # the window moves on. Only a user's very first event has none.
        begins = np.repeat(self.user_offsets[users], [len(rows) for rows in histories])
        inputs: Inputs = {
            "history_item": self.item[past],
            "history_action": self.action[past],
            **{f"history_{name}": column[past] for name, column in self.event_fields.items()},
            "history_time": self.time[past],
            "history_gap": self.time[past] - self.time[np.maximum(past - 1, begins)],
            **{f"user_{name}": column[users] for name, column in self.user_fields.items()},
            **{f"request_{name}": column[cuts] for name, column in self.request_fields.items()},
            **({"request_time": self.time[cuts]} if request_time else {}),
            "target_item": self.item[ahead],
            **{f"target_{name}": column[ahead] for name, column in self.event_fields.items()},
        }
        inputs = {name: column.astype(np.int64) for name, column in inputs.items()}
        inputs["history_offsets"] = _offsets([len(rows) for rows in histories])
        inputs["target_offsets"] = _offsets([r.end - r.cut for r in requests])
        return inputs, self.labels[ahead].astype(np.float32)


def _offsets(counts: Sequence[int]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int32)
