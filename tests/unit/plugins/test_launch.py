"""What a live server's launches ask of Triton's compiler: nothing new, whatever a request's sizes and addresses."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from stca.plugins import aot, launch
from stca.plugins.tiling import Plan, Shape, Tile

pytest.importorskip("triton")

TILE = Tile(16, 16, 64, 64, 4, 2)


def asked(targets: int, tokens: int, requests: int, parts: int, *, offset: int = 0, tile: Tile = TILE) -> list[Any]:
    """What Triton's cache of compiled kernels is asked for by each launch of these sizes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    def tensor(rows: int, heads: int) -> torch.Tensor:
        return torch.zeros(rows * heads * 64 + offset, dtype=torch.bfloat16)[offset:].view(rows, heads, 64)

    ends = [torch.zeros(n, dtype=torch.int32) for n in (requests + 1, requests + 1, requests)]
    query, key, value = (launch._aligned(tensor(*of)) for of in ((targets, 2), (tokens, 2), (tokens, 2)))
    steps = launch.launches(query, key, value, *ends, 0.125, Plan(tile, parts, 0.0), torch.empty_like(query))
    backend, keys = make_backend(GPUTarget("cuda", 90, 32)), []
    for step in steps:
        function = getattr(importlib.import_module(f"stca.plugins.{step.module}"), step.kernel)
        bind = create_function_from_signature(function.signature, function.params, backend)
        _, specialization, _ = bind(*step.arguments, **step.constants)
        keys.append((step.kernel, specialization))
    return keys


def test_pages_are_launched_where_they_lie() -> None:
    """What a launch reads of a pool is the pool; what it makes are parts of the targets' size."""
    pool, query = torch.zeros(64, 128, 2, 64), torch.zeros(4, 2, 64)
    rows = pool.view(-1, 2, 64)
    table = torch.tensor([9, 3, 60, 7])
    starts = torch.cat([table * 128, torch.tensor([len(rows)])]).int()
    lists = (torch.tensor([0, 4]).int(), torch.zeros(4))
    structure = (torch.tensor([0, 4]).int(), starts, torch.tensor([128, 128, 128, 5]).int())
    steps = launch.launches(query, rows, rows, *structure, 0.1, Plan(TILE, 4, 0.0), torch.empty_like(query), *lists)
    made = {x.data_ptr(): x.nbytes for step in steps for x in step.arguments if isinstance(x, torch.Tensor)}
    assert made.pop(pool.data_ptr()) == pool.nbytes
    assert sum(made.values()) < pool.nbytes / 100
    assert {x.data_ptr() for x in (query, *structure, *lists)} <= set(made)


@pytest.mark.parametrize("parts", [1, 16])
def test_no_size_and_no_address_asks_for_another_compilation(parts: int) -> None:
    first = asked(17, 33, 3, parts)
    assert len(first) == (1 if parts == 1 else 2)
    for sizes in ((1, 1, 1), (16, 16, 16), (300, 160, 1), (7, 5, 2)):
        assert asked(*sizes, parts) == first
    assert asked(17, 33, 3, parts, offset=1) == first


def test_an_address_that_no_wide_load_takes_is_copied_and_others_are_not() -> None:
    whole = torch.arange(65.0)
    assert launch._aligned(whole) is whole
    moved = launch._aligned(whole[1:])
    assert moved.data_ptr() % aot.ALIGNMENT == 0
    assert torch.equal(moved, whole[1:])


def test_key_and_value_are_one_tensor_by_their_memory() -> None:
    key = torch.zeros(4, 1, 64)
    assert launch.shape_of(key, key, key.view(4, 1, 64)) == Shape(1, 1, 64, 64, "float32", tied=True)
    assert not launch.shape_of(key, key, key.clone()).tied


@pytest.mark.parametrize("parts", [1, 4])
def test_no_size_asks_for_another_compilation_in_bulk(parts: int) -> None:
    bulk = Tile(128, 128, 64, 64, 4, 2, bulk=True)
    first = asked(17, 33, 3, parts, tile=bulk)
    assert [kernel for kernel, _ in first] == ["attend_bulk_kernel", "finish_kernel"]
    for sizes in ((1, 1, 1), (16, 16, 16), (300, 160, 1)):
        assert asked(*sizes, parts, tile=bulk) == first
