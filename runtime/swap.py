"""Whether one bundle can take the place of another while it is served."""

from __future__ import annotations

from typing import NoReturn

from stca.errors import BundleError
from stca.manifest import Manifest
from stca.runtime.input_check import shape_of
from stca.specs import GraphSpec


def check_swap(bundle: object, served: Manifest, other: Manifest) -> None:
    """Whoever sends requests for one bundle must be able to send them to the other: the same inputs, and scores of the
    same form. Weights, id limits, the longest history and all that is inside the graphs may differ.

    Args:
        bundle: the name of the one with the manifest `other`, for the message.

    Raises:
        BundleError: naming the first input that differs, or the outputs.
    """
    old, new = (
        {s.name: f"{s.dtype} {shape_of(s)} of scope {s.scope}" for s in _whole(m).inputs} for m in (served, other)
    )
    for name in [*old, *new]:
        if old.get(name) != new.get(name):
            _refuse_swap(bundle, f"input {name!r}", new.get(name, "missing"), old.get(name, "missing"))
    # Symbolic sizes of outputs are names that an exporter made up.
    have, has = (
        ", ".join(f"{s.dtype} [{', '.join('*' if isinstance(n, str) else str(n) for n in s.shape)}]" for s in outputs)
        for outputs in (_whole(served).outputs, _whole(other).outputs)
    )
    if have != has:
        _refuse_swap(bundle, "the output", has, have)


def _whole(manifest: Manifest) -> GraphSpec:
    return manifest.graphs["request"]


def _refuse_swap(bundle: object, what: str, new: str, old: str) -> NoReturn:
    raise BundleError(
        f"{bundle}: cannot take the place of the bundle being served: {what} is {new} in it, {old} there; "
        "load it as a session of its own"
    )
