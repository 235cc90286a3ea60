"""Run kernels in Triton's interpreter, in a process of its own.

Triton decides when it is imported whether it interprets or compiles, so a process that compiles kernels cannot also
interpret them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Job:
    """One launch.

    Attributes:
        kernel: its name in `stca.plugins.kernels`.
        grid: blocks in each dimension.
        inputs, values, outputs: the kernel's arguments in the order it takes them. A string among the inputs is
            "JOB.OUTPUT", an output of an earlier job. Outputs are written in place, so poison them first.
        constants: its compile-time arguments.
    """

    kernel: str
    grid: tuple[int, int, int]
    inputs: Sequence[Tensor | str]
    values: Sequence[int]
    outputs: Sequence[Tensor]
    constants: dict[str, Any]


def run(jobs: Sequence[Job]) -> list[list[Tensor]]:
    """The outputs of each job, in order."""
    with tempfile.TemporaryDirectory(prefix="stca-interpreter-") as folder:
        path = Path(folder, "jobs.pt")
        torch.save([asdict(job) for job in jobs], path)
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def _main(path: str) -> None:
    from stca.plugins import kernels

    outputs: list[list[Tensor]] = []
    for job in torch.load(path, weights_only=True):
        inputs = []
        for tensor in job["inputs"]:
            if isinstance(tensor, str):
                number, output = map(int, tensor.split("."))
                tensor = outputs[number][output]
            inputs.append(tensor)
        kernel = getattr(kernels, job["kernel"])
        kernel[tuple(job["grid"])](*inputs, *job["values"], *job["outputs"], **job["constants"])
        outputs.append(list(job["outputs"]))
    torch.save(outputs, path)


if __name__ == "__main__":
    _main(sys.argv[1])
