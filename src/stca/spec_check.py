"""What the `TensorSpec` of an input must say, checked when it is made: later, nobody knows where it was written."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from stca.errors import UsageError

if TYPE_CHECKING:
    from stca.specs import TensorSpec

# Other libraries' words for types.
_ALSO_CALLED: Final[Mapping[str, str]] = {
    "long": "int64", "int": "int64", "integer": "int64", "short": "int16", "char": "int8", "byte": "uint8",
    "uint16": "int32", "uint32": "int64", "uint64": "int64",
    "float": "float32", "single": "float32", "double": "float64", "half": "float16", "boolean": "bool", "bool_": "bool",
}  # fmt: skip
_SCOPES: Final = "user (known before any request), request (one for all targets) or target (one for each)"


def check(spec: TensorSpec) -> None:
    """Raises UsageError naming the first field that is not as it must be, and what to write."""
    from stca.specs import ITEM_BYTES

    if not isinstance(spec.name, str) or not spec.name:
        raise UsageError(f"an input has the name {spec.name!r:.40}; expected text, as the module calls it")
    what = f"input {spec.name!r:.200}"
    if not isinstance(spec.dtype, str) or spec.dtype not in ITEM_BYTES:
        raise UsageError(f"{what} has the dtype {spec.dtype!r:.40}; {_dtype_fix(spec.dtype, ITEM_BYTES)}")
    _check_shape(what, spec.shape)
    _check_input(what, spec)
    for field in ("limit", "low", "blank"):
        value = getattr(spec, field)
        if value is not None and (type(value) is not int or (field == "limit" and value < 1)):
            wanted = "a number from 1 that ids stay below" if field == "limit" else "an integer"
            raise UsageError(f"{what} has the {field} {value!r:.40}; expected {wanted}")
        if value is not None and not -(1 << 63) <= value < 1 << 63:
            raise UsageError(f"{what} has the {field} {value!r:.40}, of more than 64 bits; no id is so large")
    if spec.low is not None and spec.limit is not None and spec.low >= spec.limit:
        raise UsageError(f"{what} has ids from {spec.low} and below {spec.limit}, which is none; raise the limit")
    if spec.length_of is not None and (not isinstance(spec.length_of, str) or not spec.length_of):
        raise UsageError(f"{what} has the length_of {spec.length_of!r:.40}; expected the name of a size, as in a shape")


def _check_shape(what: str, shape: Any) -> None:
    if isinstance(shape, tuple) and all(bool(n) if isinstance(n, str) else type(n) is int and n >= 0 for n in shape):
        return
    if isinstance(shape, list):
        fix = "write a tuple, (…,) in place of […]"
    elif isinstance(shape, str | int):
        fix = f"write a tuple, ({shape!r:.40},)"
    else:
        fix = 'expected a tuple of sizes from 1, and of names for those that vary, as in ("N_h", 64)'
    raise UsageError(f"{what} has the shape {shape!r:.80}; {fix}")


def _check_input(what: str, spec: TensorSpec) -> None:
    """What holds of inputs that requests bring."""
    from stca.specs import FLOAT8, SCOPES

    if spec.scope not in SCOPES:
        near = difflib.get_close_matches(str(spec.scope).lower(), SCOPES, 1)
        hint = f"did you mean {near[0]!r}? It is " if near else "expected "
        raise UsageError(f"{what} has the scope {spec.scope!r:.40}; {hint}one of {_SCOPES}")
    if spec.dtype in ("bfloat16", FLOAT8):
        raise UsageError(f"{what} is {spec.dtype}, which is for states alone: take float32, and cast it in the model")
    if spec.limit is not None and not spec.dtype.startswith(("int", "uint")):
        raise UsageError(f"{what} is {spec.dtype} and has a limit of ids; leave the limit out")
    if spec.low is not None and spec.dtype == "bool":
        raise UsageError(f"{what} is bool and has a least value; leave low out")


def _dtype_fix(given: Any, known: Mapping[str, int]) -> str:
    """What to write instead: numpy's and torch's own types have the name in theirs."""
    said = given if isinstance(given, str) else getattr(given, "name", None) or getattr(given, "__name__", str(given))
    word = str(said).lower().removeprefix("torch.").removeprefix("numpy.").removeprefix("np.")
    near = _ALSO_CALLED.get(word) or (word if word in known else None)
    near = near or next(iter(difflib.get_close_matches(word, known, 1, 0.8)), None)
    return f'write "{near}"' if near else f"expected one of {', '.join(known)}"
