"""What making engines needs of a backend, and what it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from stca.arrays import Progress
from stca.backends import BACKENDS
from stca.bundle import Bundle
from stca.engines.cache import EngineCache, key_of
from stca.errors import BuildError
from stca.manifest import EngineEntry
from stca.tensorrt_flavours import Profile


@dataclass(frozen=True)
class Workload:
    """The sizes engines are built for.

    Attributes:
        history_max: most history tokens of one run; None takes the bundle's limit, or 10 240.
        targets_max: most targets of one run.
        requests_max: most requests of one run, where the engine can serve more than one.
        history_buckets: upper edges of ranges with an optimization profile of their own, where one for all is slow.
        sizes: largest size of any other symbolic dimension, by name.
    """

    history_max: int | None = None
    targets_max: int = 512
    requests_max: int = 1
    history_buckets: tuple[int, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)

    def profiles(self, dims: Sequence[str], max_history: int | None) -> list[Profile]:
        """One profile per bucket, each best at its upper edge, over the symbolic dimensions `dims`.

        Raises:
            BuildError: when a dimension has no size, or sizes make no sense.
        """
        history = self.history_max or max_history or 10_240
        largest = {"N_h": history, "N_t": self.targets_max, **self.sizes}
        largest |= {"B": self.requests_max, "B_plus_1": self.requests_max + 1}
        if "N_h" in dims and max_history and self.requests_max == 1 and history > max_history:
            raise BuildError(f"the bundle serves histories of at most {max_history} tokens; --history-max is {history}")
        if late := [e for e in self.history_buckets if "N_h" in dims and e >= history]:
            raise BuildError(f"history bucket {late[0]} is not below the largest history, {history}; leave it out")
        if missing := [d for d in dims if d not in largest]:
            raise BuildError(f"dimension {missing[0]!r} has no size; say how large it gets with --size {missing[0]}=N")
        if bad := [d for d in dims if largest[d] < 1]:
            raise BuildError(f"dimension {bad[0]!r} is to be at most {largest[bad[0]]}; it must be at least 1")
        edges = sorted({*(self.history_buckets if "N_h" in dims else ()), history})
        profiles: list[Profile] = []
        for low, high in zip([0, *edges], edges, strict=False):
            fixed = {"N_h": (low + 1, high, high), "B_plus_1": (2, largest["B_plus_1"], largest["B_plus_1"])}
            profiles.append({d: fixed.get(d, (1, largest[d], largest[d])) for d in dims})
        return profiles


@dataclass(frozen=True)
class Wish:
    """What the caller of `stca.engines.build.build` said; None leaves a choice to the backend."""

    sm: int | None
    precision: str
    lowering: str | None
    workload: Workload
    refit: str | None
    provider: str


@dataclass(frozen=True)
class Plan:
    """One engine that is wanted: its place in the bundle and everything that goes into it."""

    graph: str
    file: str
    parts: dict[str, Any]

    @property
    def key(self) -> str:
        return key_of(self.parts)

    def entry(self) -> dict[str, Any]:
        """What the manifest says of the engine before it is made."""
        said = {n: self.parts[n] for n in ("flavour", "version", "sm", "precision", "lowering", "profiles")}
        return {**said, "graph": self.graph, "file": self.file, "key": self.parts}


class Builder(Protocol):
    """One backend's side that builds."""

    sized: bool  # whether engines are made for sizes, so that they have profiles

    def parts(self, wish: Wish) -> dict[str, Any]:
        """What goes into its engines besides graph and weights: `version`, `sm`, `lowering` and what else there is.

        Raises:
            BuildError: for a wish that it cannot grant.
        """

    def file_name(self, half: str, graph_file: str, parts: Mapping[str, Any]) -> str:
        """Where the engine of a half lies in the bundle; `graph_file` itself where it runs that."""

    def forecast(self, bundle: Bundle, plan: Plan, progress: Progress) -> None:
        """Ask the library whether it builds this at all. Raises BuildError if not."""

    def check(self, bundle: Bundle, plan: Plan, folder: Path, progress: Progress) -> Mapping[str, Sequence[str]]:
        """Hold the graphs that engines are made of against the bundle's own; dimensions that may be padded, by half.

        Raises:
            BuildError: when they score differently.
        """

    def build(
        self,
        bundle: Bundle,
        plan: Plan,
        padded: Sequence[str],
        folder: Path,
        cache: EngineCache | None,
        progress: Progress,
    ) -> tuple[dict[str, Any], Path | None]:
        """The manifest's entry of a new engine, and its file in `folder` where it is none that the bundle has.

        Raises:
            BuildError: when it cannot be built.
        """

    def refit(self, fresh: Bundle, entry: EngineEntry, before: Path, progress: Progress) -> None:
        """Write into `fresh`, whose weights are new, the engine `before` with those weights.

        Raises:
            BuildError: when it cannot have them.
        """


def builder_of(name: str) -> Builder:
    """A backend's side that builds.

    Raises:
        BuildError: naming those there are.
    """
    if name not in BACKENDS:
        raise BuildError(f"no engine {name!r}; there are {', '.join(sorted(BACKENDS))}")
    return cast(Builder, BACKENDS[name].builder())
