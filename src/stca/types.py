"""Types that every room speaks of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from numpy.typing import NDArray

# Of any dtype and shape; docstrings say which.
Array: TypeAlias = NDArray[Any]
# Told each step of long work as it starts.
Progress: TypeAlias = Callable[[str], None]
