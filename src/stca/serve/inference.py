"""A request for scores and its answer, whatever protocol they come and go in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from stca import typed_json
from stca.arrays import Array
from stca.errors import RequestError

# What Triton's own clients tell Triton with each request, whatever it is; nothing of it has a meaning here.
_TRITONS: Final = "triton_"
P = TypeVar("P")


@dataclass(frozen=True)
class ScoreParameters:
    """A request's `parameters`.

    Attributes:
        user: whose state may be kept and reused.
        version: which history this is; with it, a user whose state is kept need not send the user inputs again.
        deadline_ms: how long after its arrival the request is still worth computing.
        timeout: the same in microseconds, as Triton's clients call it.
        priority, sequence_id, sequence_start, sequence_end: Triton's, and without a meaning here.
    """

    user: typed_json.Label = None
    version: typed_json.Label = None
    deadline_ms: float | None = None
    timeout: int | None = None
    priority: int | None = None
    sequence_id: typed_json.Label = None
    sequence_start: bool | None = None
    sequence_end: bool | None = None

    @property
    def seconds(self) -> float | None:
        """The deadline after arrival; None for none, as a timeout of 0 is to Triton."""
        given = [] if self.deadline_ms is None else [self.deadline_ms / 1e3]
        return min([*given, self.timeout / 1e6] if self.timeout else given, default=None)


@dataclass(frozen=True)
class AppendParameters:
    """Of `append`; `stca.runtime.Session.append` says what each means."""

    user: typed_json.Label = None
    version: typed_json.Label = None
    after: typed_json.Label = None


@dataclass(frozen=True)
class AmendParameters:
    """Of `amend`; `stca.runtime.Session.amend` says what each means."""

    user: typed_json.Label = None
    version: typed_json.Label = None
    at: typed_json.Signed | None = None
    after: typed_json.Label = None


@dataclass(frozen=True)
class ForgetParameters:
    """Of `forget`."""

    user: typed_json.Label = None


@dataclass(frozen=True)
class ResidenceParameters:
    """Of `residence`."""

    user: typed_json.Label = None
    version: typed_json.Label = None


@dataclass(frozen=True)
class WarmParameters:
    """Of `warm`; the deadline is as a request's."""

    user: typed_json.Label = None
    version: typed_json.Label = None
    deadline_ms: float | None = None


@dataclass(frozen=True)
class SwapParameters:
    """Of `swap`: the directory of the bundle, as the server sees it."""

    bundle: str | None = None


def parameters(kind: type[P], raw: Mapping[str, Any]) -> P:
    """What a client sent as `parameters`, as one of the classes above.

    Raises:
        RequestError: naming the parameter that is not known, or of the wrong kind.
    """
    try:
        own = {name: value for name, value in raw.items() if not name.startswith(_TRITONS)}
        made: P = typed_json.as_type(kind, own, "parameters")
    except (TypeError, ValueError, RecursionError) as e:
        known = ", ".join(kind.__dataclass_fields__)  # type: ignore[attr-defined]
        raise RequestError(f"{e}; it takes {known}") from e
    return made


@dataclass(frozen=True)
class InferRequest:
    """What a client asks.

    Attributes:
        inputs: tensors by name.
        outputs: names of the scores that are wanted; empty for all.
        parameters: as they were sent.
        id: the client's, given back.
        binary: outputs to send as bytes over HTTP; None for all.
    """

    inputs: Mapping[str, Array]
    outputs: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    binary: frozenset[str] | None = frozenset()


@dataclass(frozen=True)
class InferResponse:
    """The scores `(N_t, …)` by output, and whether the user's state was there."""

    model: str
    version: str
    outputs: Mapping[str, Array]
    hit: bool
    id: str = ""
