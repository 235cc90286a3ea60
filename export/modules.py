"""Other people's modules: found by name, called as they were written, and asked once before anything is traced."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import stca
from stca import probe
from stca.arrays import Array
from stca.errors import ExportError, told
from stca.export.to_onnx import RequestModel, check_inputs, example_inputs, quietly
from stca.specs import Padding, TensorSpec

# Histories asked for are shorter.
_FEW = 6
_OTHER_IN_EVAL = (
    "torch scores short histories otherwise in eval mode without gradients: its fast path sets padded places to 0, and "
    "the model reads them. The bundle scores as in training; so does torch after "
    "torch.backends.mha.set_fastpath_enabled(False)"
)


def resolve(name: str) -> RequestModel:
    """Call what `package.module:callable` names; it must return a `RequestModel`.

    Raises:
        ExportError: when there is no such callable, it fails, or it returns something else.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does: the user's module is usually right here
    try:
        call = getattr(importlib.import_module(module), attribute)
    except Exception as e:  # no such module, no such name, or what the module itself raises
        if place := place_in_their_code(e):
            raise ExportError(f"--model {name}: your module raised {told(e)}{place}; mend it there") from e
        raise ExportError(f"--model {name}: {told(e)}; expected PACKAGE.MODULE:CALLABLE") from e
    try:
        made = call()
    except Exception as e:
        raise ExportError(
            f"--model {name}: your function raised {told(e)}{place_in_their_code(e)}; mend it there, or call it in "
            "Python for the traceback"
        ) from e
    if not isinstance(made, RequestModel):
        raise ExportError(
            f"--model {name}: returned {type(made).__name__}, expected a "
            "stca.export.RequestModel(module, inputs=(TensorSpec(name, dtype, shape, scope), …))"
        )
    return made


