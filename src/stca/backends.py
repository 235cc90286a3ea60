"""The libraries that run a bundle's engines, fastest first. A new one is a module, or two, and a line here.

Nothing is imported before it is asked for: what serves engines never loads what builds them.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Backend:
    """Where a backend's two sides are, as `module:name`.

    Attributes:
        serves: a `stca.runtime.backend.Server`.
        builds: a `stca.engines.builder.Builder`.
    """

    serves: str
    builds: str

    def server(self) -> Any:
        """What opens its engines."""
        return pkgutil.resolve_name(self.serves)

    def builder(self) -> Any:
        """What makes its engines."""
        return pkgutil.resolve_name(self.builds)


BACKENDS: Final[dict[str, Backend]] = {
    "tensorrt": Backend("stca.runtime.tensorrt_backend:TENSORRT", "stca.engines.tensorrt_backend:TENSORRT"),
    "tensorrt-rtx": Backend("stca.runtime.tensorrt_backend:TENSORRT_RTX", "stca.engines.tensorrt_backend:TENSORRT_RTX"),
    "onnxruntime": Backend("stca.runtime.onnxruntime_backend:BACKEND", "stca.engines.onnxruntime_backend:BACKEND"),
}
