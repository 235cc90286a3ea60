"""A model of the gallery → an ONNX file, as whoever trained it would write one, by one of torch's exporters."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from stca.examples.gallery.declared import GalleryModel

TorchExporter = Literal["dynamo", "legacy"]

# Rows and events of the example that is traced: distinct, and no size of a model here.
ROWS, EVENTS = 3, 11


def write(model: GalleryModel, exporter: TorchExporter, file: Path) -> None:
    """Export `model` to `file` with torch, its free sizes left free under the model's own names."""
    request = model.request(EVENTS, ROWS)
    example = model.rows(request, 0, ROWS)
    free = {name: {axis: n for axis, n in enumerate(i.shape) if isinstance(n, str)} for name, i in model.inputs.items()}
    sizes: dict[str, Any] = (
        {"dynamic_shapes": free} if exporter == "dynamo" else {"dynamic_axes": _with_outputs(model, free)}
    )
    with _quietly(), torch.no_grad():
        torch.onnx.export(
            model.build(),
            tuple(torch.from_numpy(x) for x in example.values()),
            str(file),
            input_names=list(model.inputs),
            output_names=list(model.outputs),
            dynamo=exporter == "dynamo",
            external_data=False,
            verbose=False,
            **sizes,
        )


def _with_outputs(model: GalleryModel, free: dict[str, dict[int, str]]) -> dict[str, dict[int, str]]:
    rows = next(sizes[0] for name, sizes in free.items() if model.inputs[name].scope == "target")
    return {**{n: sizes for n, sizes in free.items() if sizes}, **{name: {0: rows} for name in model.outputs}}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Both exporters explain themselves at length, on stdout too, which a table must not share."""
    logger = logging.getLogger("torch.onnx")
    level, fast = logger.level, torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        torch.backends.mha.set_fastpath_enabled(False)  # fused layers that the legacy exporter has no operator for
        try:
            yield
        finally:
            logger.setLevel(level)
            torch.backends.mha.set_fastpath_enabled(fast)