def place_in_their_code(error: BaseException) -> str:
    """` at file:line` of the innermost call that is neither ours, the standard library's nor an installed package's."""
    paths = sysconfig.get_paths()
    others = (str(Path(stca.__file__).parent), "<", *(paths[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(others)]
    return f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""


def _fix(error: Exception, inputs: Sequence[TensorSpec]) -> str:
    """What to change for an error that a declaration of the inputs causes, where it can be told."""
    text, limits = str(error), ", ".join(f"{s.name} ({s.limit})" for s in inputs if s.limit)
    if limits and (isinstance(error, IndexError) or "out of range" in text):
        return f"; ids go up to an input's limit, less 1: lower that of {limits} to the table's rows where it is above"
    if "dtype" in text or "scalar type" in text:
        return "; ids are int64, of features float32: mend the dtype, or the model"
    if "offsets[" in text:  # of nn.EmbeddingBag
        return (
            "; pad each bag's ids to one length, give them as [batch, ids] without offsets, and set padding_idx to the "
            "id that fills up"
        )
    if len(names := _names_of_unlike(text, inputs)) == 2:
        return f"; the specs call these sizes {names[0]!r} and {names[1]!r}: where they are one, call both by one name"
    return "; mend these, or the model"


def _names_of_unlike(text: str, inputs: Sequence[TensorSpec]) -> list[str]:
    """What the specs call the sizes of which torch says that they must match."""
    told = re.findall(r"(?:tensor [ab] \(|\bsize )(\d+)", text) if "must match" in text else []
    made = example_inputs(inputs)
    sizes = {n: str(size) for s in inputs for n, size in zip(s.shape, made[s.name].shape, strict=True)}
    return [n for n, size in sizes.items() if isinstance(n, str) and size in told]


class _Adapted(nn.Module):
    """A module called with one dict of named tensors, which gives a tuple of tensors.

    Args:
        module: whose `forward` takes the inputs by name, in one dict or as parameters.
        by_name: whether its parameters are the inputs.
    """

    def __init__(self, module: nn.Module, by_name: bool) -> None:
        super().__init__()
        self.module, self.by_name = module, by_name
        self.training = module.training

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Scores, by the dict of inputs."""
        return tuple(_outputs(self.module(**inputs) if self.by_name else self.module(inputs)).values())


def adapted(model: RequestModel) -> RequestModel:
    """The model with a module that takes one dict of named tensors and gives a tensor or a tuple of them.

    A module whose parameters are called as the inputs is called by them; a dict, a named tuple or a dataclass of scores
    gives its names to the outputs. Wrappers of `torch.compile` and of data parallelism are taken off. The module is
    asked once, so that what its own code raises is told with its line.

    Raises:
        ExportError: when the module cannot be called with its inputs, is not float32, or gives no tensors.
    """
    check_inputs(model)
    module, names = _bare(model.module), [s.name for s in model.inputs]
    low = [t.dtype for t in (*module.parameters(), *module.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    if low:
        kind = str(low[0]).removeprefix("torch.")
        raise ExportError(
            f"the model's weights are {kind}; return it as .float() and choose the engines' precision with "
            "`stca build --precision`"
        )
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            raise ExportError(
                f"the model's {name} ({type(part).__name__}) has no running statistics, so that a target's score "
                "depends on the other targets of its request; train it with track_running_stats=True"
            )
    by_name = _takes_names(module, names)
    ask = _Adapted(module, by_name)
    try:
        with quietly(module), torch.no_grad():
            inputs = example_inputs(model.inputs)
            given, again = (module(**inputs) if by_name else module(inputs) for _ in range(2))
    except Exception as e:
        raise ExportError(
            f"the model raised {told(e)}{place_in_their_code(e)} when it was called with small inputs of the shapes "
            f"and dtypes in RequestModel.inputs{_fix(e, model.inputs)}"
        ) from e
    outputs = _outputs(given)
    wrong = [type(x).__name__ for x in outputs.values() if not isinstance(x, Tensor)]
    if wrong or not outputs:
        raise ExportError(f"the model returns {wrong[0] if wrong else 'nothing'}; scores are one tensor, or several")
    if not all(map(torch.equal, outputs.values(), _outputs(again).values())) and not _has_nan(outputs):
        raise ExportError(
            "the model gives other scores when it is asked the same again, in evaluation mode too; take out what draws "
            "at random (dropout with training=True, say) or changes the module as it runs"
        )
    plain = not by_name and isinstance(given, Tensor | tuple | list) and not hasattr(given, "_fields")
    called = tuple(outputs) if model.outputs == ("scores",) else model.outputs
    if len(called) != len(outputs):
        raise ExportError(
            f"the model returns {', '.join(outputs)}, RequestModel.outputs names {', '.join(called)}; name each of them"
        )
    return dataclasses.replace(model, module=module if plain else ask, outputs=called)


def least_history(model: RequestModel) -> int:
    """Events of the shortest history that an adapted model takes: 0 where that is an empty one, or nothing tells."""
    least = {s.name: s.low or 0 for s in model.inputs if "int" in s.dtype and not s.is_offsets}

    def takes(events: int) -> bool:
        feeds = probe.pack(model.inputs, [probe.single(model.inputs, events, 3, np.random.default_rng(0))])
        for value in (1, 0):  # one may be a length
            whole = {n: np.full_like(feeds[n], max(value, low)) for n, low in least.items()}
            with contextlib.suppress(Exception), quietly(model.module), torch.no_grad():
                model.module({n: torch.from_numpy(x) for n, x in {**feeds, **whole}.items()})
                return True
        return False

    return next((n for n in range(_FEW) if takes(n)), 0)


def other_in_eval(model: RequestModel, histories: Sequence[Padding]) -> tuple[str, ...]:
    """A line where torch, in eval mode and without gradients, gives an adapted model other scores than in training.

    Its fast path for `nn.TransformerEncoder` sets padded places to 0 where they are the last ones, which some models
    read. So the model is asked for short histories, with it and without.

    Args:
        model: as `adapted` gives it.
        histories: how they are padded, as far as that is known.
    """
    if not any(isinstance(part, nn.MultiheadAttention) for part in model.module.modules()):
        return ()
    values = {e.name: e.value for h in histories for e in h.inputs}
    left = {e.name for h in histories for e in h.inputs if h.side == "left"}
    request = probe.single(model.inputs, _FEW, 3, np.random.default_rng(0))
    for events in probe.events_by_size(model.inputs).values():
        whole = [(n, axis) for n, axis in events if request[n].dtype.kind in "biu" and n not in left]
        for other in (None, 0, 1) if whole else ():  # of a mask, nothing may show which says that there is no event
            short = dict(request)
            for name, axis in whole:
                none = values.get(name, 0) if other is None else other
                x = short[name] = request[name].copy()
                x[x == none] = none == 0
                x[(*(slice(None),) * axis, slice(x.shape[axis] // 2, None))] = none
            if _other_in_eval({**short, **_lengths(model, short, whole[0])}, model.module):
                return (_OTHER_IN_EVAL,)
    return ()


def _lengths(model: RequestModel, request: Mapping[str, Array], events: tuple[str, int]) -> dict[str, Array]:
    """Every integer that a user has once, as half as many as there are places for `events`: one may be their number."""
    half = max(1, request[events[0]].shape[events[1]] // 2)
    once = [s for s in model.inputs if s.scope == "user" and np.dtype(s.dtype).kind in "iu" and not s.is_offsets]
    return {
        s.name: np.full_like(request[s.name], half)
        for s in once
        if all(n == 1 or isinstance(n, str) for n in s.shape[:1]) and len(s.shape) < 2 and (s.limit or half + 1) > half
    }


def _other_in_eval(request: Mapping[str, Array], module: nn.Module) -> bool:
    """Whether torch's fast path gives other scores than training; not where it raises."""
    tensors = {n: torch.from_numpy(x) for n, x in request.items()}
    with contextlib.suppress(Exception), quietly(module), torch.no_grad():
        found = []
        for fast in (False, True):
            torch.backends.mha.set_fastpath_enabled(fast)
            found.append(torch.cat([x.flatten() for x in _outputs(module(tensors)).values()]))
        plain, eager = found
        return not torch.allclose(plain, eager, rtol=1e-3, atol=1e-4 * float(plain.abs().max()), equal_nan=True)
    return False


def _bare(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and data parallelism, which an exporter does not see through."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _takes_names(module: nn.Module, names: list[str]) -> bool:
    """Whether a module's `forward` has a parameter for each input, and no other that must be given."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    takes = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in parameters if p.default is p.empty and p.name in takes]
    open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters)
    if len(needed) == 1 and needed[0] not in names:
        return False  # one dict
    unknown = [n for n in names if n not in takes and not open_ended]
    missing = [n for n in needed if n not in names]
    if unknown or missing:
        alone = [f"{', '.join(unknown)} is no parameter"] * bool(unknown)
        alone += [f"{', '.join(missing)} is no input"] * bool(missing)
        raise ExportError(
            f"forward takes {', '.join(takes)}, RequestModel.inputs names {', '.join(names)}: {', and '.join(alone)}; "
            "call both the same, or take one dict"
        )
    return True


def _has_nan(outputs: Mapping[str, Tensor]) -> bool:
    return any(bool(x.isnan().any()) for x in outputs.values())


def _outputs(given: Any) -> dict[str, Any]:
    """A module's scores by name; those it does not name are `scores`, or `scores_0` and so on."""
    if isinstance(given, Mapping):
        return {str(k): v for k, v in given.items() if v is not None}
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        return {f.name: v for f in dataclasses.fields(given) if (v := getattr(given, f.name)) is not None}
    if isinstance(given, tuple | list):
        names = getattr(given, "_fields", None) or [f"scores_{i}" for i in range(len(given))]
        return dict(zip(names if len(given) > 1 else ["scores"], given, strict=True))
    return {"scores": given}
