"""Serve a bundle: `Session.load`, `score`, `append`, `forget`, `swap`. Needs numpy and onnxruntime, nothing else."""

from stca.runtime.engine import Engine, OnnxRuntimeEngine
from stca.runtime.request import Request, RequestBatch
from stca.runtime.session import Session
from stca.runtime.state import StateCache, UserState

__all__ = ["Engine", "OnnxRuntimeEngine", "Request", "RequestBatch", "Session", "StateCache", "UserState"]
