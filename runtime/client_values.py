"""What clients send, made into values of our own: nothing of theirs runs, raises or reaches a message after this."""

from __future__ import annotations

import datetime
import uuid
import zoneinfo
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike

from stca.arrays import Array
from stca.errors import RequestError

# Most values of one input. Far more than any model is asked, and few enough to look at each: an array that repeats one
# value takes no memory of its own, whatever its length.
MOST_VALUES: Final = 1 << 27
_LONGEST_INTEGER: Final = 1024  # bits of an id
TEXT: Final = frozenset((str,))
_DEEPEST: Final = 8  # tuples in tuples of an id; looking up thousands of them would end the process


def quoted(value: object) -> str:
    """A client's text or value for a message: on one line, in quotes if it is text, and cut."""
    try:
        text = repr(value[:60] if isinstance(value, str | bytes) else value)
    except Exception:  # an object's own code, or an integer of too many digits
        return f"({type(value).__name__:.40})"
    return ascii(text)[1:-1] if not text.isprintable() else text if len(text) <= 70 else text[:69] + "…"


def array_of(name: str, value: ArrayLike) -> Array:
    """What a client sent as an array of any dtype.

    Raises:
        RequestError: when it is none, hides rows, or has more values than anyone can check.
    """
    found = value if type(value) is np.ndarray else _converted(name, value)
    if found.size > MOST_VALUES:
        raise RequestError(f"{name}: has shape {list(found.shape)}, more than {MOST_VALUES} values; send fewer at once")
    return found


def _converted(name: str, value: Any) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        raise RequestError(f"{name}: is a masked array; fill it or leave the masked rows out")
    try:
        if isinstance(value, Sequence) and len(value) > MOST_VALUES:  # as a `range`, which takes no memory of its own
            raise ValueError(f"more than {MOST_VALUES} values")
        return np.asarray(value)
    except Exception as e:  # whatever the code of a client's object raises
        said = " ".join(str(e).split())[:200]
        if "inhomogeneous" in said:
            raise RequestError(
                f"{name}: has rows of different lengths; fill them up with the id that the model reads as none"
            ) from e
        kind = type(value).__name__
        what = "is not a rectangular array" if kind in ("list", "tuple") else f"{kind:.40} cannot become a NumPy array"
        raise RequestError(f"{name}: {what} ({said}); send a NumPy array or a list of numbers") from e


def in_numbers(value: Any) -> bool:
    """Whether what a client sent is Python's own numbers, which have no dtype yet: one, or a list of them."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return type(value) in (int, float)


def odd_one(value: Any, found: Array, wanted: str) -> str | None:
    """The first entry of a client's list that is not a number of the kind `wanted`, numpy's letter, and where it
    stands, for a message; None where the list is of such numbers, or no list, or `found`, the array that was made of
    it, tells by its dtype what they are from the first one on.
    """
    place: list[int] = []
    if type(value) not in (list, tuple):
        return None

    def walk(values: Any) -> bool:
        for i, one in enumerate(values):
            place.append(i)
            if walk(one) if type(one) in (list, tuple) else _is_odd(one, wanted):
                return True
            place.pop()
        return False

    if not walk(value):
        return None
    for i in place:
        value = value[i]
    if found.dtype.kind in "biufc" and type(value) is not int and not any(place):
        return None
    return f"holds {quoted(value)} at {place}"


def _is_odd(one: Any, wanted: str) -> bool:
    if isinstance(one, np.generic | np.ndarray):
        return one.dtype.kind not in {"b": "b", "f": "iuf"}.get(wanted, "iu")
    kinds = {"b": (bool,), "f": (int, float)}.get(wanted, (int,))
    if type(one) not in kinds:
        return True
    return type(one) is int and not -(1 << 63) <= one < 1 << 63


def key_of(what: str, value: Hashable, depth: int = 0) -> Hashable:
    """A user id or a version as plain Python: text, bytes, an integer, a UUID, a date, or a tuple of these.

    An object with its own `__eq__` could break the lookup of others, NaN is never found again, True is 1, and 1.0 is
    nearly an integer: C++ and JSON take no floats either.

    Raises:
        RequestError: when it is something else.
    """
    if type(value) in (str, bytes) or (type(value) is int and value.bit_length() <= _LONGEST_INTEGER):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and not isinstance(value, bool) and int.bit_length(value) <= _LONGEST_INTEGER:
        return int.__int__(value)
    if value is None or type(value) in (uuid.UUID, datetime.date):
        return value
    if type(value) is datetime.datetime and type(value.tzinfo) in (type(None), datetime.timezone, zoneinfo.ZoneInfo):
        return value  # with a time zone of another kind, someone's code would run whenever it is compared
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, tuple) and depth < _DEEPEST:
        return tuple(key_of(what, part, depth + 1) for part in value)
    raise RequestError(
        f"{what} {quoted(value)}: cannot be the key of a user's state; use a string or an integer (or bytes, a UUID, "
        "a date, a tuple of these)"
    )


def mapping_of(what: str, value: Any) -> dict[str, Any]:
    """Inputs by name.

    Raises:
        RequestError: when it is no mapping, or a name is no text.
    """
    found = value if type(value) is dict else _dict_of(what, value)
    if not TEXT.issuperset(map(type, found)):
        name = next(name for name in found if type(name) is not str)
        raise RequestError(f"{what}: has the name {quoted(name)}, expected text")
    return found


def no_request(value: Any) -> str:
    """What to say of something that is to be scored and is no request."""
    takes = f"score takes a Request or a RequestBatch, got {type(value).__name__:.40}"
    if isinstance(value, list | tuple):
        return f"{takes}; score its requests one by one, or join their rows in a RequestBatch, with offsets"
    return f"{takes}; write Request(inputs, user=…, version=…)" if isinstance(value, Mapping) else takes


def _dict_of(what: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        several = isinstance(value, list | tuple)
        one_by_one = "; score requests one by one, or join their rows by name, with offsets" if several else ""
        raise RequestError(f"{what}: is {type(value).__name__:.40}, expected the model's inputs by name{one_by_one}")
    try:
        return dict(value)
    except Exception as e:  # whatever the code of a client's object raises
        raise RequestError(f"{what}: {type(value).__name__:.40} cannot be read; send a dict") from e


def whose_of(users: Any, versions: Any, requests: int) -> list[tuple[Hashable, Hashable]]:
    """The user and version of each request of a batch; of a request without a user, no version counts.

    Raises:
        RequestError: as `labels_of`.
    """
    of_users, of_versions = labels_of("users", users, requests), labels_of("versions", versions, requests)
    return [(u, None if u is None else v) for u, v in zip(of_users, of_versions, strict=True)]


def labels_of(what: str, labels: Any, requests: int) -> Sequence[Hashable]:
    """The users or versions of a batch, one for each request; or none, and each is None.

    Raises:
        RequestError: when it is no sequence, or of another length.
    """
    if isinstance(labels, np.ndarray) and labels.shape in ((requests,), (0,)):
        labels = labels.tolist()
    if not isinstance(labels, Sequence) or isinstance(labels, str | bytes | bytearray):
        raise RequestError(f"{what}: is {type(labels).__name__:.40}, expected a list with one entry for each request")
    if len(labels) and len(labels) != requests:
        raise RequestError(f"{what}: has {len(labels)} entries for {requests} requests")
    return labels if len(labels) else [None] * requests
