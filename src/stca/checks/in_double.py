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
# Weights of more bytes are neither copied nor converted: of a table, the rows that are looked up.
LARGE = 1 << 24
_ATEN = torch.ops.aten
_EMBEDDING, _SELECT, _INDEX = _ATEN.embedding.default, _ATEN.index_select.default, _ATEN.index.Tensor
_TOP, _SORT = _ATEN.topk.default, _ATEN.sort.default
_BAGS = (_ATEN._embedding_bag.default, _ATEN._embedding_bag_forward_only.default)


class LargeRows(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, look-ups in large tables give rows of a type, as if all of the table had it.

    Of equal values, `topk` and `sort` take the first, as ONNX says; torch leaves open which.

    Args:
        dtype: of the rows; None leaves tables as they are.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _first_of_equals(func)(*_rows_as(func, args, self._dtype), **(kwargs or {}))


def _first_of_equals(func: Any) -> Any:
    return {_TOP: _top, _SORT: _sorted}.get(func, func)


def _sorted(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    values, places = torch.sort(x, dim=dim, descending=descending, stable=True)
    return values, places


def _top(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    if not x.dim():  # one value, without an axis to take others from
        values, places = torch.topk(x, k, dim, largest, sorted)
        return values, places
    values, places = _sorted(x, dim, largest)
    return values.narrow(dim, 0, k), places.narrow(dim, 0, k)


def _rows_as(func: Any, args: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    """The arguments of a look-up in a large table, with the rows that it reads, of that type, as its table."""
    if dtype is None or not args or not isinstance(args[0], Tensor) or not is_large(args[0]):
        return args
    table, *rest = args
    if func in (_EMBEDDING, *_BAGS):
        ids = rest[0]
    elif func is _INDEX and len(rest[0]) == 1:
        ids = rest[0][0]
    elif func is _SELECT and rest[0] == 0:
        ids = rest[1]
    else:
        return args
    unique, inverse = torch.unique(torch.where(ids < 0, ids + len(table), ids), return_inverse=True)
    rows = table[unique].to(dtype)
    if func is _SELECT:
        return rows, 0, inverse
    if func in (_INDEX, _EMBEDDING):
        return rows, [inverse] if func is _INDEX else inverse
    if len(rest) > 7:  # the id that a bag leaves out
        place = (unique == rest[7]).nonzero()
        rest[7] = int(place) if rest[7] >= 0 and place.numel() else -1
    return rows, inverse, *rest[1:]


def is_large(tensor: Tensor) -> bool:
    """Whether a weight is neither copied nor converted as a whole."""
    return tensor.is_floating_point() and tensor.nbytes > LARGE


class InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, operations take and give float64 where they would take or give a narrower floating-point type.

    Of equal values it takes the first, as `LargeRows`.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {**(kwargs or {})}
        if given.get("dtype") in _NARROW:
            given["dtype"] = torch.float64
        args = tuple(torch.float64 if isinstance(x, torch.dtype) and x in _NARROW else x for x in args)
        args = _rows_as(func, args, torch.float64)
        if func._schema.is_mutable:  # what is written to must stay the caller's own tensor
            return func(*args, **given)
        return _wide(_first_of_equals(func)(*_wide(args), **_wide(given)))

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
    """A copy in evaluation mode, with the large weights themselves. Tensors that a module keeps besides its parameters
    may be results of a computation, which `copy.deepcopy` refuses: they are copied by value."""
    kept = [x for part in module.modules() for x in vars(part).values() if isinstance(x, Tensor) and not x.is_leaf]
    large = [x for x in (*module.parameters(), *module.buffers()) if is_large(x)]
    return copy.deepcopy(module, {id(x): x.detach().clone() for x in kept} | {id(x): x for x in large}).eval()


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module, its weights but the large ones converted in place."""
    change: Any = module._apply  # for which torch declares no types
    change(lambda x: x.to(dtype) if x.is_floating_point() and not is_large(x) else x)
    return module
