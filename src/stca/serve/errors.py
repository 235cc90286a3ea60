"""What a server answers instead of scores: each error's `code`, with its HTTP status and its gRPC status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from stca.errors import StcaError


class ServeError(StcaError):
    """A request that the server does not compute; `retry_after` seconds later it may."""

    retry_after: int | None = None


class NotFoundError(ServeError):
    """No such model or version is served."""

    code = "not_found"


class TooLargeError(ServeError):
    """A body is over its limit."""

    code = "too_large"


class EncodingError(ServeError):
    """A body is compressed in a way that is not taken."""

    code = "bad_encoding"


class OverloadedError(ServeError):
    """The queue is full; nothing was computed."""

    code = "overloaded"


class UnavailableError(ServeError):
    """The server loads its bundles, or ends; nothing was computed."""

    code = "unavailable"
    retry_after = 1


class SlowBodyError(ServeError):
    """A body did not arrive in time."""

    code = "slow_body"


class Status(NamedTuple):
    """What an error is in each protocol: a status of HTTP, and a name of `grpc.StatusCode`."""

    http: int
    grpc: str


STATUS: Final[Mapping[str, Status]] = {
    "bad_request": Status(400, "INVALID_ARGUMENT"),
    "usage": Status(400, "INVALID_ARGUMENT"),
    "not_found": Status(404, "NOT_FOUND"),
    "bad_method": Status(405, "UNIMPLEMENTED"),
    "slow_body": Status(408, "DEADLINE_EXCEEDED"),
    "history_needed": Status(409, "FAILED_PRECONDITION"),
    "too_large": Status(413, "RESOURCE_EXHAUSTED"),
    "bad_encoding": Status(415, "UNIMPLEMENTED"),
    "bad_bundle": Status(422, "FAILED_PRECONDITION"),
    "overloaded": Status(429, "RESOURCE_EXHAUSTED"),
    "cancelled": Status(499, "CANCELLED"),
    "engine": Status(500, "INTERNAL"),
    "unavailable": Status(503, "UNAVAILABLE"),
    "deadline": Status(504, "DEADLINE_EXCEEDED"),
}
INTERNAL: Final = Status(500, "INTERNAL")
INTERNAL_MESSAGE: Final = "the server failed, and its log says where; this is a bug of stca"


def status_of(error: StcaError) -> Status:
    """Its status; of a kind that is not in the table, an internal one."""
    return STATUS.get(error.code, INTERNAL)
