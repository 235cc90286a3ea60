"""A model repository for Triton Inference Server, whose python backend serves a bundle."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Final

from stca import folders
from stca.bundle import Bundle
from stca.errors import UsageError
from stca.runtime.client_values import quoted
from stca.serve.tensors import DATATYPES, DTYPES
from stca.specs import TensorSpec

# As `triton_model.py` looks for it, which only Triton can import.
_BUNDLE: Final = "bundle"
_MODEL: Final = '''"""What is served is in the bundle beside this file, and how in config.pbtxt."""

from stca.serve.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_README: Final = """# {name}, served by Triton

`stca export --triton-repository` wrote this model. Triton's python backend runs it, in a Python of its own, which sees
what is installed beside `model.py`. With the Python version of that backend, from a clone of stca:

    python -m pip install --target {made}/1 .

Triton 2.51, with which this was tried, needs `'numpy<2'` besides. Then

    tritonserver --model-repository {repository}

serves it. A request is one user with their targets; `curl localhost:8000/v2/models/{name}` lists the inputs. Its
parameters are those of `stca serve`: `user` and `version`, with which the user inputs may be left out while the state
is kept, and `deadline_ms`. An error begins with its code: after `history_needed: …` send the request again with the
user inputs.

There is one instance, and it computes one request after the other: each further one would be a process that keeps
states of its own. Options of `Session.load` are JSON in `config.pbtxt`:

    parameters [ {{ key: "session" value: {{ string_value: "{{\\"cache_bytes\\": 4294967296}}" }} }} ]

`append`, `amend`, `forget`, `warm` and `swap` are of `stca serve`: here a new version of a history is sent whole.
"""


def write_repository(bundle: str | os.PathLike[str], repository: str | os.PathLike[str], name: str) -> Path:
    """Write the model `name` with a copy of a bundle into a model repository, which other models may be in.

    Args:
        bundle: its directory.
        repository: the directory that Triton is started with; made if need be.
        name: what clients call the model.

    Returns:
        The model's directory.

    Raises:
        BundleError: when the bundle is missing or damaged.
        UsageError: when there is such a model, the name is none, or the backend cannot hand over the bundle's tensors.
    """
    root, made = Path(repository), new_model(repository, name)
    found = Bundle.load(bundle)
    graph = found.manifest.graphs["request"]
    inputs = [s for s in graph.inputs if not s.is_offsets]
    for spec in (*inputs, *graph.outputs):
        if DATATYPES.get(spec.dtype) not in DTYPES:
            raise UsageError(
                f"{spec.name}: is {spec.dtype}, which Triton's python backend cannot hand over as an array"
            )
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=".tmp", dir=root) as folder:
        work = Path(folder, name)
        # A table beyond memory is one file under two names.
        shutil.copytree(found.path, work / "1" / _BUNDLE, copy_function=lambda a, b: folders.share(Path(a), Path(b)))
        (work / "1" / "model.py").write_text(_MODEL, encoding="utf-8")
        (work / "config.pbtxt").write_text(_config(name, inputs, graph.outputs), encoding="utf-8")
        (work / "README.md").write_text(_README.format(name=name, repository=root, made=made), encoding="utf-8")
        work.rename(made)
    return made


def new_model(repository: str | os.PathLike[str], name: str) -> Path:
    """Where a model will be, before anything is written there.

    Raises:
        UsageError: when there is such a model, or the name is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UsageError(f"{quoted(name)}: is no name of a model; use letters, digits, '_', '-' and '.'")
    if (made := Path(repository, name)).exists():
        raise UsageError(f"{made}: is there already; remove it, or choose another repository")
    return made


def _config(name: str, inputs: list[TensorSpec], outputs: tuple[TensorSpec, ...]) -> str:
    """Triton's configuration of the model. One instance, since each keeps states of its own."""
    lines = [f'name: "{name}"', 'backend: "python"', "max_batch_size: 0"]
    lines += [f"input [ {_tensor(s)} ]" for s in inputs] + [f"output [ {_tensor(s)} ]" for s in outputs]
    return "\n".join([*lines, "instance_group [ { kind: KIND_CPU count: 1 } ]"]) + "\n"


def _tensor(spec: TensorSpec) -> str:
    if not spec.name.isprintable() or set(spec.name) & {'"', "\\"}:  # it would end the text that names it
        raise UsageError(f"{spec.name!r:.80}: is no name for Triton's configuration; rename it and export again")
    dims = ", ".join(str(n) if isinstance(n, int) else "-1" for n in spec.shape)
    shape = f"dims: [ {dims} ]" if dims else "dims: [ 1 ] reshape: { shape: [ ] }"
    optional = " optional: true" if spec.scope == "user" else ""
    return f'{{ name: "{spec.name}" data_type: TYPE_{DATATYPES[spec.dtype]} {shape}{optional} }}'
