"""The kernels on a CPU, in Triton's interpreter: slow, but the same source, grid and arguments as on a GPU.

Triton decides when it is imported whether kernels are compiled or interpreted. So a child process interprets, and this
one stays free to compile: `Interpreter` sends it launches and gets their tensors back.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace, TracebackType
from typing import IO, Any

import torch
from torch import Tensor

KERNELS = Path(__file__).with_name("kernels.py")


class Interpreter:
    """A child process in which Triton interprets, started by the first launch; close it, or use it in a `with`."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def launch(
        self,
        kernel: str,
        grid: tuple[int, ...],
        arguments: Sequence[Tensor | int | None],
        constants: Mapping[str, Any],
        source: Path = KERNELS,
    ) -> None:
        """Run one kernel over `grid`; CPU tensors among `arguments` are written in place, as a GPU would, and so is
        what lies around them in their storage if the kernel writes there.

        Args:
            kernel: name of the kernel in `source`.
            grid: blocks in each dimension.
            arguments: tensors and integers in the kernel's order, None for those it does without.
            constants: compile-time arguments by name.
            source: file with the kernels; a test may pass a changed copy.

        Raises:
            RuntimeError: with the child's own message, when the kernel fails or Triton is missing.
        """
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "stca.plugins.interpret"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            _send((kernel, grid, list(arguments), dict(constants), source), self._child.stdin)
            results = _receive(self._child.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError(f"Triton's interpreter ended with exit status {self._child.wait()}") from error
        if isinstance(results, str):
            raise RuntimeError(f"{kernel} failed in Triton's interpreter: {results}")
        for argument, result in zip(arguments, results, strict=True):
            if isinstance(argument, Tensor):
                argument.untyped_storage().copy_(result.untyped_storage())

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _send(message: Any, to: IO[bytes]) -> None:
    """With `torch.save`, to which tensors that share memory are views of one storage, also on the other side."""
    packed = io.BytesIO()
    torch.save(message, packed)
    pickle.dump(packed.getvalue(), to)
    to.flush()


def _receive(source: IO[bytes]) -> Any:
    return torch.load(io.BytesIO(pickle.load(source)), weights_only=False)  # from this module's own other half


@functools.cache
def _load(source: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("interpreted_kernels", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _round_to_nearest() -> None:
    """Make the interpreter round float32 to bfloat16 as a GPU does, to nearest even; it truncates."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
        return convert(values, source, target, mode)

    interpreter._convert_float = rounded


def _patch_once() -> None:
    """Let the interpreter replace Triton's language once, not at every call of every function: twice as fast."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched = set()

    def once(function: Any) -> SimpleNamespace:
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch(function)
            # Before Triton 3.9 this failed with NumPy 2.4, which refuses int(array([1])).
            tl.tensor.__index__ = lambda scalar: int(scalar.handle.data.squeeze())
        return SimpleNamespace(restore=lambda: None)  # nothing else runs in this process

    interpreter._patch_lang = once


def _serve() -> None:
    """Read launches on stdin and answer with their tensors on stdout, until stdin ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints must not mix with the replies
    _round_to_nearest()
    _patch_once()
    while True:
        try:
            kernel, grid, arguments, constants, source = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            getattr(_load(source), kernel)[grid](*arguments, **constants)
            reply: Any = [x if isinstance(x, Tensor) else None for x in arguments]
        except Exception as error:  # the parent raises it; the child lives on
            reply = f"{type(error).__name__}: {error}"
        _send(reply, replies)


if __name__ == "__main__":
    _serve()
