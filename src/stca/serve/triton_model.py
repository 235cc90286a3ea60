"""A bundle in Triton's python backend: what the `model.py` of a written repository runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import triton_python_backend_utils as triton  # there inside of Triton alone

from stca.errors import StcaError, UsageError
from stca.runtime import Session
from stca.serve.errors import INTERNAL_MESSAGE, status_of
from stca.serve.inference import InferRequest
from stca.serve.log import LOG
from stca.serve.models import Served
from stca.serve.work import Call

# In a model's folder of a version: its bundle. In its configuration: what `Session.load` is told besides, as JSON.
BUNDLE: Final = "bundle"
OPTIONS: Final = "session"
# The names of gRPC's statuses as Triton shortens them; any other is an internal error.
_CODES: Final = {
    "INVALID_ARGUMENT": "INVALID_ARG",
    "FAILED_PRECONDITION": "INVALID_ARG",
    "DEADLINE_EXCEEDED": "CANCELLED",
}


class TritonPythonModel:
    """One session. Triton calls it with a few requests at a time, and never twice at once."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle.

        Args:
            args: Triton's: the model's configuration, name, version and folder.

        Raises:
            UsageError, BundleError, BuildError: as `Session.load`; Triton then tells why the model is not ready.
        """
        parameters = json.loads(args["model_config"]).get("parameters", {})
        text = parameters.get(OPTIONS, {}).get("string_value", "{}")
        bundle = str(Path(args["model_repository"], args["model_version"], BUNDLE))
        self._served = Served(args["model_name"], args["model_version"], bundle)
        try:
            options = json.loads(text)
            self._served.loaded = Session.load(bundle, **options)
        except (TypeError, ValueError) as e:
            raise UsageError(
                f"parameter {OPTIONS!r} of config.pbtxt: {e}; write options of Session.load as JSON"
            ) from e

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """The response of each request, in their order."""
        return [self._response(request) for request in requests]

    def finalize(self) -> None:
        """Give back what is kept."""
        self._served.session.close()

    def _response(self, request: Any) -> Any:
        try:
            asked = InferRequest(
                {tensor.name(): tensor.as_numpy() for tensor in request.inputs()},
                tuple(request.requested_output_names()),
                json.loads(request.parameters() or "{}"),
                request.request_id(),
            )
            answer = self._served.infer(asked, Call())
        except StcaError as e:
            code = _CODES.get(status := status_of(e).grpc, status)
            told = triton.TritonError(f"{e.code}: {e}", getattr(triton.TritonError, code, triton.TritonError.INTERNAL))
            return triton.InferenceResponse(output_tensors=[], error=told)
        except Exception:  # a bug of ours is one request's, not that of those that Triton hands over with it
            LOG.exception("a request failed")
            told = triton.TritonError(f"internal: {INTERNAL_MESSAGE}", triton.TritonError.INTERNAL)
            return triton.InferenceResponse(output_tensors=[], error=told)
        return triton.InferenceResponse([triton.Tensor(name, x) for name, x in answer.outputs.items()])
