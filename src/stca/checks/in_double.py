"""Any torch module computed in float64, whatever types its own code asks for.

`module.double()` widens parameters and buffers, but most models also say `mask.float()`, `torch.zeros(…)` or
`one_hot(…).float()`, and a product of float32 and float64 is an error. So every operation is widened as it runs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, operations take and give float64 where they would take or give a narrower floating-point type."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {**(kwargs or {})}
        if given.get("dtype") in _NARROW:
            given["dtype"] = torch.float64
        args = tuple(torch.float64 if isinstance(x, torch.dtype) and x in _NARROW else x for x in args)
        if func._schema.is_mutable:  # what is written to must stay the caller's own tensor
            return func(*args, **given)
        return _wide(func(*_wide(args), **_wide(given)))

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> InDouble:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._default)


def _wide(values: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(torch.float64) if x.dtype in _NARROW else x, values)


def copied(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode. Tensors that a module keeps besides its parameters may be results of a computation,
    which `copy.deepcopy` refuses: they are copied by value."""
    kept = [x for part in module.modules() for x in vars(part).values() if isinstance(x, Tensor) and not x.is_leaf]
    return copy.deepcopy(module, {id(x): x.detach().clone() for x in kept}).eval()
