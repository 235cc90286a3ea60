"""What a fuzzed graph is, and what may become of it: served with parity, or refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from outcomes import Outcome, refused, unexpected

from stca.checks.verify import prove
from stca.errors import StcaError
from stca.export.pipeline import split_onnx
from stca.runtime import Request, Session
from stca.runtime.engine import scores_of


@dataclass(frozen=True)
class Case:
    """A model, the scopes of its inputs, one request, and the same request as the whole model takes it."""

    name: str
    model: onnx.ModelProto
    scopes: Mapping[str, str]
    request: Mapping[str, NDArray[Any]]
    whole: Mapping[str, NDArray[Any]]


def check(case: Case, folder: Path) -> Outcome:
    """Split the case's model with its proof, serve its request by a miss and a hit, and hold both against the whole."""
    file = folder / "model.onnx"
    onnx.save(case.model, file)
    try:
        bundle = split_onnx(file, dict(case.scopes), folder / "bundle", prove=prove)
        session = Session.load(bundle.path, threads=1)
        served = [session.score(Request(case.request, "fuzz", 0)) for _ in ("miss", "hit")]
    except StcaError as e:
        return refused(case.name, e)
    except Exception as e:
        return unexpected(case.name, e)
    return Outcome(case.name, *_compared(case, file, served))


def _compared(case: Case, file: Path, served: list[NDArray[Any]]) -> tuple[str, str]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    whole = onnxruntime.InferenceSession(file, options)
    expected = scores_of(whole.run(None, {i.name: np.asarray(case.whole[i.name]) for i in whole.get_inputs()}))
    if served[0].shape != expected.shape:
        return "wrong", f"scores of shape {served[0].shape}, the model's are {expected.shape}"
    half = any(t in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16) for t in _casts(case.model))
    scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=1e-30))
    for how, scores in zip(("miss", "hit"), served, strict=True):
        if not np.allclose(scores, expected, rtol=0, atol=(2e-2 if half else 1e-4) * scale, equal_nan=True):
            return "wrong", f"a {how} differs by {float(np.abs(scores - expected).max()):.3g} of {scale:.3g}"
    return "served", ""


def _casts(model: onnx.ModelProto) -> list[int]:
    types = [a.i for n in model.graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to"]
    return [*types, *(i.type.tensor_type.elem_type for i in model.graph.input)]
